"""The difference of two networks' outputs, carried from layer to layer, so that it is never formed by subtracting.

A ``Pair`` is (what the teacher w* has here, what the network at w* + v has more). float32 then holds the difference of
the logits to seven digits of itself, however small v is: the loss is exactly 0 at v = 0, and has no rounding of the
logits in it. Identities, with a the teacher's value and c the change:

    (X + C)(W + V) - X W = C (W + V) + X V
    tanh(a + c) - tanh(a) = tanh(c) (1 - tanh(a) tanh(a + c))
    m'^(-1/2) - m^(-1/2) = -(m' - m) / (m^(1/2) m'^(1/2) (m^(1/2) + m'^(1/2)))
    softmax(a + c) - softmax(a) = p (e - <e>) / (1 + <e>),  e = expm1(c), <e> = sum p e
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Pair(NamedTuple):
    """base: the teacher's value. change: what the network's differs from it."""

    base: Array
    change: Array

    @property
    def value(self) -> Array:
        return self.base + self.change


def plus(x: Pair, y: Pair | None) -> Pair:
    return x if y is None else Pair(x.base + y.base, x.change + y.change)


def times(x: Pair, y: Pair) -> Pair:
    """Entry by entry, with broadcasting."""
    return Pair(x.base * y.base, x.change * y.value + x.base * y.change)


def scaled(x: Pair, factor: float) -> Pair:
    return x if factor == 1 else Pair(factor * x.base, factor * x.change)


def shifted(x: Pair, constant: float) -> Pair:
    return Pair(x.base + constant, x.change)


def product(spec: str, x: Pair, y: Pair) -> Pair:
    """``jnp.einsum`` of two."""
    base = jnp.einsum(spec, x.base, y.base)
    return Pair(base, jnp.einsum(spec, x.change, y.value) + jnp.einsum(spec, x.base, y.change))


def taken(table: Pair, rows: Array) -> Pair:
    return Pair(jnp.take(table.base, rows, axis=0), jnp.take(table.change, rows, axis=0))


def tanh(x: Pair) -> Pair:
    base, moved = jnp.tanh(x.base), jnp.tanh(x.value)
    return Pair(base, jnp.tanh(x.change) * (1 - base * moved))


def relu(x: Pair) -> Pair:
    stays = jnp.where(x.value > 0, x.change, -x.base)
    return Pair(jnp.maximum(x.base, 0), jnp.where(x.base > 0, stays, jnp.maximum(x.value, 0)))


def silu(x: Pair) -> Pair:
    """x (1 + tanh(x / 2)) / 2."""
    return times(x, scaled(shifted(tanh(scaled(x, 0.5)), 1.0), 0.5))


def gelu_tanh(x: Pair) -> Pair:
    """x (1 + tanh((2 / pi)^(1/2) (x + 0.044715 x^3))) / 2."""
    cube = times(x, times(x, x))
    inner = scaled(plus(x, scaled(cube, 0.044715)), (2 / jnp.pi) ** 0.5)
    return times(x, scaled(shifted(tanh(inner), 1.0), 0.5))


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "silu": silu, "relu": relu, "tanh": tanh}


def softcapped(x: Pair, cap: float | None) -> Pair:
    """cap tanh(x / cap)."""
    return x if cap is None else scaled(tanh(scaled(x, 1 / cap)), cap)


def centered(x: Pair) -> Pair:
    """Minus the mean over the last axis."""
    return Pair(*(part - jnp.mean(part, axis=-1, keepdims=True) for part in x))


def normalized(x: Pair, epsilon: float) -> Pair:
    """x / (mean of x^2 + epsilon)^(1/2) over the last axis."""
    square = jnp.mean(x.base**2, axis=-1, keepdims=True) + epsilon
    grown = jnp.mean(x.change * (x.base + x.value), axis=-1, keepdims=True)
    root, moved = jnp.sqrt(square), jnp.sqrt(jnp.mean(x.value**2, axis=-1, keepdims=True) + epsilon)
    return times(x, Pair(1 / root, -grown / (root * moved * (root + moved))))


def softmax(x: Pair, visible: Array) -> Pair:
    """Over the last axis, where ``visible``; 0 elsewhere."""
    low = jnp.finfo(x.base.dtype).min
    p = jax.nn.softmax(jnp.where(visible, x.base, low), axis=-1)
    change = jnp.where(visible, x.change, low)
    change = change - jax.lax.stop_gradient(jnp.max(change, axis=-1, keepdims=True))
    grown = jnp.exp(change)
    total = jnp.sum(p * grown, axis=-1, keepdims=True)
    near = jnp.all((change > -1) | ~visible, axis=-1, keepdims=True)
    e = jnp.where(near, jnp.expm1(change), grown)  # far away it is the exponentials that lose nothing
    return Pair(p, p * (e - jnp.sum(p * e, axis=-1, keepdims=True)) / total)


def divergence(logits: Pair) -> Array:
    """KL(softmax(base) || softmax(value)) over the last axis, to the relative precision of the type.

    With c the change minus its mean under p = softmax(base), it is log(1 + sum p (e^c - 1 - c)), a sum of positive
    terms; where a |c| is above 1 it is logsumexp(c + log p), which does not overflow.
    """
    log_p = jax.nn.log_softmax(logits.base, axis=-1)
    p = jnp.exp(log_p)
    c = logits.change - jnp.sum(p * logits.change, axis=-1, keepdims=True)
    c = c - jnp.sum(p * c, axis=-1, keepdims=True)  # what rounding left of the mean
    small = jnp.max(jnp.abs(c), axis=-1) < 1
    near = jnp.where(small[..., None], c, 0)
    far = jnp.where(small[..., None], 0, c)
    return jnp.where(small, jnp.log1p(jnp.sum(p * _excess(near), axis=-1)), jax.nn.logsumexp(far + log_p, axis=-1))


@jax.custom_jvp
def _excess(x: Array) -> Array:
    """e^x - 1 - x for |x| <= 1; a series where the difference would lose digits."""
    series = jnp.ones_like(x)
    for k in range(12, 2, -1):
        series = 1 + x / k * series
    return jnp.where(jnp.abs(x) < 0.5, x * x / 2 * series, jnp.expm1(x) - x)


@_excess.defjvp
def _excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return _excess(x), jnp.expm1(x) * t
