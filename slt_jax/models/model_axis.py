"""A decoder whose weights are split over the mesh's axis ``model``: fully sharded data parallelism.

Every device holds its part of each large array, and computes the losses of its own examples. The scan over layers
gathers the weights of one layer at a time, and again in the backward pass; the gradients of a layer are summed and
scattered at once. Tables with a row for each token are never gathered: a device looks all tokens up in its columns of
the embedding, and computes the logits of its part of the vocabulary.

Source: Rajbhandari, Rasley, Ruwase, He, arXiv:1910.02054 (ZeRO, third stage); Shoeybi et al., arXiv:1909.08053, for
the cross-entropy over a vocabulary in parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Float32, Integer

from slt_jax.models.losses import softcapped
from slt_jax.posterior.split import split_dimension
from slt_jax.posterior.tree import path_of

AXIS = "model"
_ROWS = 256  # rows of a device whose logits are in memory together, with those of as many of each other device
Model = TypeVar("Model", bound=nnx.Module)


class Split(NamedTuple):
    """How a decoder lies on the devices of the axis, for what runs on each of them.

    ``layers``: of each array of a layer, the dimension that is split; None for one that is whole. ``tables``: whether
    the embedding and the head are split by columns. ``examples``: whether each device has its own.
    """

    layers: tuple[int | None, ...]
    tables: bool
    examples: bool

    def gathered(self, layer: Any) -> Any:
        """One layer with all its weights."""
        leaves, treedef = jax.tree.flatten(layer)
        whole = [x if cut is None else _gather(x, cut) for x, cut in zip(leaves, self.layers, strict=True)]
        return jax.tree.unflatten(treedef, whole)

    def lookup(
        self, table: Float[Array, "vocabulary columns"], tokens: Integer[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """The rows of the device's own ``tokens`` in a table of which it has some columns."""
        if not self.tables:
            return jnp.take(table, tokens, axis=0)
        if not self.examples:
            return _gather(jnp.take(table, tokens, axis=0), 2)
        columns = jnp.take(table, _gather(tokens, 0), axis=0)
        return jax.lax.all_to_all(columns, AXIS, split_axis=0, concat_axis=2, tiled=True)

    def cross_entropy(
        self, x: Float[Array, "row width"], table: Float[Array, "vocabulary columns"],
        targets: Integer[Array, " row"], bias: Float[Array, " vocabulary"] | None, softcap: float | None,
    ) -> Float32[Array, " row"]:  # fmt: skip
        """``losses.token_cross_entropy`` of the device's own rows: each device computes the logits of its part of the
        vocabulary for the rows of all, ``_ROWS`` of each at a time, and again in the backward pass.
        """
        vocabulary = _Vocabulary.of(table, bias, self.tables)
        count, rows = len(x), max(1, min(_ROWS, len(x)))

        @jax.checkpoint
        def losses(chunk: tuple[Array, Array]) -> Array:
            hidden, labels = chunk
            if not self.examples:
                return vocabulary.losses(hidden, labels, softcap)
            everyone = vocabulary.losses(_gather(hidden, 0), _gather(labels, 0), softcap)
            return jax.lax.dynamic_slice_in_dim(everyone, jax.lax.axis_index(AXIS) * rows, rows)

        x = jnp.pad(x, ((0, -count % rows), (0, 0))).reshape(-1, rows, x.shape[1])
        targets = jnp.pad(targets, (0, -count % rows)).reshape(-1, rows)
        return jax.lax.map(losses, (x, targets)).reshape(-1)[:count]


class _Vocabulary(NamedTuple):
    """A device's part of the output layer: rows of the table, from token ``first`` on, of ``size`` in all."""

    table: Float[Array, "own width"]
    bias: Float[Array, " own"] | None
    first: Array
    size: int

    @classmethod
    def of(cls, table: Array, bias: Array | None, split: bool) -> "_Vocabulary":
        """From columns of the table (or a whole one) to rows; the last device's are filled up with zeros."""
        size, devices = len(table), jax.lax.axis_size(AXIS)
        own, padding = -(-size // devices), -size % devices
        first = jax.lax.axis_index(AXIS) * own
        table = jnp.pad(table, ((0, padding), (0, 0)))
        if split:
            table = jax.lax.all_to_all(table, AXIS, split_axis=0, concat_axis=1, tiled=True)
        else:
            table = jax.lax.dynamic_slice_in_dim(table, first, own)
        if bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(jnp.pad(bias, (0, padding)), first, own)
        return cls(table, bias, first, size)

    def losses(self, hidden: Array, targets: Array, softcap: float | None) -> Array:
        """-log softmax at the targets, of the same rows on every device."""
        number = jnp.arange(len(self.table))
        logits = jnp.matmul(hidden, self.table.T, preferred_element_type=jnp.float32)
        logits = logits if self.bias is None else logits + self.bias.astype(jnp.float32)
        logits = jnp.where(self.first + number < self.size, softcapped(logits, softcap), -jnp.inf)
        top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=1)), AXIS)
        norm = top + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - top[:, None]), axis=1), AXIS))
        chosen = jnp.where(number == (targets - self.first)[:, None], logits, 0)
        return norm - jax.lax.psum(jnp.sum(chosen, axis=1), AXIS)


def over_model_axis(
    call: Callable[[Model, Split | None, Array], Array], model: Model, tokens: Integer[Array, "batch length"]
) -> Array:
    """``call(model, split, tokens)``, which returns a row for each example, with ``model`` a decoder.

    Where the program that is traced has an axis ``model``, on each of its devices, with the device's parts of the
    weights and its own examples; with all examples if there are not equally many for each. Otherwise ``split`` is None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape[AXIS] if _is_automatic(mesh, AXIS) else 1
    if parts == 1:
        return call(model, None, tokens)
    graphdef, state = nnx.split(model)
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    cuts = {path_of(path): _cut(path_of(path), x.shape, parts) for path, x in flat}
    split = Split(
        layers=tuple(None if cut is None else cut - 1 for path, cut in cuts.items() if path[0] == "blocks"),
        tables=any(cut is not None for path, cut in cuts.items() if _is_table(path)),
        examples=len(tokens) % parts == 0,
    )

    def on_device(leaves: list[Array], tokens: Array) -> Array:
        return call(nnx.merge(graphdef, treedef.unflatten(leaves)), split, tokens)

    weights = [_spec(cut) for cut in cuts.values()]
    rows = PartitionSpec(AXIS) if split.examples else PartitionSpec()
    axes = {name for name in mesh.axis_names if _is_automatic(mesh, name)}
    # check_vma would take the losses of all, of which a device returns its own, for equal ones.
    mapped = jax.shard_map(on_device, in_specs=(weights, rows), out_specs=rows, axis_names=axes, check_vma=False)
    return mapped([x for _, x in flat], tokens)


def _is_automatic(mesh: jax.sharding.AbstractMesh, axis: str) -> bool:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(axis) == AxisType.Auto


def _is_table(path: tuple[str, ...]) -> bool:
    return path[:2] == ("embedding", "tokens") or path[0] == "head"


def _cut(path: tuple[str, ...], shape: tuple[int, ...], parts: int) -> int | None:
    """The dimension of an array that stays split; the others are whole, or gathered before the scan (no large ones)."""
    cut = split_dimension(shape, parts)
    return cut if cut and (path[0] == "blocks" or _is_table(path)) else None  # 0: layers, or tokens


def _spec(cut: int | None) -> PartitionSpec:
    return PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, AXIS)


def _gather(x: Array, axis: int) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a layer stores for its backward pass, of which gathered weights would be all weights: a policy."""
    return primitive.name != "all_gather"
