"""Tensors in safetensors files as a decoder's arrays, without a second copy of them on the host.

A parameter's array is filled piece by piece; a piece is at most ``PIECE_BYTES``, or one layer's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from slt_jax.models.config import DecoderConfig
from slt_jax.models.layouts import Layout, Source
from slt_jax.models.tensors import Tensor

PIECE_BYTES = 32 * 2**20
_FLOATS = ("F16", "BF16", "F32", "F64")
# A parameter's axes in its array, after the layer axis of a block's.
_AXES = {
    "embedding/tokens": "vocab width", "embedding/positions": "context width", "head": "vocab width",
    "blocks/attention/q": "width heads head_width", "blocks/attention/q_bias": "heads head_width",
    "blocks/attention/k": "width kv_heads head_width", "blocks/attention/k_bias": "kv_heads head_width",
    "blocks/attention/v": "width kv_heads head_width", "blocks/attention/v_bias": "kv_heads head_width",
    "blocks/attention/o": "heads head_width width", "blocks/attention/q_norm/scale": "head_width",
    "blocks/attention/k_norm/scale": "head_width", "blocks/mlp/up": "width mlp", "blocks/mlp/up_bias": "mlp",
    "blocks/mlp/gate": "width mlp", "blocks/mlp/gate_bias": "mlp", "blocks/mlp/down": "mlp width",
}  # fmt: skip


class Plan(NamedTuple):
    """Where each parameter of a decoder comes from: for each, its source and the tensors, one for each layer."""

    sizes: dict[str, int]
    parameters: dict[str, tuple[Source, list[Tensor]]]

    def axes(self, path: str) -> list[str]:
        """Names of the array's axes."""
        layer = ["layer"] if path.startswith("blocks/") else []
        return layer + _AXES.get(path, "width").split()

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in self.axes(path))

    def sharding(self, path: str, mesh: Mesh | None) -> Sharding:
        """Without a mesh this process's first device; else cut over ``model`` along the first axis that it divides."""
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        axes = self.axes(path)
        wide = ("vocab", "heads", "kv_heads", "mlp") + (("width",) if set(axes) - {"layer", "width"} else ())
        parts = mesh.shape.get("model", 1)
        cut = next((axis for axis in wide if axis in axes and parts > 1 and self.sizes[axis] % parts == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("model" if axis == cut else None for axis in axes)))

    def array(self, path: str, mesh: Mesh | None) -> jax.Array:
        """The parameter in float32; each device's part is read by itself."""
        shape = self.shape(path)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            whole = (slice(None),) * len(shape)
            cuts = (slice(*cut.indices(size)[:2]) for cut, size in zip(index or whole, shape, strict=True))
            return self._filled(path, dict(zip(self.axes(path), cuts, strict=True)))

        return jax.make_array_from_callback(shape, self.sharding(path, mesh), part)

    def _filled(self, path: str, cuts: dict[str, slice]) -> np.ndarray:
        (source, tensors), axes = self.parameters[path], self.axes(path)
        out = _aligned(tuple(cuts[axis].stop - cuts[axis].start for axis in axes))
        if "layer" not in cuts:
            for rows, piece in _pieces(source, tensors[0], axes, cuts, self.sizes):
                out[rows] = piece
            return out
        for layer, tensor in enumerate(tensors[cuts["layer"]]):
            for rows, piece in _pieces(source, tensor, axes[1:], cuts, self.sizes):
                out[layer, rows] = piece
        return out


def make_plan(config: DecoderConfig, layout: Layout, paths: list[str], tensors: dict[str, Tensor], where: str) -> Plan:
    """Match the parameters ``paths`` of the decoder with the checkpoint's tensors, one to one.

    Raises:
        ValueError: naming the tensors that are missing, unknown, of another shape or type, or an output head that is
            told to be the embedding and is not.
    """
    sizes = {
        "vocab": config.vocab_size, "context": config.context_length, "width": config.width, "layer": config.num_layers,
        "heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_width": config.head_width,
        "mlp": config.mlp_width,
    }  # fmt: skip
    named = _without_prefix(tensors, layout.prefix, where)
    heads = [name for name in layout.head_names if name in named]
    plan, missing = Plan(sizes, {}), []
    for path in paths:
        source = layout.sources[path]
        if path == "head" and heads:
            source = source._replace(name=heads[0])
        names = [source.name.format(i) for i in range(config.num_layers if path.startswith("blocks/") else 1)]
        missing += [name for name in names if name not in named]
        plan.parameters[path] = (source, [named[name] for name in names if name in named])
    _refuse_names(f"{where}: tensors missing", missing)
    used = {tensor.name for _, own in plan.parameters.values() for tensor in own}
    spare = {name: tensor for name, tensor in named.items() if tensor.name not in used}
    unknown = [t.name for name, t in spare.items() if name not in heads and not layout.is_buffer(name)]
    _refuse_names(f"{where}: tensors that config.json leaves no place for", unknown)
    for source, own in plan.parameters.values():
        for tensor in own:
            _check_tensor(tensor, source, sizes)
    reference = "embedding/tokens" if config.tied_head else "head"
    for name in heads:
        if name in spare:
            _check_equal(named[name], plan.parameters[reference][1][0])
    return plan


def _without_prefix(tensors: dict[str, Tensor], prefix: str, where: str) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in named:
            raise ValueError(f"{where}: '{named[short].name}' and '{name}' are one tensor with two names.")
        named[short] = tensor
    return named


def _refuse_names(sentence: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{sentence}: {', '.join(names[:4])}{more}.")


def _groups(source: Source) -> list[list[str]]:
    """``width (3 heads head_width)`` -> [["width"], ["3", "heads", "head_width"]]."""
    groups, inside = [], False
    for word in source.axes.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            groups += [[]] if inside else []
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _size(axis: str, sizes: dict[str, int]) -> int:
    return int(axis) if axis.isdigit() else sizes[axis]


def _check_tensor(tensor: Tensor, source: Source, sizes: dict[str, int]) -> None:
    shape = tuple(math.prod(_size(axis, sizes) for axis in group) for group in _groups(source))
    if tensor.shape != shape:
        raise ValueError(f"{tensor.file}: '{tensor.name}' has shape {tensor.shape}; config.json asks for {shape}.")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{tensor.file}: '{tensor.name}' is of type {tensor.dtype}; known are {', '.join(_FLOATS)}.")


def _check_equal(head: Tensor, reference: Tensor) -> None:
    sentence = f"{head.file}: '{head.name}' should repeat '{reference.name}'"
    if head.shape != reference.shape:
        raise ValueError(f"{sentence}, and has shape {head.shape}, not {reference.shape}.")
    for rows in _row_cuts(slice(0, head.shape[0]), head):
        if not np.array_equal(head.read(rows), reference.read(rows)):
            raise ValueError(f"{sentence} (config.json ties them), and differs in rows {rows.start} to {rows.stop}.")


def _row_cuts(rows: slice, tensor: Tensor) -> Iterator[slice]:
    step = max(1, PIECE_BYTES // (8 * math.prod(tensor.shape[1:])))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _pieces(
    source: Source, tensor: Tensor, axes: list[str], cuts: dict[str, slice], sizes: dict[str, int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """The part ``cuts`` of a parameter in pieces: (rows of its own first axis, the values)."""
    first = axes[0]
    if _groups(source)[0] != [first]:
        yield slice(None), _piece(source, tensor, axes, cuts, sizes)
        return
    begin = cuts[first].start
    for rows in _row_cuts(cuts[first], tensor):
        yield slice(rows.start - begin, rows.stop - begin), _piece(source, tensor, axes, {**cuts, first: rows}, sizes)


def _piece(
    source: Source, tensor: Tensor, axes: list[str], cuts: dict[str, slice], sizes: dict[str, int]
) -> np.ndarray:
    """Read the part ``cuts`` from the file, and turn it into the order ``axes``."""
    ranges, shape, inner, names = [], [], [], []
    for group in _groups(source):
        start, stop, whole = 0, math.prod(_size(axis, sizes) for axis in group), False
        for axis in group:
            size = _size(axis, sizes)
            cut = slice(source.part, source.part + 1) if axis.isdigit() else cuts[axis]
            if whole:  # not contiguous any more: read all of the axis, and cut afterwards
                shape.append(size)
                inner.append(cut)
            else:
                step = (stop - start) // size
                start, stop = start + cut.start * step, start + cut.stop * step
                shape.append(cut.stop - cut.start)
                inner.append(slice(None))
                whole = cut.stop - cut.start > 1
            names.append(axis)
        ranges.append(slice(start, stop))
    values = tensor.read(*ranges).reshape(shape)[tuple(inner)]
    fused = tuple(i for i, name in enumerate(names) if name.isdigit())
    kept = [name for name in names if not name.isdigit()]
    return values.squeeze(fused).transpose([kept.index(axis) for axis in axes])


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 at a multiple of 64 bytes, which a CPU device takes over without a copy."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
