"""The loss as a function of the weights that move: leaves, masks, and the loss on a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.posterior.tree import path_of

PyTree = Any
Mask = PyTree | Callable[[tuple[str, ...]], Any] | None


class Leaf(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: Any
    entries: bytes | None  # int32 flat indices of the entries that move; None when the whole leaf moves

    @property
    def free(self) -> bool:
        return self.entries != b""

    @property
    def cut(self) -> bool:
        return bool(self.entries)

    @property
    def indices(self) -> np.ndarray:
        return np.frombuffer(self.entries or b"", np.int32)


@dataclass(frozen=True)
class LossProgram:
    """The loss as a function of the free weights: what a compiled program depends on. Hashable, holds no arrays."""

    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    treedef: Any
    leaves: tuple[Leaf, ...]
    forward_dtype: Any

    def split(self, params: PyTree) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """``params`` as (position, frozen): what moves, in its master type, and what does not.

        A leaf that the mask cuts appears in both: its chosen entries as a vector in ``position``, whole in ``frozen``.
        """
        position, frozen = [], []
        for leaf, value in zip(self.leaves, jax.tree.leaves(params), strict=True):
            if not leaf.free:
                frozen.append(jnp.asarray(value))
                continue
            master = jnp.asarray(value, jnp.promote_types(leaf.dtype, jnp.float32))
            if leaf.cut:
                frozen.append(master)
                master = master.reshape(-1)[leaf.indices]
            position.append(master)
        return tuple(position), tuple(frozen)

    def merge(self, position: tuple[jax.Array, ...], frozen: tuple[jax.Array, ...]) -> PyTree:
        """The full parameters, in the types that ``loss_fn`` sees."""
        free, rest, values = iter(position), iter(frozen), []
        for leaf in self.leaves:
            value = next(free) if leaf.free and not leaf.cut else next(rest)
            if leaf.cut:
                value = value.reshape(-1).at[leaf.indices].set(next(free), unique_indices=True).reshape(leaf.shape)
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            values.append(value.astype(self.forward_dtype or leaf.dtype) if floating else value)
        return jax.tree.unflatten(self.treedef, values)

    def losses(self, position: tuple, frozen: tuple, batch: PyTree) -> jax.Array:
        """Per-example losses ``(m,)`` or their mean ``()``, in float32 at least. Raises ValueError on another shape."""
        value = self.loss_fn(self.merge(position, frozen), batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        shape = getattr(value, "shape", None)
        if shape not in ((), (size,)):
            found = f"shape {shape}" if shape is not None else f"a {type(value).__name__}"
            raise ValueError(
                f"loss_fn must return one loss per example, shape ({size},) for this batch, or a scalar; "
                f"it returned {found}. "
                f"Reduce over every other axis (a sum over outputs, a mean over tokens) inside loss_fn."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"loss_fn must return floating-point losses, it returned {value.dtype}.")
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    def mean_loss(self, position: tuple, frozen: tuple, batch: PyTree) -> jax.Array:
        """L_m(w), the mean over the batch."""
        return jnp.mean(self.losses(position, frozen, batch))


def can_be_lowered(program: Any, *given: Any) -> bool:
    """Whether a jitted program can be: a custom derivative is refused no sooner, and by one of several exceptions."""
    try:
        program.lower(*given)
    except Exception:  # the run itself says what else is wrong with a loss
        return False
    return True


def check_forward(dtype: Any) -> Any:
    """``forward_dtype`` as a floating-point dtype or None. Raises TypeError."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"forward_dtype must be a floating-point type, got {dtype!r}. jnp.bfloat16 is the usual choice."
        )
    return found


def names_of(leaves: list[Leaf]) -> str:
    names = [leaf.name or "(root)" for leaf in leaves]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def leaf_masks(mask: Mask, flat: list, treedef: Any) -> list:
    if mask is None:
        return [True] * len(flat)
    if callable(mask):
        return [mask(path_of(path)) for path, _ in flat]
    found = jax.tree.structure(mask)
    if found != treedef:
        raise ValueError(
            f"the mask does not match center: it has structure {found}, center has {treedef}. "
            "Give one boolean (or boolean array) for each leaf, or a function of the leaf's path."
        )
    return jax.tree.leaves(mask)


def check_leaf(name: str, value: Any, mask: Any) -> Leaf:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"parameter '{name}' is {brief(value)}, not an array. Wrap a number in jnp.asarray.")
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
    bad = int(_not_finite(value))
    if bad:
        raise ValueError(
            f"parameter '{name}' has {bad} entries of {value.size} that are NaN or infinite; center must be finite."
        )
    return leaf


@jax.jit
def _not_finite(value: jax.Array) -> jax.Array:
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
    if array.all():
        return None
    if not array.ndim:
        return b""
    return np.flatnonzero(array).astype(np.int32).tobytes()


def brief(value: Any) -> str:
    return f"{str(value)[:60]!r} of type {type(value).__name__}"
