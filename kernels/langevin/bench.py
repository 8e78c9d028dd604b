"""The Langevin update with the written-out generator and with ``jax.random.normal``, in one sitting.

    python -m slt_jax.kernels.langevin.bench [--out FILE.json]

Roofline: four float32 numbers a weight go through memory (weight, gradient and center in, weight out), and 20 rounds of
threefry are about 100 integer operations. The copy of a weight in bfloat16, timed beside, adds two bytes.
"""

import jax
import jax.numpy as jnp

from slt_jax.kernels import timing
from slt_jax.kernels.langevin import normal, reference
from slt_jax.kernels.langevin.shapes import TIMED

NBETA, LOCALIZATION, STEP_SIZE = 30.0, 300.0, 1e-4


def update(draw, key, w, grad, center):
    """SGLD's step of one leaf, its noise from ``draw(key, shape, dtype)``."""
    drift = NBETA * grad + LOCALIZATION * (w - center)
    return w - 0.5 * STEP_SIZE * drift + STEP_SIZE**0.5 * draw(key, w.shape, w.dtype)


def program(draw, copy: bool = False):
    """The update of donated weights; with ``copy`` also a bfloat16 copy of the new ones."""

    def run(key, w, grad, center):
        moved = update(draw, key, w, grad, center)
        return (moved, moved.astype(jnp.bfloat16)) if copy else moved

    return jax.jit(run, donate_argnums=1)


def measure(shape: tuple[int, ...], rounds: int) -> dict:
    key, grad, center = jax.random.key(0), jnp.ones(shape), jnp.zeros(shape)
    programs = {"fused": program(normal), "plain": program(reference.normal), "fused, with copy": program(normal, True)}
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = {name: f.lower(key, like, like, like).compile() for name, f in programs.items()}
    found = timing.measure(compiled, lambda: (key, jnp.zeros(shape), grad, center), rounds)
    return {**found, "cpu_time_plain_over_fused": timing.cpu_ratio(found, "plain", "fused")}


if __name__ == "__main__":
    timing.main(__doc__, TIMED, measure, rounds=15)
