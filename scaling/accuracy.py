"""Estimates beside exact values, as a Markdown table: ``python -m scaling.accuracy`` (about two minutes on two cores).

Quadratics: half the sum over directions of nbeta h / (nbeta h + localization). Deep linear networks at a full-rank
teacher, wide enough inside: half the product of the outer widths (Aoyagi, Neural Networks 172 (2024) 106132).
"""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import slt_jax as slt

Row = tuple[str, float, slt.LLCResult]


def quadratic(dimension: int) -> Row:
    """Curvatures from 0.5 to 5, spread evenly in the logarithm."""
    curvature = jnp.geomspace(0.5, 5.0, dimension)
    nbeta, localization = 200.0, 5.0
    posterior = slt.LocalPosterior(
        lambda w, x: 0.5 * jnp.sum(curvature * w**2) + 0 * x[:, 0], jnp.zeros(dimension), 8, nbeta, localization
    )
    result = slt.estimate_llc(
        posterior, jnp.zeros((8, 1)), sampler=slt.sgld(2e-5), num_chains=8, num_draws=1000, thinning=400, batch_size=8
    )
    exact = float(jnp.sum(nbeta * curvature / (nbeta * curvature + localization))) / 2
    return f"quadratic, d = {dimension}", exact, result


def deep_linear(widths: tuple[int, ...], step_size: float) -> Row:
    """No label noise, so that the teacher is the minimum itself; nbeta = n / log n."""
    keys = jax.random.split(jax.random.key(3), len(widths))
    shapes = list(itertools.pairwise(widths))
    weights = [jax.random.normal(k, s) / math.sqrt(s[0]) for k, s in zip(keys, shapes, strict=False)]

    def output(w, x):
        for layer in w:
            x = x @ layer
        return x

    x = jax.random.normal(keys[-1], (20_000, widths[0]))
    data = (x, output(weights, x))
    posterior = slt.LocalPosterior(
        lambda w, xy: 0.5 * jnp.sum((output(w, xy[0]) - xy[1]) ** 2, axis=-1), weights, num_data=len(x)
    )
    result = slt.estimate_llc(
        posterior, data, sampler=slt.sgld(step_size), num_chains=4, num_draws=1500, num_warmup=20_000, thinning=32,
        batch_size=200,
    )  # fmt: skip
    return f"deep linear {'-'.join(map(str, widths))}", widths[0] * widths[-1] / 2, result


def rows() -> Iterator[Row]:
    yield quadratic(1)
    yield quadratic(10)
    yield quadratic(1000)
    yield deep_linear((4, 6, 3), 2e-6)
    yield deep_linear((8, 10, 10, 6), 1e-6)


def main() -> None:
    print("| problem | exact | estimate | error | verdict |\n|---|---|---|---|---|")
    for name, exact, result in rows():
        error = result.llc / exact - 1
        estimate = f"{result.llc:.5g} ± {result.llc_stderr:.2g}"
        print(f"| {name} | {exact:.5g} | {estimate} | {error:+.1%} | {result.verdict} |", flush=True)


if __name__ == "__main__":
    main()
