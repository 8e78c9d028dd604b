"""What is sampled: a trained point, the loss around it, and the weights that may move."""

import copy
import hashlib
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PyTree = Any
Mask = PyTree | Callable[[tuple[str, ...]], Any] | None


class _Leaf(NamedTuple):
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


def check_positive(name: str, value: Any, remedy: str, *, zero: bool = False) -> None:
    """Raise unless ``value`` is a finite real number above zero (or, with ``zero``, at least zero)."""
    allowed = f"{name} must be a finite number {'>=' if zero else '>'} 0, got {value!r}. {remedy}"
    kind = getattr(value, "dtype", type(value))
    scalar = isinstance(value, numbers.Real) or (hasattr(value, "dtype") and np.ndim(value) == 0)
    if not scalar or kind in (bool, np.bool_) or not (isinstance(value, numbers.Real) or _is_real(kind)):
        raise TypeError(allowed)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(allowed) from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(allowed)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_count(name: str, value: Any, least: int, remedy: str = "") -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    sentence = f"{name} must be a whole number >= {least}, got {value!r}. {remedy}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(sentence)
    if value < least:
        raise ValueError(sentence)


def can_be_lowered(program: Any, *given: Any) -> bool:
    """Whether a jitted program can be: a custom derivative is refused no sooner, and by one of several exceptions."""
    try:
        program.lower(*given)
    except Exception:  # the run itself says what else is wrong with a loss
        return False
    return True


def path_of(key_path: tuple) -> tuple[str, ...]:
    """A pytree key path as plain strings, e.g. ``("blocks", "0", "attention", "kernel")``."""
    return tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)


@dataclass(frozen=True)
class LossProgram:
    """The loss as a function of the free weights: what a compiled program depends on. Hashable, holds no arrays."""

    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    treedef: Any
    leaves: tuple[_Leaf, ...]
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


@dataclass(frozen=True, eq=False)
class LocalPosterior:
    """The local tempered posterior around trained weights.

    Target density, over the weights that the mask leaves free::

        p(w) proportional to exp( -nbeta L_n(w) - (localization / 2) |w - center|^2 )

    with ``L_n(w)`` the mean of ``loss_fn`` over the data set (nats per example).

    Args:
        loss_fn: ``loss_fn(params, batch)`` gives one loss per example, shape ``(m,)``, or their mean, shape ``()``.
        center: w*, the trained parameters: a pytree of floating-point arrays.
        num_data: n, the size of the data set (not of a batch).
        nbeta: n times the inverse temperature; default ``num_data / log(num_data)``.
        localization: gamma, the strength of the pull to ``center``, per squared unit of weight. Without one the
            calibration of ``estimate_llc`` chooses: so that a flat direction moves a weight by at most a few typical
            weights, and a millionth of the largest curvature of nbeta L at least.
        mask: which weights move. A pytree of booleans shaped like ``center`` (one per leaf, or a boolean array of the
            leaf's shape), or a function of a leaf's path (a tuple of strings) that returns either. Default: all.
        forward_dtype: type in which ``loss_fn`` sees the weights, e.g. ``jnp.bfloat16``. The chains' own copy (the
            master) is float32 at least. Default: each leaf's own type.

    Raises:
        TypeError, ValueError: for a hyperparameter, a leaf or a mask that cannot be sampled; the text says which.

    Source: Lau, Furman, Wang, Murfet, Wei, arXiv:2308.12108.
    """

    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    center: PyTree
    num_data: int
    nbeta: float | None = None
    localization: float | None = None
    mask: Mask = None
    forward_dtype: Any = None

    def __post_init__(self):
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn must be a function loss_fn(params, batch), got {_brief(self.loss_fn)}. "
                "It comes before center."
            )
        try:
            hash(self.loss_fn)
        except TypeError as error:
            raise TypeError(f"loss_fn must be hashable ({error}). Wrap it: lambda p, batch: f(p, batch).") from None
        check_count("num_data", self.num_data, 2, "It is the size of the data set, not of the batch.")
        if self.nbeta is None:
            object.__setattr__(self, "nbeta", self.num_data / math.log(self.num_data))
        self._check_numbers()
        self.program  # noqa: B018  (checks the center and the mask now, not at the first step)

    def with_numbers(self, *, nbeta: float, localization: float | None) -> "LocalPosterior":
        """The same with other numbers. Weights and mask are not looked at again. Raises TypeError, ValueError."""
        found = copy.copy(self)
        object.__setattr__(found, "nbeta", nbeta)
        object.__setattr__(found, "localization", localization)
        found._check_numbers()
        return found

    def _check_numbers(self) -> None:
        check_positive(
            "nbeta", self.nbeta, "The usual choice is num_data / log(num_data), with num_data the size of the data set."
        )
        if self.localization is not None:
            check_positive(
                "localization", self.localization, "It is gamma in (gamma/2)|w - w*|^2; 1 to 300 are common values."
            )
        for name, kind in {"num_data": int, "nbeta": float, "localization": float}.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    @cached_property
    def program(self) -> LossProgram:
        """The loss as a function of the free weights, without the weights."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(self.center)
        if not flat:
            raise ValueError("center has no arrays. Pass the trained parameters as a pytree of floating-point arrays.")
        masks = _leaf_masks(self.mask, flat, treedef)
        leaves = [_check_leaf("/".join(path_of(path)), leaf, m) for (path, leaf), m in zip(flat, masks, strict=True)]
        if not any(leaf.free for leaf in leaves):
            raise ValueError(
                f"the mask leaves no weight free: all {len(leaves)} leaves are frozen. "
                f"Check the mask against {_names(leaves)}."
            )
        if self.mask is not None and all(leaf.free and not leaf.cut for leaf in leaves):
            raise ValueError(
                f"the mask restricts nothing: it is true for all of {_names(leaves)}. "
                "Leave it out, or check the path it tests."
            )
        return LossProgram(self.loss_fn, treedef, tuple(leaves), _check_forward(self.forward_dtype))

    @property
    def free_names(self) -> list[str]:
        """Path of each leaf that moves, in the order of ``program.split``'s first result."""
        return [leaf.name for leaf in self.program.leaves if leaf.free]

    @property
    def num_free(self) -> int:
        """d, the number of weights that move."""
        return sum(
            leaf.indices.size if leaf.cut else math.prod(leaf.shape) for leaf in self.program.leaves if leaf.free
        )

    def log_density(self, data: PyTree) -> Callable[[tuple[jax.Array, ...]], jax.Array]:
        """Position -> -nbeta L_n(w) - (localization / 2) |w - w*|^2 over all of ``data``: for BlackJAX's algorithms.

        A position is a tuple of the free weights, as from ``program.split(center)[0]``. Raises ValueError without a
        localization.
        """
        if self.localization is None:
            raise ValueError("log_density needs a localization: give one to LocalPosterior, e.g. localization=1.0.")
        center, frozen = self.program.split(self.center)
        nbeta, localization = float(self.nbeta or 0), self.localization

        def at(position):
            away = sum(jnp.sum((w - c) ** 2) for w, c in zip(position, center, strict=True))
            return -nbeta * self.program.mean_loss(position, frozen, data) - 0.5 * localization * away

        return at

    def fingerprint(self, batch: PyTree) -> dict[str, Any]:
        """Everything of the posterior that a result depends on; ``batch`` gives shapes only."""
        position, frozen = jax.eval_shape(self.program.split, self.center)
        # With its gradient: a custom derivative is not in the forward program.
        closed = jax.make_jaxpr(jax.value_and_grad(self.program.mean_loss))(position, frozen, batch)
        program = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "0x", str(closed.jaxpr)).encode())
        _digest_constants(program, closed)
        forward = self.program.forward_dtype
        return {
            "num_data": self.num_data,
            "nbeta": self.nbeta,
            "localization": self.localization,
            "forward_dtype": None if forward is None else forward.name,
            "mask": hashlib.sha256(repr([leaf.entries for leaf in self.program.leaves]).encode()).hexdigest(),
            "center": tree_digest(self.center),
            "loss_fn": program.hexdigest(),
        }


def tree_digest(tree: PyTree) -> str:
    """SHA-256 over structure, types, shapes and bytes of a pytree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = np.asarray(leaf)
        digest.update(f"{path_of(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
    return digest.hexdigest()


def _digest_constants(digest: Any, value: Any) -> None:
    """Bytes of all arrays in a jaxpr, also inside nested jits, whose text abbreviates them."""
    if isinstance(value, ClosedJaxpr | Jaxpr):  # from JAX 0.11 on one type
        _digest_constants(digest, list(getattr(value, "consts", ())))
        for equation in value.eqns:
            _digest_constants(digest, [v.val for v in equation.invars if isinstance(v, Literal)])
            _digest_constants(digest, list(equation.params.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _digest_constants(digest, item)
    elif isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "__array__"):
        digest.update(tree_digest(value).encode())


def _brief(value: Any) -> str:
    return f"{str(value)[:60]!r} of type {type(value).__name__}"


def _check_forward(dtype: Any) -> Any:
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


def _names(leaves: list[_Leaf]) -> str:
    names = [leaf.name or "(root)" for leaf in leaves]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _leaf_masks(mask: Mask, flat: list, treedef) -> list:
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


def _check_leaf(name: str, value: Any, mask: Any) -> _Leaf:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"parameter '{name}' is {_brief(value)}, not an array. Wrap a number in jnp.asarray.")
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    # Without x64 a NumPy float64 leaf becomes float32 on the device.
    dtype = jax.dtypes.canonicalize_dtype(value.dtype) if floating else value.dtype
    leaf = _Leaf(name, tuple(value.shape), dtype, _entries(name, tuple(value.shape), mask))
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
        raise TypeError(
            f"the mask for '{name}' must be boolean, got {_brief(mask)}. Give True, False or such an array."
        )
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
