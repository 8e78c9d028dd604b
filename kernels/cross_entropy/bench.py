"""Loss and gradient of a language model's output layer, chunked and plain: time, CPU time and temporary memory.

    python -m slt_jax.kernels.cross_entropy.bench [--out FILE.json]

Both versions are timed in one run. So are the three matrix products of 2 x rows x width x vocabulary floating-point
operations that any version needs: they are the roofline.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from slt_jax.kernels import timing
from slt_jax.kernels.cross_entropy import cross_entropy, reference
from slt_jax.kernels.cross_entropy.shapes import TIMED


def inputs(
    rows: int, width: int, vocabulary: int
) -> tuple[Float[Array, "row width"], Float[Array, "vocabulary width"], Int[Array, " row"]]:
    """Hidden states, unembedding and targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (vocabulary, width)) / 20
    return hidden, table, jax.random.randint(keys[2], (rows,), 0, vocabulary)


def products(hidden: Array, table: Array, targets: Array) -> tuple[Array, Array]:
    """The three matrix products and nothing else."""
    logits = hidden @ table.T
    return logits @ table, logits.T @ hidden


def mean_and_gradients(losses: Callable[..., Array]) -> Any:
    return jax.jit(jax.value_and_grad(lambda *arrays: losses(*arrays).mean(), argnums=(0, 1)))


def measure(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    arrays = inputs(*shape)
    programs = {
        "chunked": mean_and_gradients(cross_entropy),
        "plain": mean_and_gradients(reference.cross_entropy),
        "products": jax.jit(products),
    }
    compiled = {name: program.lower(*arrays).compile() for name, program in programs.items()}
    times = timing.measure(compiled, lambda: arrays, rounds)
    ratios = {f"cpu_time_over_{other}": timing.cpu_ratio(times, "chunked", other) for other in ("plain", "products")}
    return {**times, **ratios}


if __name__ == "__main__":
    timing.main(__doc__, TIMED, measure, rounds=7)
