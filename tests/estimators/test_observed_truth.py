"""Loss covariances at the draws against exact formulas: a linear model, and any network at nbeta = 0."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from tests.small import posterior as quadratic
from tests.small import refuses

N, D, BETA, GAMMA = 40, 5, 0.7, 3.0


def within(estimates, truth, sigmas=3.0):
    """Whether the mean of one estimate for each chain is the truth, by their own standard error."""
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert abs(estimates.mean() - truth) < sigmas * error, (estimates.mean(), truth, error)
    return error


@pytest.fixture(scope="module")
def linear():
    """(result, C exact, mean losses exact, C of each chain) of a linear model with noise, w* beside the minimum.

    With full batches BAOAB draws from a Gaussian exactly.
    """
    draw = np.random.default_rng(3).normal
    x = draw(size=(N, D))
    y = x @ draw(size=D) + 1.5 * draw(size=N)
    center = np.linalg.lstsq(x, y)[0] + 0.1 * draw(size=D)
    sigma = np.linalg.inv(BETA * x.T @ x + GAMMA * np.eye(D))
    mean = sigma @ (BETA * x.T @ y + GAMMA * center)
    r, s = y - x @ mean, x @ sigma @ x.T
    exact, losses = np.outer(r, r) * s + s**2 / 2, (r**2 + np.diag(s)) / 2
    data = (x.astype(np.float32), y.astype(np.float32))
    target = slt.LocalPosterior(
        lambda w, batch: 0.5 * (batch[1] - batch[0] @ w) ** 2, jnp.asarray(center, jnp.float32), N, nbeta=BETA * N,
        localization=GAMMA,
    )  # fmt: skip
    result = slt.estimate_llc(
        target, data, sampler=slt.underdamped(4e-3, 0.3), num_chains=32, num_draws=400, num_warmup=200, thinning=10,
        batch_size=N, observe={"all": data}, key=2,
    )  # fmt: skip
    away = result.observed["all"].values.astype(np.float64) - losses
    return result, exact, losses, np.einsum("cdi,cdj->cij", away, away) / away.shape[1]


@pytest.mark.quick
def test_the_sum_of_variances_of_a_linear_model(linear):
    """V = sum r_i^2 s_ii + s_ii^2 / 2. Kills: losses of another batch, of a mean over examples, or at other draws."""
    result, exact, losses, found = linear
    error = within(np.trace(found, axis1=1, axis2=2), np.trace(exact))
    assert error < 0.03 * np.trace(exact)
    within(result.observed["all"].values.mean((1, 2), dtype=np.float64), losses.mean())


def test_covariances_of_losses_of_a_linear_model(linear):
    """C_ij = r_i r_j s_ij + s_ij^2 / 2. Kills: examples in another order; the draws of one chain for all."""
    _, exact, _, found = linear
    size = np.linalg.norm(exact)
    within(np.einsum("cij,ij->c", found, exact) / size, size)
    z = (found.mean(0) - exact) / (found.std(0, ddof=1) / math.sqrt(len(found)))
    assert 0.7 < np.mean(z**2) < 1.5  # of Student's t with 31 degrees: 1.07
    gap = np.linalg.norm(found.mean(0) - exact) / size
    assert gap < 0.1


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))[:, 0]


@pytest.fixture(scope="module")
def control():
    """(result, gradients of the losses at w*) of a network at nbeta = 0."""
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    y = np.sin(x.sum(1))
    params, loss_fn = slt.from_nnx(Net(nnx.Rngs(0)), lambda net, batch: 0.5 * (net(batch[0]) - batch[1]) ** 2)
    target = slt.LocalPosterior(loss_fn, params, 60, nbeta=0, localization=1e5)
    probe = (x[:12], y[:12])
    result = slt.estimate_llc(
        target, (x, y), num_chains=32, num_draws=500, num_warmup=50, batch_size=20, thinning=2, observe={"probe": probe}
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return result, np.asarray(jax.jacobian(lambda w: loss_fn(unravel(w), probe))(flat), np.float64)


def test_a_control_draws_the_gradient_kernel(control):
    """Cov(l_i, l_j) -> g_i . g_j / gamma. Kills: a spread of another scale; draws that are correlated over weights."""
    result, gradients = control
    assert result.settings.localization == 1e5
    exact = gradients @ gradients.T / 1e5
    values = result.observed["probe"].values.astype(np.float64)
    away = values - values.mean((0, 1))
    found = np.einsum("cdi,cdj->cij", away, away) / away.shape[1]
    size = np.linalg.norm(exact)
    assert within(np.einsum("cij,ij->c", found, exact) / size, size) < 0.02 * size
    within(np.trace(found, axis1=1, axis2=2), np.trace(exact))
    assert np.linalg.norm(found.mean(0) - exact) < 0.05 * size


def test_a_control_says_that_it_is_one(control):
    """Kills: a verdict that calls draws without a loss stuck, or an estimate of 0 imprecise."""
    result, _ = control
    assert (result.llc, result.llc_stderr, result.verdict) == (0.0, 0.0, "converged")
    assert result.health.reason == "nbeta = 0: a control; draws from the localization alone."
    assert result.health.flags == ()
    assert "Verdict: converged: nbeta = 0: a control" in str(result)
    weights = result.settings.num_free
    assert abs(1e5 * result.traces.distance_sq.mean() / weights - 1) < 0.03
    assert result.settings.gradients["probe"] == 0
    (line,) = result.settings.calibration["lines"]
    assert line == "nbeta = 0: the curvature is the localization alone; step_size 2.5e-06, friction 0.7"
    assert result.to_dict()["bias_step_size"] == 0.0


@pytest.mark.parametrize("sampler", [slt.sgld(), slt.sghmc(), slt.mala()], ids=lambda x: x.name)
def test_every_sampler_draws_a_control(sampler):
    """Kills: a calibration that divides by a curvature of 0."""
    target = quadratic(nbeta=0.0, localization=50.0)
    data = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    result = slt.estimate_llc(target, data, sampler=sampler, num_chains=4, num_draws=1000, num_warmup=100, thinning=4)
    assert (result.llc, result.verdict) == (0.0, "converged")
    assert abs(50.0 * result.traces.distance_sq.mean() / 3 - 1) < 0.1


def test_a_control_needs_a_localization():
    refuses(ValueError, lambda: quadratic(nbeta=0, localization=None), "nbeta = 0", "localization=100.0")
    data = np.ones((40, 3), np.float32)
    target = quadratic(nbeta=0)
    refuses(ValueError, lambda: slt.estimate_llc(target, data, target_error=0.1), "target_error = 0.1", "nbeta = 0")
    metric = slt.underdamped(metric="kronecker")
    refuses(ValueError, lambda: slt.estimate_llc(target, data, sampler=metric), "nbeta = 0", "metric")
    refuses(ValueError, lambda: slt.sweep(target, data, step_size=[1e-4]), "nbeta = 0", "sweep")
    refuses(ValueError, lambda: quadratic(nbeta=-1.0), "nbeta must be", "-1.0")
