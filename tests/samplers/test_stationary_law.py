"""SGLD's stationary law on quadratics, against the exact law of the discretized chain.

With curvature h_i, x = nbeta h and a = x + localization, the discretized chain without minibatch noise is a Gaussian
AR(1) process per direction with variance 1 / (a (1 - eps a / 4)). Minibatches of a noisy linear term
L(w; z) = sum h_i w_i^2 / 2 + w.z, z ~ N(0, C), give [1 + eps nbeta^2 C / (4 B)] / [a (1 - eps a / 4)].
"""

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt

NBETA, GAMMA, EPS = 200.0, 5.0, 1e-3


def exact(curvature, noise, batch):
    """(mean, variance of one independent draw) of nbeta sum h w^2 / 2 under the law of the discretized chain."""
    a = NBETA * curvature + GAMMA
    variance = (1 + EPS * NBETA**2 * noise / (4 * batch)) / (a * (1 - EPS * a / 4))
    terms = NBETA * curvature * variance / 2
    return terms.sum(), (2 * terms**2).sum()


def z_score(dimension, seed, batch, noisy, num_draws=400):
    """The z-score of the estimate, with a standard error from the exact law and exact autocorrelation time."""
    curvature = np.geomspace(0.5, 5.0, dimension) if dimension > 1 else np.array([1.0])
    h = jnp.asarray(curvature, jnp.float32)
    noise = np.full(dimension, 0.01)
    n = 4096
    z = np.random.default_rng(seed).normal(size=(n, dimension)) * 0.1
    z -= z.mean(0)  # w* = 0 is the minimum of the loss on the data
    z *= 0.1 / z.std(0)
    data = jnp.asarray(z if noisy else np.zeros((8, dimension)), jnp.float32)
    posterior = slt.LocalPosterior(
        lambda p, x: 0.5 * jnp.sum(h * p**2) + x @ p, jnp.zeros(dimension), len(data), nbeta=NBETA, localization=GAMMA
    )
    thin = 40
    result = slt.estimate_llc(
        posterior, data, sampler=slt.sgld(EPS), num_chains=8, num_draws=num_draws, num_warmup=200, thinning=thin,
        batch_size=batch if noisy else 8, key=seed, baseline="full",
    )  # fmt: skip
    mean, variance = exact(curvature, noise if noisy else 0.0, batch)
    a = NBETA * curvature + GAMMA
    # The energy's autocorrelation is the square of the position's; w.z at the draws is independent noise of its own.
    rho = (1 - EPS * a / 2) ** (2 * thin)
    weights = curvature**2 / (a * (1 - EPS * a / 4)) ** 2
    time = float(((1 + rho) / (1 - rho) * weights).sum() / weights.sum())
    extra = (NBETA**2 * 0.01 / batch * (1 / a)).sum() if noisy else 0.0
    stderr = np.sqrt((variance * time + 1.5 * extra) / (8 * num_draws))
    return (result.llc_raw - mean) / stderr


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noisy", [False, True], ids=["full", "minibatch"])
@pytest.mark.parametrize("dimension", [1, 10, 1000])
def test_quadratic_has_the_discretized_law(dimension, noisy, seed):
    assert abs(z_score(dimension, seed, 4, noisy)) < 4


@pytest.mark.quick
def test_quadratic_in_ten_dimensions_quick():
    assert abs(z_score(10, 11, 4, True)) < 4
