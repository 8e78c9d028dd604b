"""Checks of arguments, shared by all modules."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_not_traced(caller: str, *values: Any) -> None:
    """Raise TypeError inside ``jax.jit``, and where ``vmap`` or ``grad`` trace a leaf of ``values``."""
    inside = isinstance(jnp.zeros(()), Tracer)
    if inside or any(isinstance(leaf, Tracer) for value in values for leaf in _leaves(value)):
        raise TypeError(
            f"{caller} runs programs of its own and cannot be called inside jax.jit, vmap or grad. Call it outside, "
            "on arrays and not on what these trace."
        )


def _leaves(value: Any) -> list:
    try:
        return jax.tree.leaves(value)
    except (TypeError, ValueError):  # no pytree, for instance a dict whose keys cannot be sorted
        return []


def shown(value: Any) -> str:
    """``repr(value)`` on one line, cut off after 80 characters, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive(name: str, value: Any, remedy: str, *, zero: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite real number > 0 (with ``zero``, >= 0).

    Args:
        name, remedy: for the message.
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} must be a number, not one that jax.jit, vmap or grad trace. Give it outside of them.")
    message = f"{name} must be a finite number {'>=' if zero else '>'} 0, got {shown(value)}. {remedy}"
    kind = getattr(value, "dtype", type(value))
    scalar = isinstance(value, numbers.Real) or (hasattr(value, "dtype") and np.ndim(value) == 0)
    if not scalar or kind in (bool, np.bool_) or not (isinstance(value, numbers.Real) or _is_real(kind)):
        raise TypeError(message)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(message) from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(message)
    if number and not _LEAST <= number <= _MOST:
        raise ValueError(f"{name} must lie in the range of float32, 1.2e-38 to 3.4e+38, got {value!r}. {remedy}")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_count(name: str, value: Any, least: int, remedy: str = "", most: int = 2**31 - 1) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer from ``least`` to ``most``.

    Args:
        name, remedy: for the message.
    """
    message = f"{name} must be a whole number >= {least}, got {shown(value)}. {remedy}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    if value > most:
        raise ValueError(f"{name} must be a whole number <= {most:,}, got {value}. {remedy}".rstrip())


def check_key(key: Any) -> jax.Array:
    """A typed threefry key from a key or an integer seed.

    Raises:
        TypeError: an old-style key, one of another generator (``rbg``), several keys, or no key at all.
        ValueError: a seed below 0 or from 2**32 on, of which jax would take 32 bits only.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < 2**32:
            raise ValueError(
                f"key must be at least 0 and below 2**32 as a seed, got {key}. Take a number in that range: of any "
                "other, jax would take 32 bits only, and draw what a smaller seed draws."
            )
        return jax.random.key(int(key), impl="threefry2x32")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        dtype = getattr(key, "dtype", None)
        kind = shown(key) if dtype is None else f"an array of {dtype}"
        raise TypeError(
            f"key must be a jax.random.key(...) or a whole number, got {kind}. "
            "Old-style keys (jax.random.PRNGKey) go through jax.random.wrap_key_data(key)."
        )
    if key.shape != () or str(jax.random.key_impl(key)) not in ("fry", "threefry2x32"):
        raise TypeError(
            f"key must be one threefry key, got shape {key.shape} of {jax.random.key_impl(key)}. "
            "Use jax.random.key(seed, impl='threefry2x32')."
        )
    return key
