"""Loss and gradient of the head, chunked and plain, in one sitting: time, CPU time, temporary memory.

    python -m slt_jax.kernels.cross_entropy.bench [--out FILE.json]

The roofline is three matrix products of 2 x rows x width x vocabulary floating-point operations, timed beside.
"""

import jax

from slt_jax.kernels import timing
from slt_jax.kernels.cross_entropy import cross_entropy, reference
from slt_jax.kernels.cross_entropy.shapes import TIMED


def inputs(rows: int, width: int, vocabulary: int):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (vocabulary, width)) / 20
    return hidden, table, jax.random.randint(keys[2], (rows,), 0, vocabulary)


def products(hidden: jax.Array, table: jax.Array, targets: jax.Array):
    """The three matrix products and nothing else."""
    logits = hidden @ table.T
    return logits @ table, logits.T @ hidden


def measure(shape: tuple[int, int, int], rounds: int) -> dict:
    given = inputs(*shape)
    mean = lambda f: jax.jit(jax.value_and_grad(lambda *a: f(*a).mean(), argnums=(0, 1)))  # noqa: E731
    programs = {"chunked": mean(cross_entropy), "plain": mean(reference.cross_entropy), "products": jax.jit(products)}
    compiled = {name: f.lower(*given).compile() for name, f in programs.items()}
    found = timing.measure(compiled, lambda: given, rounds)
    over = {f"cpu_time_over_{other}": timing.cpu_ratio(found, "chunked", other) for other in ("plain", "products")}
    return {**found, **over}


if __name__ == "__main__":
    timing.main(__doc__, TIMED, measure, rounds=7)
