"""Do the rows of the data fit ``num_data``? Layouts that were meant otherwise are refused, a subsample is noted."""

import math
from typing import Any

import jax
from jaxtyping import PyTree

from slt_jax.posterior.data import ArrayData, Source
from slt_jax.posterior.local import LocalPosterior

_FAR = 100  # times as many examples as rows, from which the note says so
_FEW_PARTS = 4  # arrays that a list may hold beside one another, such as inputs, targets, weights and a mask


def check_rows(posterior: LocalPosterior, data: Any, source: Source) -> tuple[str, ...]:
    """Notes for the result where ``num_data`` is not the number of rows.

    Raises:
        ValueError: fewer examples than rows, which is never right; or a layout that was meant otherwise: a list with
            an array for each example or each batch, batches along the first axis, a transposed array.
    """
    n, rows = posterior.num_data, source.num_data
    if isinstance(source, ArrayData):
        _check_list(n, data, rows)
        if n != rows:
            _check_axes(n, source.arrays, rows)
    if n < rows:
        raise ValueError(
            f"num_data = {n:,}, but the data have {rows:,} rows; num_data is the size of the data set, not of a batch. "
            f"Pass num_data={rows}, or only part of the rows; another inverse temperature is set by nbeta."
        )
    return () if n == rows else (_subsample(posterior, rows),)


def _subsample(posterior: LocalPosterior, rows: int) -> str:
    n, nbeta = posterior.num_data, posterior.nbeta
    given = not math.isclose(nbeta, n / math.log(n), rel_tol=1e-9)
    sets = f"It sets nbeta = {nbeta:.4g} and nothing else in the estimate"
    if given:
        sets = f"It sets nothing in the estimate, since nbeta = {nbeta:.4g} was given"
    note = f"num_data = {n:,}, but the data have {rows:,} rows. {sets}; every loss is taken over these rows."
    if n > _FAR * rows:
        note += f" That is {n / rows:,.0f} times the rows: so small a sample may be fitted better than the data set is."
    return f"{note} If the rows are the whole data set, pass num_data={rows}."


def _check_list(n: int, data: Any, rows: int) -> None:
    """Refuse a list that has an element for each example or each batch, all of one structure and shape."""
    if type(data) not in (list, tuple) or len(data) < 2:
        return
    count, kinds = len(data), {(jax.tree.structure(x), *_shapes(x)) for x in data}
    if len(kinds) > 1:
        return
    read = f"the data are a {type(data).__name__} of {count} equal elements, which is read as {rows:,} rows of each"
    batches = n != rows and n == count * rows
    examples = n == count != rows if count <= _FEW_PARTS else n == count or n != rows
    if batches:
        raise ValueError(
            f"{read}; with num_data = {n:,} it looks like {count} batches of {rows:,} rows. Join them: "
            f"{_joined(data, 'np.concatenate')}."
        )
    if examples:
        raise ValueError(
            f"{read}; with num_data = {n:,} it looks like one element for each example. Make one array with a row for "
            f"each: {_joined(data, 'np.stack')}."
        )


def _joined(data: Any, how: str) -> str:
    if jax.tree.structure(data[0]) == jax.tree.structure(0):
        return f"{how}(data)"
    return f"jax.tree.map(lambda *x: {how}(x), *data)"


def _check_axes(n: int, arrays: PyTree, rows: int) -> None:
    """Refuse arrays (batch, row, ...) and arrays (feature, row), by the length of their second axis."""
    leaves = jax.tree.leaves(arrays)
    if any(x.ndim < 2 for x in leaves) or len(seconds := {x.shape[1] for x in leaves}) > 1:
        return
    second = seconds.pop()
    if second == n:
        raise ValueError(
            f"the data have {rows:,} rows, and num_data = {n:,} is the length of their second axis. The first axis "
            "must be the example: transpose the data."
        )
    if second > 1 and rows * second == n:
        raise ValueError(
            f"the data have {rows:,} rows, and with num_data = {n:,} they look like {rows:,} batches of {second:,}. "
            "The first axis must be the example: x.reshape(-1, *x.shape[2:])."
        )


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(tree))
