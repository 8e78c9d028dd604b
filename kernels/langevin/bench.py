"""The Langevin update with the unrolled generator and with ``jax.random.normal``, timed in one run.

    python -m slt_jax.kernels.langevin.bench [--out FILE.json]

Roofline: four float32 numbers a weight go through memory (weight, gradient and center in, weight out), and 20 rounds of
threefry are about 100 integer operations. The bfloat16 copy of a weight, timed as a program of its own, adds two bytes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from slt_jax.kernels import timing
from slt_jax.kernels.langevin import normal, reference
from slt_jax.kernels.langevin.shapes import TIMED

NBETA, LOCALIZATION, STEP_SIZE = 30.0, 300.0, 1e-4

Draw = Callable[[Array, tuple[int, ...], Any], Array]


def update(draw: Draw, key: Array, w: Array, grad: Array, center: Array) -> Array:
    """SGLD's step of one leaf, its noise from ``draw(key, shape, dtype)``."""
    drift = NBETA * grad + LOCALIZATION * (w - center)
    return w - 0.5 * STEP_SIZE * drift + STEP_SIZE**0.5 * draw(key, w.shape, w.dtype)


def program(draw: Draw, copy: bool = False) -> Any:
    """The jitted update, which overwrites the weights; with ``copy`` also a bfloat16 copy of the new weights."""

    def run(key: Array, w: Array, grad: Array, center: Array) -> Array | tuple[Array, Array]:
        moved = update(draw, key, w, grad, center)
        return (moved, moved.astype(jnp.bfloat16)) if copy else moved

    return jax.jit(run, donate_argnums=1)


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    key, grad, center = jax.random.key(0), jnp.ones(shape), jnp.zeros(shape)
    programs = {"fused": program(normal), "plain": program(reference.normal), "fused, with copy": program(normal, True)}
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = {name: jitted.lower(key, like, like, like).compile() for name, jitted in programs.items()}
    times = timing.measure(compiled, lambda: (key, jnp.zeros(shape), grad, center), rounds)
    return {**times, "cpu_time_plain_over_fused": timing.cpu_ratio(times, "plain", "fused")}


if __name__ == "__main__":
    timing.main(__doc__, TIMED, measure, rounds=15)
