"""The loss as a function of the weights that move: leaves, masks, and the loss on a batch."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, get_abstract_mesh, use_abstract_mesh
from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

from slt_jax._checks import shown
from slt_jax.kernels.langevin import Block
from slt_jax.posterior.packing import Packing
from slt_jax.posterior.tree import is_on_cpu, path_of

Mask = PyTree | Callable[[tuple[str, ...]], Any] | None
Position = tuple[Float[Array, "..."], ...]
TOKEN_LOSSES = "token_losses"  # attribute of a loss function: its per-token version
Frozen = tuple[Shaped[Array, "..."], ...]


class Leaf(NamedTuple):
    """One array of the parameters, and which of its entries move.

    ``entries``: flat indices of the entries that move, as the bytes of an int32 array; None when all of them do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    entries: bytes | None

    @property
    def free(self) -> bool:
        """Whether any entry moves."""
        return self.entries != b""

    @property
    def partial(self) -> bool:
        """Whether some entries move and others do not."""
        return bool(self.entries)

    @property
    def indices(self) -> Int32[np.ndarray, " entry"]:
        """Flat indices of the entries that move, of a partial leaf."""
        return np.frombuffer(self.entries or b"", np.int32)


@dataclass(frozen=True)
class LossProgram:
    """The loss as a function of the free weights: the part of a posterior that a compiled program depends on.

    It is hashable and contains no arrays. ``packing``: how small arrays lie side by side in the positions that it
    takes; ``split`` does not pack. ``mesh``: over whose axis ``model`` the weights are split, which a decoder's pass is
    then laid out by; None where they are not.
    """

    loss_fn: Callable[[PyTree, PyTree], Array]
    treedef: Any
    leaves: tuple[Leaf, ...]
    forward_dtype: np.dtype | None
    packing: Packing | None = None
    mesh: AbstractMesh | None = None

    @property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """What ``samplers.gaussian`` needs to know of the packing."""
        return () if self.packing is None else self.packing.blocks

    def on_mesh(self, mesh: AbstractMesh | None) -> "LossProgram":
        """The same for weights on this mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def split(self, params: PyTree) -> tuple[Position, Frozen]:
        """``params`` as (position, frozen): the free weights in float32 at least, and everything else.

        A partial leaf is in both: its free entries as a vector in ``position``, the complete leaf in ``frozen``.
        """
        position, frozen = [], []
        for leaf, value in zip(self.leaves, jax.tree.leaves(params), strict=True):
            if not leaf.free:
                frozen.append(jnp.asarray(value))
                continue
            master = jnp.asarray(value, jnp.promote_types(leaf.dtype, jnp.float32))
            if leaf.partial:
                frozen.append(master)
                master = master.reshape(-1)[leaf.indices]
            position.append(master)
        return tuple(position), tuple(frozen)

    def split_shapes(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """``split`` of arrays or shapes as shapes; each has the sharding of its array."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        position, frozen = jax.eval_shape(self.split, shapes)
        free, rest = iter(position), iter(frozen)
        of_free, of_rest = [], []
        for leaf, value in zip(self.leaves, jax.tree.leaves(params), strict=True):
            sharding = getattr(value, "sharding", None)
            if leaf.free:
                of_free.append(_with_sharding(next(free), None if leaf.partial else sharding))
            if leaf.partial or not leaf.free:
                of_rest.append(_with_sharding(next(rest), sharding))
        return tuple(of_free), tuple(of_rest)

    def merge(self, position: Position, frozen: Frozen) -> PyTree:
        """The complete parameters, in the types that ``loss_fn`` sees: the inverse of ``split``."""
        position = position if self.packing is None else self.packing.unpack(position)
        free, rest, values = iter(position), iter(frozen), []
        for leaf in self.leaves:
            value = next(free) if leaf.free and not leaf.partial else next(rest)
            if leaf.partial:
                value = value.reshape(-1).at[leaf.indices].set(next(free), unique_indices=True).reshape(leaf.shape)
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            values.append(value.astype(self.forward_dtype or leaf.dtype) if floating else value)
        return jax.tree.unflatten(self.treedef, values)

    def losses(
        self, position: Position, frozen: Frozen, batch: PyTree
    ) -> Float[Array, " batch_size"] | Float[Array, ""]:
        """Per-example losses or their mean, whichever ``loss_fn`` returns, in float32 at least.

        Raises:
            ValueError: ``loss_fn`` returned another shape.
            TypeError: it returned something that is not floating-point.
            Whatever ``loss_fn`` raises, with the shapes of the batch before its message.
        """
        params = self.merge(position, frozen)
        try:
            with self._laid_out():
                value = self.loss_fn(params, batch)
        except Exception as error:
            say_where(error, batch)
            raise
        size = jax.tree.leaves(batch)[0].shape[0]
        shape = getattr(value, "shape", None)
        if isinstance(value, tuple | list | dict):
            raise ValueError(
                f"loss_fn must return the losses alone, one per example or their mean; it returned a "
                f"{type(value).__name__} of {len(value)}. Leave out metrics: lambda p, batch: loss_fn(p, batch)[0]."
            )
        if shape not in ((), (size,)):
            returned = f"shape {shape}" if shape is not None else f"a {type(value).__name__}"
            raise ValueError(
                f"loss_fn must return one loss per example, shape ({size},) for this batch, or a scalar; "
                f"it returned {returned}. "
                f"Reduce over every other axis (a sum over outputs, a mean over tokens) inside loss_fn."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"loss_fn must return floating-point losses, it returned {value.dtype}.")
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    def _laid_out(self) -> contextlib.AbstractContextManager:
        """In the engine's steps the mesh is known already, with the axis ``chain`` taken apart."""
        known = self.mesh is None or not get_abstract_mesh().empty
        return contextlib.nullcontext() if self.mesh is None or known else use_abstract_mesh(self.mesh)

    def mean_loss(self, position: Position, frozen: Frozen, batch: PyTree) -> Float[Array, ""]:
        """L_m(w), the mean over the batch."""
        return jnp.mean(self.losses(position, frozen, batch))


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def say_where(error: Exception, batch: PyTree, what: str = "loss_fn") -> None:
    """Put what was being done before the message of an error in the caller's function, whose type stays."""
    flat = jax.tree_util.tree_flatten_with_path(batch)[0]
    shapes = [f"{_named(path)} {x.shape}".strip() + f" of {x.dtype}" for path, x in flat]
    some = ", ".join(shapes[:6]) + (f" and {len(shapes) - 6} more" if len(shapes) > 6 else "")
    say_first(error, f"{what} raised this when it was called with the weights and a batch of {some}")


def _named(path: tuple) -> str:
    """Of a leaf in words: its keys, or the number of an entry of a tuple."""
    keys = path_of(path)
    return f"entry {keys[0]}" if len(keys) == 1 and str(keys[0]).isdigit() else "/".join(map(str, keys))


def say_first(error: Exception, text: str) -> None:
    """Put ``text`` and a colon before the message of an error; a note where it has no message of its own."""
    if len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{text}: {error.args[0]}",)
    else:
        error.add_note(f"{text}.")


def can_be_lowered(program: Any, *arguments: Any) -> bool:
    """Whether a jitted program can be lowered for these arguments.

    A loss with a custom derivative may have no second derivative. JAX finds out only while lowering, and raises one of
    several exceptions.
    """
    try:
        program.lower(*arguments)
    except Exception:  # if the loss itself is wrong, the run raises that
        return False
    return True


def check_forward(dtype: Any) -> np.dtype | None:
    """``forward_dtype`` as a floating-point dtype or None. Raises TypeError."""
    if dtype is None:
        return None
    try:
        forward = jnp.dtype(dtype)
    except TypeError:
        forward = None
    if forward is None or not jnp.issubdtype(forward, jnp.floating):
        raise TypeError(
            f"forward_dtype must be a floating-point type, got {shown(dtype)}. jnp.bfloat16 is the usual choice."
        )
    return forward


def names_of(leaves: list[Leaf]) -> str:
    """Names of the leaves for a message, the first six."""
    names = [leaf.name or "(root)" for leaf in leaves]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def leaf_masks(mask: Mask, flat: list[tuple[Any, Any]], treedef: Any) -> list[Any]:
    """What the mask says of each leaf, in the order of ``flat``. Raises ValueError for another tree structure."""
    if mask is None:
        return [True] * len(flat)
    if callable(mask) and jax.tree.structure(mask) == jax.tree.structure(0):  # a model of booleans may be callable
        return [_called(mask, path_of(path)) for path, _ in flat]
    structure = jax.tree.structure(mask)
    if structure != treedef:
        raise ValueError(
            f"the mask does not match center: it has structure {structure}, center has {treedef}. "
            "Give one boolean (or boolean array) for each leaf, or a function of the leaf's path."
        )
    return jax.tree.leaves(mask)


def _called(mask: Callable[[tuple[str, ...]], Any], path: tuple[str, ...]) -> Any:
    """What the mask's function says of a path. Raises TypeError where it cannot be called with one."""
    try:
        return mask(path)
    except Exception as error:
        raise TypeError(
            f"the function given as mask failed for the path {path} with {type(error).__name__}: {error}. It is called "
            "with the path of each array, a tuple of strings of any length, and returns True or False."
        ) from error


def check_leaf(name: str, value: Any, mask: Any) -> Leaf:
    """The leaf ``value`` with the entries that ``mask`` leaves free. Raises TypeError or ValueError."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"parameter '{name}' is {brief(value)}, not an array. Wrap a number in jnp.asarray.")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"parameter '{name}' is a masked array. Give a plain one: value.filled(0).")
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    # Without x64 a NumPy float64 leaf becomes float32 on the device.
    dtype = jax.dtypes.canonicalize_dtype(value.dtype) if floating else value.dtype
    leaf = Leaf(name, tuple(value.shape), dtype, _entries(name, tuple(value.shape), mask))
    if not floating:
        if leaf.free:
            raise TypeError(
                f"parameter '{name}' has type {value.dtype}; only floating-point weights can be sampled. "
                "Freeze it with a mask, or keep it out of center."
            )
        return leaf
    bad = 0 if isinstance(value, jax.ShapeDtypeStruct) else _count_not_finite(value, dtype)
    if bad:
        raise ValueError(
            f"parameter '{name}' has {bad} entries of {value.size} that are NaN or infinite; center must be finite."
        )
    return leaf


def _count_not_finite(value: Any, dtype: Any) -> int:
    """Entries that are NaN or infinite as ``dtype``."""
    on_host = not isinstance(value, jax.Array) or (value.is_fully_addressable and is_on_cpu(value))
    if on_host:  # without a program to compile for each shape
        with np.errstate(over="ignore"):
            host = np.asarray(value).astype(dtype, copy=False)
        return host.size - int(np.count_nonzero(np.isfinite(host)))
    return int(_counted_there(value))


@jax.jit
def _counted_there(value: Float[Array, "..."]) -> Int[Array, ""]:
    return value.size - jnp.count_nonzero(jnp.isfinite(value))


def _entries(name: str, shape: tuple[int, ...], mask: Any) -> bytes | None:
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"the mask for '{name}' must be boolean, got {brief(mask)}. Give True, False or such an array.")
    if array.ndim and array.shape != shape:
        raise ValueError(
            f"the mask for '{name}' has shape {array.shape}, the parameter has {shape}. "
            "Give an array of that shape, or one boolean."
        )
    if not math.prod(shape):
        return b""  # no entries: nothing in it moves
    if array.all():
        return None
    if not array.ndim:
        return b""
    return np.flatnonzero(array).astype(np.int32).tobytes()


def brief(value: Any) -> str:
    """A value and its type for a message."""
    return f"{str(value)[:60]!r} of type {type(value).__name__}"
