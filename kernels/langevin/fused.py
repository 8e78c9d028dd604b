"""Threefry, unrolled into 20 rounds of elementwise arithmetic.

On CPU ``jax.random.normal`` lowers threefry to a loop, which XLA cannot fuse with the arithmetic that uses the numbers.
Unrolled, the same bits are produced inside the loop that updates the weights: no buffer for the noise, and about a
third of the time. Bit-identical to ``jax.random`` for typed threefry keys in partitionable mode (the default).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11), Threefry-2x32 with 20 rounds.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


class Block(NamedTuple):
    """Arrays of equal ``size``, side by side, with the ``numbers`` that their keys are made of."""

    numbers: tuple[int, ...]
    size: int


def _threefry(key_words: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Encrypt the counters ``(x0, x1)`` (uint32, same shape) under ``key_words``: uint32, two or two of each entry.

    Of JAX, or of NumPy.
    """
    k0, k1 = key_words[0], key_words[1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def random_words(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two independent uint32 words for each element of ``shape``; their XOR is ``jax.random.bits(key, shape)``.

    Raises:
        ValueError: 2**32 elements or more.
    """
    if math.prod(shape) >= 2**32:
        raise ValueError(
            f"one array of shape {shape} has {math.prod(shape)} elements; the counter holds at most 2**32 - 1."
        )
    counter = _positions(shape)
    return _threefry(jax.random.key_data(key), jnp.zeros_like(counter), counter)


def words_on_host(key: Array, numbers: Sequence[int]) -> UInt32[np.ndarray, "number 2"]:
    """The words of ``jax.random.fold_in(key, number)`` of each number, by NumPy: no program is compiled for them."""
    words = np.asarray(jax.random.key_data(key))
    counters = np.asarray(numbers, np.uint32)
    return np.stack(_threefry(words, np.zeros_like(counters), counters), axis=-1)


def fold_in_on_host(key: Array, number: int) -> Array:
    """``jax.random.fold_in(key, number)``, likewise."""
    return jax.random.wrap_key_data(words_on_host(key, [number])[0], impl="threefry2x32")


def _positions(shape: tuple[int, ...]) -> Array:
    """0, 1, 2, ... in the order of the elements, from each dimension's own indices: a device makes only its part."""
    counter = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        counter = counter + stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return counter


def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Standard normal draws, equal bit for bit to ``jax.random.normal(key, shape, dtype)``.

    Only float32 uses the unrolled generator; other types go to ``jax.random``.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return jax.random.normal(key, shape, jnp.dtype(dtype))
    return _normal(key, shape)


@functools.partial(jax.jit, static_argnums=1)  # a program's text then has it once for all arrays of a shape
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return _normal_of(*random_words(key, shape))


def normal_side_by_side(key: Array, blocks: tuple[Block, ...]) -> Float32[Array, " entry"]:
    """Standard normal draws of many small arrays as one vector, by the code of one array.

    Bit for bit ``normal(fold_in(key, number), (size,))`` of each array, one after another.
    """
    numbers = np.array([number for block in blocks for number in block.numbers], np.uint32)
    keys = jnp.stack(_threefry(jax.random.key_data(key), jnp.zeros(numbers.shape, jnp.uint32), jnp.asarray(numbers)))
    words, counters, begin = [], [], 0
    for names, size in blocks:
        shape = (len(names), size)
        words.append(jnp.broadcast_to(keys[:, begin : begin + len(names), None], (2, *shape)).reshape(2, -1))
        counters.append(jax.lax.broadcasted_iota(jnp.uint32, shape, 1).reshape(-1))
        begin += len(names)
    counter = jnp.concatenate(counters)
    return _normal_of(*_threefry(jnp.concatenate(words, axis=1), jnp.zeros_like(counter), counter))


def _normal_of(high: Array, low: Array) -> Array:
    """Standard normal float32 numbers from two words each."""
    unit = jax.lax.bitcast_convert_type(((high ^ low) >> 9) | np.uint32(0x3F800000), jnp.float32) - np.float32(1)
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(lowest, unit * (np.float32(1) - lowest) + lowest)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)


def _multiply_high(a: Array, b: np.uint32) -> Array:
    """The upper 32 bits of the 64-bit product of two uint32 numbers."""
    a0, a1 = a & np.uint32(0xFFFF), a >> 16
    b0, b1 = np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    middle = a1 * b0 + ((a0 * b0) >> 16)
    return a1 * b1 + (middle >> 16) + (((middle & np.uint32(0xFFFF)) + a0 * b1) >> 16)


def uniform_index(key: Array, count: int, num: int) -> Int32[Array, " count"]:
    """``count`` integers, independent and uniform over [0, ``num``).

    ``floor(u num / 2**64)`` with 64 random bits each: the probability of a value is off by at most one part in
    2**64 / num. Source: Lemire, arXiv:1805.10941.

    Raises:
        ValueError: ``num`` is not between 1 and 2**31 - 1.
    """
    if not 0 < num < 2**31:
        raise ValueError(f"num must be between 1 and 2**31 - 1, got {num}.")
    high, low = random_words(key, (count,))
    n = np.uint32(num)
    partial = high * n
    carry = (partial + _multiply_high(low, n) < partial).astype(jnp.uint32)
    return (_multiply_high(high, n) + carry).astype(jnp.int32)
