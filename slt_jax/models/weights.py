"""Tensors in safetensors files as a decoder's arrays, without a second copy of them in the host's memory.

The array of a parameter is filled in pieces. A piece has at most ``PIECE_BYTES``, or is the tensor of one layer.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from slt_jax.models.config import DecoderConfig
from slt_jax.models.layouts import Layout
from slt_jax.models.sources import Source
from slt_jax.models.tensors import Tensor
from slt_jax.posterior.split import split_spec

PIECE_BYTES = 32 * 2**20
_WRAPPERS = ("_orig_mod.", "module.")  # before every name: of torch.compile, and of DataParallel
_FLOATS = ("F16", "BF16", "F32", "F64")
# The axes of a parameter's array; a block's parameters have a layer axis before them.
_AXES = {
    "embedding/tokens": "vocab width", "embedding/positions": "context width", "head": "vocab width",
    "head_bias": "vocab",
    "blocks/attention/q": "width heads head_width", "blocks/attention/q_bias": "heads head_width",
    "blocks/attention/k": "width kv_heads head_width", "blocks/attention/k_bias": "kv_heads head_width",
    "blocks/attention/v": "width kv_heads head_width", "blocks/attention/v_bias": "kv_heads head_width",
    "blocks/attention/o": "heads head_width width", "blocks/attention/q_norm/scale": "q_norm",
    "blocks/attention/k_norm/scale": "k_norm", "blocks/mlp/up": "width mlp", "blocks/mlp/up_bias": "mlp",
    "blocks/mlp/gate": "width mlp", "blocks/mlp/gate_bias": "mlp", "blocks/mlp/down": "mlp width",
}  # fmt: skip


class Plan(NamedTuple):
    """The source of each parameter of a decoder, by path, and its tensors: one, or one for each layer."""

    sizes: dict[str, int]
    parameters: dict[str, tuple[Source, list[Tensor]]]

    def axes(self, path: str) -> list[str]:
        """Names of the axes of the parameter's array."""
        layer = ["layer"] if path.startswith("blocks/") else []
        return layer + _AXES.get(path, "width").split()

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of the parameter's array."""
        return tuple(self.sizes[axis] for axis in self.axes(path))

    def sharding(self, path: str, mesh: Mesh | None) -> Sharding:
        """Split over the mesh's axis ``model`` as the chains will be (``engine.mesh.split_dimension``).

        Without a mesh, everything is on the first device of this process.
        """
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(mesh, split_spec(mesh, self.shape(path)))

    def array(self, path: str, mesh: Mesh | None) -> jax.Array:
        """The parameter in float32. Each device's part is read separately."""
        shape = self.shape(path)

        def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
            everything = (slice(None),) * len(shape)
            cuts = (slice(*cut.indices(size)[:2]) for cut, size in zip(index or everything, shape, strict=True))
            return self._read(path, dict(zip(self.axes(path), cuts, strict=True)))

        return jax.make_array_from_callback(shape, self.sharding(path, mesh), read_part)

    def _read(self, path: str, cuts: dict[str, slice]) -> np.ndarray:
        """The part of a parameter with the range ``cuts[axis]`` of each axis."""
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

    Args:
        where: the checkpoint, for messages.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape or type; or an output head that differs from
            the embedding although config.json ties them. The message names the tensors.
    """
    sizes = {
        "vocab": config.vocab_size, "context": config.context_length, "width": config.width, "layer": config.num_layers,
        "heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_width": config.head_width,
        "mlp": config.mlp_width,
    }  # fmt: skip
    joint = config.joint_qk_norm
    sizes["q_norm"] = config.head_width * (config.num_heads if joint else 1)
    sizes["k_norm"] = config.head_width * (config.num_kv_heads if joint else 1)
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
    if missing and (wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None)):
        raise ValueError(
            f"{where}: every tensor's name begins with '{wrapper}', which torch puts there when a model is compiled or "
            "wrapped. Save the model inside, or remove the prefix from the names."
        )
    _refuse_names(f"{where}: tensors missing", missing)
    used = {tensor.name for _, matched in plan.parameters.values() for tensor in matched}
    unused = {name: tensor for name, tensor in named.items() if tensor.name not in used}
    unknown = [t.name for name, t in unused.items() if name not in heads and not layout.is_buffer(name)]
    _refuse_names(f"{where}: tensors that config.json leaves no place for", unknown)
    for source, matched in plan.parameters.values():
        for tensor in matched:
            _check_tensor(tensor, source, sizes)
    reference = "embedding/tokens" if config.tied_head else "head"
    for name in heads:
        if name in unused:
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


def _refuse_names(message: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{message}: {', '.join(names[:4])}{more}.")


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


def _rows(blocks: tuple[str, ...], sizes: dict[str, int]) -> int:
    """Length of blocks of a first dimension."""
    return sum(math.prod(_size(axis, sizes) for axis in block.split()) for block in blocks)


def _check_tensor(tensor: Tensor, source: Source, sizes: dict[str, int]) -> None:
    first, *others = (math.prod(_size(axis, sizes) for axis in group) for group in _groups(source))
    shape = (_rows(source.blocks, sizes) if source.blocks else first, *others)
    if tensor.shape != shape:
        raise ValueError(f"{tensor.file}: '{tensor.name}' has shape {tensor.shape}; config.json asks for {shape}.")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{tensor.file}: '{tensor.name}' is of type {tensor.dtype}; known are {', '.join(_FLOATS)}.")


def _check_equal(head: Tensor, reference: Tensor) -> None:
    message = f"{head.file}: '{head.name}' should repeat '{reference.name}'"
    if head.shape != reference.shape:
        raise ValueError(f"{message}, and has shape {head.shape}, not {reference.shape}.")
    for rows in _row_cuts(slice(0, head.shape[0]), head):
        if not np.array_equal(head.read(rows), reference.read(rows)):
            raise ValueError(f"{message} (config.json ties them), and differs in rows {rows.start} to {rows.stop}.")


def _row_cuts(rows: slice, tensor: Tensor) -> Iterator[slice]:
    step = max(1, PIECE_BYTES // (8 * math.prod(tensor.shape[1:])))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _pieces(
    source: Source, tensor: Tensor, axes: list[str], cuts: dict[str, slice], sizes: dict[str, int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """The part ``cuts`` of a parameter in pieces: (range of rows within the part, values)."""
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
    """Read the part ``cuts`` from the file, with its axes in the order ``axes``."""
    ranges, shape, inner, names = [], [], [], []
    before = _rows(source.blocks[: source.part], sizes)
    for group in _groups(source):
        start, stop, sliced = 0, math.prod(_size(axis, sizes) for axis in group), False
        for axis in group:
            size = _size(axis, sizes)
            cut = slice(source.part, source.part + 1) if axis.isdigit() else cuts[axis]
            if sliced:  # no longer contiguous: read the complete axis, and cut afterwards
                shape.append(size)
                inner.append(cut)
            else:
                step = (stop - start) // size
                start, stop = start + cut.start * step, start + cut.stop * step
                shape.append(cut.stop - cut.start)
                inner.append(slice(None))
                sliced = cut.stop - cut.start > 1
            names.append(axis)
        ranges.append(slice(start + before, stop + before))
        before = 0  # only the first dimension has blocks
    values = tensor.read(*ranges).reshape(shape)[tuple(inner)]
    fused = tuple(i for i, name in enumerate(names) if name.isdigit())
    kept = [name for name in names if not name.isdigit()]
    return values.squeeze(fused).transpose([kept.index(axis) for axis in axes])


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array at a multiple of 64 bytes, which JAX can use on a CPU without a copy."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
