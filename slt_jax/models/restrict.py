"""Posteriors restricted to a named part of a decoder: its weights move, all others are frozen (weight-refined LLCs).

Names: ``layer 3``, ``layer 3 head 5``, ``attention``, ``layer 3 mlp``, ``embedding``, ``unembedding``, ``norms``, or
several of them with commas. Of a PyTorch model, the parts are named by its modules: ``transformer.h.3.attn``,
``transformer.h.*.attn``. All restrictions of one shape, such as every head of a model, share one compiled program:
the chosen slices are an argument of the loss, and so are their indices.

A head consists of its queries, keys, values and its part of the output matrix, with the biases that belong to it alone.
Under grouped-query attention the heads of a group share keys and values: each head includes them, and a union of such
heads includes them once.
"""

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.outputs import OutputLoss, parts_of
from slt_jax.posterior.program import TOKEN_LOSSES
from slt_jax.posterior.tree import path_of

Path = tuple[str, ...]
_TERM = re.compile(
    r"(?:layer (?P<layer>\d+))?\s*(?:head (?P<head>\d+)|(?P<part>attention|mlp|norms|embedding|unembedding))?"
)
_HEAD_AXIS = {"q": 2, "k": 2, "v": 2, "o": 1, "q_bias": 1, "k_bias": 1, "v_bias": 1}
EXAMPLES = "'layer 3', 'layer 3 head 5', 'attention', 'layer 3 mlp', 'embedding', or several with commas"


class Where(NamedTuple):
    """The chosen part of one leaf: the whole leaf, or slices. ``layers`` and ``heads`` are sorted and unique."""

    whole: bool = False
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()  # (layer, head)


class Shape(NamedTuple):
    """What a compiled program depends on: the leaf that is sliced and the kind of slices, but not their indices."""

    path: Path
    kind: str  # whole, layers, heads
    axis: int  # of the heads


def restricted(posterior: LocalPosterior, name: str) -> LocalPosterior:
    """The same posterior with only the named weights free.

    Args:
        posterior: its ``center`` is the parameters of a ``slt_jax.models.Decoder``, or nested dicts by module name, as
            ``from_torch`` makes; it has no mask.
        name: a part of the decoder, or several with commas, e.g. ``"layer 3 head 5"``; see the module.

    Raises:
        ValueError: an unknown name; a layer, head or part that this decoder does not have; or a posterior with a mask.
    """
    if posterior.mask is not None:
        raise ValueError("the posterior has a mask already. Restrict it by name or by mask, not both.")
    chosen = choose(posterior.center, name)
    shapes, parts, indices = [], [], []
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(posterior.center)}
    for path, where in chosen.items():
        axis = _HEAD_AXIS.get(path[-1], 0)
        for kind, index in _indices(where):
            shapes.append(Shape(path, kind, axis))
            indices.append(index)
            parts.append(_take(leaves[path], kind, axis, index))
    loss_fn = OfPart(posterior.loss_fn, tuple(shapes))
    center = {"part": parts, "at": indices, "rest": posterior.center}
    return replace(posterior, loss_fn=loss_fn, center=center, mask=lambda path: path[0] == "part")


def head_names(params: PyTree) -> list[str]:
    """``layer L head H`` for every head of the decoder, layer by layer."""
    shapes = _paths(params)
    if not _is_decoder(shapes):
        raise ValueError(f"heads by name {_NEEDS_DECODER}; got {_some(shapes)}. Name modules with --only instead.")
    layers, heads, _ = _sizes(shapes)
    return [f"layer {layer} head {head}" for layer in range(layers) for head in range(heads)]


def shared_heads(params: PyTree) -> int:
    """How many heads of a decoder use the same keys and values; 1 where each has its own."""
    return _sizes(_paths(params))[2]


def part_names(params: PyTree, kind: str) -> list[str]:
    """Names of the parts of a decoder.

    Args:
        kind: ``"heads"``: every head; ``"layers"``: every layer; ``"all"``: the embedding, of each layer its heads and
            its MLP, and the unembedding if it has weights of its own.

    Raises:
        ValueError: another kind, or no decoder.
    """
    heads, shapes = head_names(params), _paths(params)
    layers = range(_sizes(shapes)[0])
    if kind == "heads":
        return heads
    if kind == "layers":
        return [f"layer {layer}" for layer in layers]
    if kind != "all":
        raise ValueError(f"kind must be 'heads', 'layers' or 'all', got {kind!r}. Other parts go by their names.")
    inner = [[*(name for name in heads if name.startswith(f"layer {k} ")), f"layer {k} mlp"] for k in layers]
    last = ["unembedding"] if any(_covers(path, "unembedding", False) for path in shapes) else []
    return ["embedding", *(name for names in inner for name in names), *last]


def choose(params: PyTree, name: str) -> dict[Path, Where]:
    """The chosen part of each leaf that ``name`` covers, by path.

    Raises:
        ValueError: an unknown name, or a layer, head or part that this decoder does not have.
    """
    shapes = _paths(params)
    of_term = _term if _is_decoder(shapes) else _module
    chosen: dict[Path, list[Where]] = {}
    for term in name.split(","):
        for path, where in of_term(shapes, term.strip()).items():
            chosen.setdefault(path, []).append(where)
    return {path: _union(chosen[path]) for path in shapes if path in chosen}


_NEEDS_DECODER = "need a decoder's parameters, with blocks/attention/q"


def _paths(params: PyTree) -> dict[Path, tuple[int, ...]]:
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _is_decoder(shapes: dict[Path, tuple[int, ...]]) -> bool:
    return ("blocks", "attention", "q") in shapes


def _some(shapes: dict[Path, tuple[int, ...]], sign: str = "/") -> str:
    return ", ".join(sign.join(path) for path in list(shapes)[:4]) + ", ..."


def _module(shapes: dict[Path, tuple[int, ...]], term: str) -> dict[Path, Where]:
    """The parameters of a module, or of all that a pattern matches."""
    parts = {path: [".".join(path[:length]) for length in range(1, len(path) + 1)] for path in shapes}
    chosen = [path for path, names in parts.items() if fnmatch.filter(names, term)]
    if not chosen:
        raise ValueError(
            f"no module is called {term!r}, and parts like 'layer 0' {_NEEDS_DECODER}; got {_some(shapes, '.')} Give "
            "LocalPosterior a mask, or name modules: 'transformer.h.0', 'transformer.h.*.attn'."
        )
    return {path: Where(whole=True) for path in chosen}


def _sizes(shapes: dict[Path, tuple[int, ...]]) -> tuple[int, int, int]:
    """(layers, heads, heads that share one key and value)."""
    layers, _, heads, _ = shapes["blocks", "attention", "q"]
    return layers, heads, heads // shapes["blocks", "attention", "k"][2]


def _term(shapes: dict[Path, tuple[int, ...]], term: str) -> dict[Path, Where]:
    match = _TERM.fullmatch(term)
    if not match or not term:
        raise ValueError(f"no part of a decoder is called {term!r}. Names are {EXAMPLES}.")
    layer, head, part = match["layer"], match["head"], match["part"]
    layers, heads, shared = _sizes(shapes)
    if layer is not None and int(layer) >= layers:
        raise ValueError(f"{term!r}: this decoder has layers 0 to {layers - 1}.")
    if head is not None:
        if layer is None:
            raise ValueError(f"{term!r} needs a layer: 'layer 0 {term}'.")
        if int(head) >= heads:
            raise ValueError(f"{term!r}: each layer has heads 0 to {heads - 1}.")
        index = {name: int(head) // (shared if name[0] in "kv" else 1) for name in _HEAD_AXIS}
        paths = {name: ("blocks", "attention", name) for name in _HEAD_AXIS}
        return {p: Where(heads=((int(layer), index[name]),)) for name, p in paths.items() if p in shapes}
    if layer is not None and part in ("embedding", "unembedding"):
        raise ValueError(f"{term!r}: the {part} belongs to no layer. Write {part!r}.")
    paths = [path for path in shapes if _covers(path, part, layer is not None)]
    if not paths:
        reason = "norms have no weights" if part == "norms" else "unembedding is tied to the embedding"
        raise ValueError(f"{term!r}: this decoder's {reason}.")
    return {path: Where(whole=True) if layer is None else Where(layers=(int(layer),)) for path in paths}


def _covers(path: Path, part: str | None, one_layer: bool) -> bool:
    if part is None:
        return path[0] == "blocks"
    if part == "norms":
        return any("norm" in step for step in path) and (path[0] == "blocks" or not one_layer)
    if part == "unembedding":
        return path[0] in ("head", "head_bias")
    return path[0] == "embedding" if part == "embedding" else path[:2] == ("blocks", part)


def _union(parts: list[Where]) -> Where:
    """The union of parts of one leaf. The whole leaf contains its layers, and a layer its heads."""
    if any(where.whole for where in parts):
        return Where(whole=True)
    layers = sorted({layer for where in parts for layer in where.layers})
    heads = sorted({pair for where in parts for pair in where.heads if pair[0] not in layers})
    return Where(False, tuple(layers), tuple(heads))


def _indices(where: Where) -> list[tuple[str, np.ndarray]]:
    if where.whole:
        return [("whole", np.zeros(0, np.int32))]
    by_kind = [("layers", np.asarray(where.layers, np.int32)), ("heads", np.asarray(where.heads, np.int32))]
    return [(kind, index) for kind, index in by_kind if len(index)]


def _index_expression(kind: str, axis: int, index: Any) -> Any:
    """What goes between the brackets of an array for the layers or (layer, head) pairs ``index``."""
    if kind == "layers":
        return index
    layer, head = index[:, 0], index[:, 1]
    return (layer, head) if axis == 1 else (layer, slice(None), head)


def _take(leaf: Array, kind: str, axis: int, index: np.ndarray) -> Array:
    if kind == "whole":
        return leaf
    take = lambda x: x[_index_expression(kind, axis, index)]  # noqa: E731
    return jax.eval_shape(take, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else take(jnp.asarray(leaf))


@dataclass(frozen=True)
class OfPart:
    """A function of the complete parameters and a batch as one of a restriction's parameters.

    Equal for all restrictions of these shapes, so that they compile once.
    """

    fn: Callable[[PyTree, PyTree], Any]
    shapes: tuple[Shape, ...]

    def __call__(self, params: dict[str, Any], batch: PyTree) -> Any:
        chosen: dict[Path, list[tuple[Shape, Array, Array]]] = {}
        for shape, part, index in zip(self.shapes, params["part"], params["at"], strict=True):
            chosen.setdefault(shape.path, []).append((shape, part, index))

        def with_parts(path: tuple[Any, ...], leaf: Array) -> Array:
            for (_, kind, axis), part, index in chosen.get(path_of(path), []):
                if kind == "whole":
                    leaf = part
                else:
                    leaf = leaf.at[_index_expression(kind, axis, index)].set(part, unique_indices=True)
            return leaf

        return self.fn(jax.tree_util.tree_map_with_path(with_parts, params["rest"]), batch)

    @property
    def token_losses(self) -> "OfPart | None":
        """The per-token version of a loss, if it has one (see ``posterior.program.TOKEN_LOSSES``)."""
        by_token = getattr(self.fn, TOKEN_LOSSES, None)
        return None if by_token is None else OfPart(by_token, self.shapes)

    @property
    def outputs_and_loss(self) -> OutputLoss | None:
        """The two parts of a loss, if it has them (see ``posterior.outputs.OUTPUTS``)."""
        parts = parts_of(self.fn)
        return None if parts is None else OutputLoss(OfPart(parts.outputs, self.shapes), parts.loss)
