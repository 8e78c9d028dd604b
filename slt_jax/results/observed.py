"""What was observed at the draws: the losses of a fixed set of examples, whole or as moments."""

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slt_jax.results.devinterp import read_losses, write_losses

BLOCKS = 8  # of each chain's draws, from which errors are estimated
FEWEST_DRAWS = 4  # below which a spread over draws says nothing about its own error
_PIECE = 1 << 24  # numbers that are read at once


class Moments(NamedTuple):
    """Of values over the draws of a block, float32, (chain, block, example[, token]) where no other shape is given.

    ``count``: draws, (chain, block). ``mean``: of the values. ``m2``: sum of (value - mean)^2. ``loss_mean``,
    ``loss_m2``: the same of the run's own gap L_m(w) - L_m(w*), (chain, block). ``co``: sum of (gap - mean gap)
    (value - mean value).
    """

    count: Any
    mean: Any
    m2: Any
    loss_mean: Any
    loss_m2: Any
    co: Any


@dataclass(frozen=True)
class Observed:
    """Values of a function of the weights and of single examples at the draws, of the chains that stayed finite.

    By default the function is the loss, in nats. A value of level "example" is what ``loss_fn`` returns for an example;
    one of level "token" is the loss of one predicted token.

    Args:
        name: under which it was asked for.
        level: "example", "token" or "custom".
        values: (chain, draw, example[, token]), float32, in memory or as a zarr array; None if only moments were kept.
        moments: over ``BLOCKS`` blocks of the draws of each chain; None if they were not needed (``as_moments``).
        center: the same function at w*, (example[, token]); NaN where it is not known.
        valid: which tokens count, (example, token); None if all do.
        gap: the run's own L_m(w) - L_m(w*) at the draws, nats per example, (chain, draw).
        nbeta, num_data, localization: of the posterior that was sampled.
    """

    name: str
    level: str
    values: Any | None
    moments: Moments | None
    center: np.ndarray
    valid: np.ndarray | None
    gap: np.ndarray
    nbeta: float
    num_data: int
    localization: float

    def __repr__(self) -> str:
        chains, draws = self.gap.shape
        kept = "moments only" if self.values is None else "all values"
        named = [f"{self.center.shape[0]:,} examples", *(f"{size:,}" for size in self.center.shape[1:])]
        sizes = " x ".join(named) + (" tokens" if self.level == "token" else "")
        return f"<Observed {self.name!r}: {sizes} at {chains} chains x {draws:,} draws, {kept}>"

    def as_moments(self) -> Moments:
        """``moments``, or those of ``values``, over ``BLOCKS`` blocks of a chain (fewer if it has fewer draws)."""
        return moments_of(self) if self.moments is None else self.moments

    def pieces(self) -> Iterator[tuple[int, slice, np.ndarray]]:
        """(chain, draws, values at these draws) in order, a few draws at a time, so that never all are in memory.

        Raises:
            ValueError: the values were not kept.
        """
        if self.values is None:
            raise ValueError(
                f"of {self.name!r} only moments were kept, and this needs the values at every draw. Observe it with "
                "keep='values'; where they do not fit into memory, with fewer examples or a store on disk."
            )
        chains, draws = self.gap.shape
        step = max(1, _PIECE // max(1, self.center.size))
        for chain in range(chains):
            for start in range(0, draws, step):
                part = slice(start, min(start + step, draws))
                yield chain, part, np.asarray(self.values[chain, part])

    def by_block(self) -> Iterator[tuple[int, int, slice, np.ndarray]]:
        """(chain, block, draws, values at these draws) in order; a block may come in several parts."""
        edges = block_edges(self.gap.shape[1])
        for chain, part, values in self.pieces():
            for block in range(len(edges) - 1):
                start, stop = max(part.start, edges[block]), min(part.stop, edges[block + 1])
                if start < stop:
                    yield chain, block, slice(start, stop), values[start - part.start : stop - part.start]

    def by_example(self) -> "Observed":
        """The same with the sum over the tokens that count for each example; unchanged where there are no tokens.

        Raises:
            ValueError: the values were not kept: variances of sums are not known from moments of single tokens. Or they
                are not those of tokens.
        """
        if self.center.ndim == 1:
            return self
        if self.level != "token":
            raise ValueError(
                f"{self.name!r} is a function of your own with values of shape {self.center.shape[1:]} for each "
                "example, not the losses of tokens, so that their sum has no meaning here."
            )
        values = np.empty((*self.gap.shape, len(self.center)), np.float32)
        for chain, part, piece in self.pieces():
            values[chain, part] = self.summed(piece)
        return dataclasses.replace(
            self, level="example", values=values, moments=None, center=self.summed(self.center), valid=None
        )

    def to_devinterp(self, path: str | os.PathLike, input_ids: Any = None) -> Path:
        """Write the values so that devinterp 2 reads them, for instance its ``compute_bif``.

        Losses of whole examples are written as those of texts of one token, to be read with its
        ``correlation_method="sequence"``. Tokens that do not count are NaN.

        Args:
            path: of the zarr group to write.
            input_ids: token ids (example, token + 1), which devinterp copies into its results; -1 if not given.

        Raises:
            FileExistsError: the path exists. ValueError: the values were not kept, or ids of another shape.
        """
        shape = (*self.gap.shape, *self.center.shape, *((1,) if self.center.ndim == 1 else ()))
        pieces = ((chain, part, self._masked(x).reshape(len(x), *shape[2:])) for chain, part, x in self.pieces())
        center = self.center if self.valid is None else self.center[self.valid]
        at_center = float(center.mean(dtype=np.float64))
        return write_losses(
            path, _identifier(self.name), pieces, shape, self.gap, at_center if math.isfinite(at_center) else 0.0,
            input_ids, nbeta=self.nbeta, localization=self.localization,
        )  # fmt: skip

    def _masked(self, values: np.ndarray) -> np.ndarray:
        return values if self.valid is None else np.where(self.valid, values, np.float32(np.nan))

    def summed(self, values: np.ndarray) -> np.ndarray:
        counted = values if self.valid is None else np.where(self.valid, values, 0)
        return counted.sum(-1, dtype=np.float64).astype(np.float32)


def block_edges(draws: int) -> np.ndarray:
    """Where the blocks of a chain begin and end, ``BLOCKS`` + 1 numbers (fewer for fewer draws)."""
    return np.linspace(0, draws, min(BLOCKS, draws) + 1).astype(int)


def moments_of(observed: Observed) -> Moments:
    """The moments of ``observed.values``, in one pass over them.

    Two parts of n and n' draws are joined by

        mean = mean + n' (mean' - mean) / (n + n'),   m2 = m2 + m2' + n n' (mean' - mean)^2 / (n + n').

    Source: Chan, Golub, LeVeque, The American Statistician 37 (1983), 242-247.
    """
    shape = (len(observed.gap), len(block_edges(observed.gap.shape[1])) - 1)
    count, loss_mean, loss_m2 = (np.zeros(shape) for _ in range(3))
    mean, m2, co = (np.zeros((*shape, *observed.center.shape), np.float32) for _ in range(3))
    with np.errstate(invalid="ignore"):  # of values that are not finite
        for chain, block, draws, values in observed.by_block():
            at, new = (chain, block), len(values)
            x, g = values.astype(np.float64), observed.gap[chain, draws].astype(np.float64)
            x_mean, g_mean = x.mean(0), g.mean()
            x_away, g_away = x - x_mean, g - g_mean
            x_step, g_step = x_mean - mean[at], g_mean - loss_mean[at]
            share = new / (count[at] + new)
            weight = count[at] * share
            m2[at] += (x_away**2).sum(0) + weight * x_step**2
            co[at] += np.tensordot(g_away, x_away, (0, 0)) + weight * g_step * x_step
            loss_m2[at] += (g_away**2).sum() + weight * g_step**2
            mean[at] += share * x_step
            loss_mean[at] += share * g_step
            count[at] += new
    count, loss_mean, loss_m2 = (x.astype(np.float32) for x in (count, loss_mean, loss_m2))
    return Moments(count=count, mean=mean, m2=m2, loss_mean=loss_mean, loss_m2=loss_m2, co=co)


def pooled_moments(observed: Observed) -> dict[str, np.ndarray]:
    """Of all draws together, each (example[, token]), float64, NaN for values that do not count.

    ``center``: at w*; ``mean``; ``variance``, ddof 1; ``covariance`` with the run's own L_m(w) - L_m(w*).
    """
    moments = Moments(*(np.asarray(x, np.float64) for x in observed.as_moments()))
    count = moments.count.reshape(*moments.count.shape, *[1] * observed.center.ndim)
    total = float(moments.count.sum())
    mean = (count * moments.mean).sum((0, 1)) / total
    away = moments.mean - mean
    gap = moments.loss_mean - float((moments.count * moments.loss_mean).sum()) / total
    squares = (moments.m2 + count * away**2).sum((0, 1))
    products = (moments.co + count * gap.reshape(count.shape) * away).sum((0, 1))
    free = total - 1 if total > 1 else np.nan
    found = {
        "center": np.asarray(observed.center, np.float64), "mean": mean, "variance": squares / free,
        "covariance": products / free,
    }  # fmt: skip
    return found if observed.valid is None else {k: np.where(observed.valid, x, np.nan) for k, x in found.items()}


def observed_of(result: Any, which: Any, argument: str) -> Observed:
    """What ``which`` names in ``result.observed``, or ``which`` itself.

    Args:
        argument: the name of the argument, for messages.

    Raises:
        TypeError: neither a name nor an ``Observed``; a ``result`` that is none. ValueError: a name that was not
            observed, or there are no draws.
    """
    if isinstance(which, Observed):
        return _with_draws(which, argument)
    if not isinstance(which, str):
        raise TypeError(f"{argument} must be the name of an observed data set, got a {type(which).__name__}.")
    if result is not None and not hasattr(result, "observed"):
        raise TypeError(f"result must be what estimate_llc returned, or None, got a {type(result).__name__}.")
    known = {} if result is None else result.observed
    if which not in known:
        names = ", ".join(map(repr, known)) or "nothing"
        raise ValueError(
            f"{argument}={which!r} was not observed; the result has {names}. Give estimate_llc(observe={{{which!r}: "
            "data})."
        )
    return _with_draws(known[which], argument)


def _with_draws(observed: Observed, argument: str) -> Observed:
    if not observed.gap.size:
        raise ValueError(
            f"{argument}={observed.name!r} has no draws, because no chain of the run stayed finite. Take a smaller "
            "step_size, or leave it out to have it chosen."
        )
    return observed


def from_devinterp(path: str | os.PathLike, num_data: int) -> dict[str, Observed]:
    """What devinterp 2 observed at its draws, from the zarr group that its ``sample(output_path=...)`` wrote.

    The losses stay on disk and are read when they are needed. The losses at w* of single tokens are not stored there,
    so that ``center`` is NaN. Tokens whose loss is NaN do not count.

    Args:
        path: of the group. num_data: number of training texts (n_beta is nbeta, as here).

    Returns:
        An ``Observed`` of level "token" for each data set, by its name. They can be given to ``influence`` and
        ``generalization`` in the place of names, with None as the result.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is something else.
    """
    found = {}
    for stored in read_losses(path):
        finite = np.isfinite(np.asarray(stored.losses[0, 0]))
        found[stored.name] = Observed(
            name=stored.name,
            level="token",
            values=stored.losses,
            moments=None,
            center=np.full(stored.losses.shape[2:], np.float32(math.nan)),
            valid=None if finite.all() else finite,
            gap=stored.gap,
            nbeta=stored.nbeta,
            num_data=num_data,
            localization=stored.localization,
        )
    return found


def _identifier(name: str) -> str:
    """The name with "_" for all that is neither a letter nor a digit, as devinterp has it."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return f"_{plain}" if plain[:1].isdigit() or not plain else plain
