"""Bias terms, sensitivities and cross-checks, on draws whose law is known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.diagnostics.bias import Bias, Moments, thermometer
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.sensitivity import Slope, covariance_with_loss
from slt_jax.diagnostics.verdict import assess
from slt_jax.samplers import theory_of
from tests.small import gamma_draws, made_result, with_traces

NAN2 = (math.nan, math.nan)
SETTINGS = {"step_size": 0.01, "friction": 0.2}


def bias_of(family, raw, drift_sq, heat, noise, settings, with_loss=NAN2, degree=math.nan):
    moments = Moments(raw, drift_sq, heat, noise, **settings, with_loss=with_loss, degree=degree)
    return theory_of(family).bias(moments)


def heating(family, step_size, friction, noise):
    return theory_of(family).heating(step_size, friction) * noise


@pytest.mark.quick
def test_euler_bias_is_exact_on_a_quadratic():
    """d directions of curvature a: raw = d / 2 / (1 - k / 4), E|G|^2 = d a / (1 - k / 4), k = eps a."""
    d, a, eps = 50, 40.0, 0.01
    raw = d / 2 / (1 - eps * a / 4)
    found = bias_of("euler", raw, d * a / (1 - eps * a / 4), NAN2, NAN2, SETTINGS)
    assert raw - found.applied == pytest.approx(d / 2, rel=1e-12)
    assert found.step_size == pytest.approx(raw - d / 2)


def chain_law(degree, pull, eps):
    """(x, law of Euler-Maruyama's chain, exact law) for |x|^degree + pull x^2 / 2, both on a grid."""
    x = np.linspace(-3.0, 3.0, 601)
    energy = np.abs(x) ** degree + pull * x**2 / 2
    force = degree * np.sign(x) * np.abs(x) ** (degree - 1) + pull * x
    moves = np.exp(-((x[None] - (x - eps / 2 * force)[:, None]) ** 2) / (2 * eps))
    moves /= moves.sum(1, keepdims=True)
    values, vectors = np.linalg.eig(moves.T)
    law = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
    return x, law / law.sum(), np.exp(-energy) / np.exp(-energy).sum()


def numbers_of(law, loss, slope, force):
    """(raw, <grad V, G>, Cov(V, |G|^2))."""
    raw = law @ loss
    return raw, law @ (slope * force), law @ (loss * force**2) - raw * (law @ force**2)


@pytest.mark.parametrize(("degree", "eps"), [(2, 0.4), (4, 0.025), (4, 0.1)])
def test_euler_bias_on_a_homogeneous_loss(degree, eps):
    """The chain's law, exactly: what is taken off is the bias to the last digit, at any step."""
    x, law, exact = chain_law(degree, 0.0, eps)
    loss, slope = np.abs(x) ** degree, degree * np.sign(x) * np.abs(x) ** (degree - 1)
    raw, drift_sq, of_loss = numbers_of(law, loss, slope, slope)
    bias = raw - exact @ loss
    assert bias > 0.02 * raw
    given = "euler", raw, drift_sq, NAN2, (0.0, 0.0), {"step_size": eps}
    found = bias_of(*given, (of_loss, 0.0), law @ (slope * x) / raw)
    assert found.step_size == pytest.approx(bias, rel=0.02)
    assert bias_of(*given).step_size == pytest.approx(bias * degree / 2, rel=0.02)


def test_euler_bias_of_a_sum():
    """x^2 + |y|^4, independent: far from a quadratic's share, and the degree's bound gives a seventh too much."""
    eps, parts = 0.01, []
    for degree in (2, 4):
        x, law, exact = chain_law(degree, 0.0, eps)
        loss, slope = np.abs(x) ** degree, degree * np.sign(x) * np.abs(x) ** (degree - 1)
        parts.append([*numbers_of(law, loss, slope, slope), exact @ loss, law @ (slope * x)])
    raw, drift_sq, of_loss, true, fall = np.sum(parts, 0)
    found = bias_of("euler", raw, drift_sq, NAN2, (0.0, 0.0), {"step_size": eps}, (of_loss, 1.0), fall / raw)
    assert found.step_size == pytest.approx(raw - true, rel=0.15)
    assert eps / 8 * drift_sq > 1.4 * (raw - true)
    assert 0 < found.stderr < eps / 8


def test_a_long_step_on_a_quartic_is_corrected():
    """|w|^4 in the plane, LLC 1/2: the step adds a quarter, which the formula for a quadratic would take off twice."""
    posterior = slt.LocalPosterior(
        lambda w, x: jnp.sum(w**2) ** 2 * x[:, 0], jnp.zeros(2), 100, nbeta=1e4, localization=1e-3
    )
    result = slt.estimate_llc(
        posterior, jnp.ones((100, 1)), sampler=slt.sgld(1.2e-3), num_draws=20_000, num_warmup=2000, batch_size=2, key=1
    )
    assert result.llc_raw - 0.5 > 0.1
    assert abs(result.llc - 0.5) < 4 * result.llc_stderr < 0.05
    assert result.llc_raw - 2 * (result.llc_raw - result.llc) < 0.45


def test_covariance_with_the_loss():
    """Directions of curvature a: Cov(|x|^2 / 2 a, a^2 |x|^2) = sum of a; not from minibatches that scatter."""
    a, rng = np.array([1.0, 3.0, 10.0]), np.random.default_rng(0)
    square = rng.normal(size=(8, 4000, 3)) ** 2
    draws, force = 0.5 * square.sum(-1), square @ a
    value, error = covariance_with_loss(draws, np.zeros_like(draws), force, 1.0)
    assert abs(value - a.sum()) < 4 * error < 2.0
    scatter = np.full_like(draws, 0.2 * draws.var() / 100)
    assert math.isnan(covariance_with_loss(draws, scatter, force, 10.0)[0])
    assert math.isnan(covariance_with_loss(draws[:, :20], scatter[:, :20], force[:, :20], 1.0)[0])


def test_sghmc_bias_is_that_of_its_docstring_to_first_order():
    """raw = d / 2 / (1 - k / (4 - 2 friction)), E|G|^2 = d a as k goes to 0."""
    d, a, friction = 50, 40.0, SETTINGS["friction"]
    for eps in (1e-4, 1e-5):
        raw = d / 2 / (1 - eps * a / (4 - 2 * friction))
        found = bias_of("sghmc", raw, d * a, NAN2, (0.0, 0.0), {"step_size": eps, "friction": friction})
        assert found.step_size == pytest.approx(raw - d / 2, rel=eps * a)


def test_a_large_bias_is_told_and_not_taken_off():
    found = bias_of("euler", 10.0, 4000.0, NAN2, NAN2, SETTINGS)
    assert found.applied == 0.0
    assert found.step_size == pytest.approx(5.0)
    assert "over 25% of the raw estimate" in found.why


def test_noise_and_step_size_share_the_euler_bias():
    found = bias_of("euler", 100.0, 4000.0, NAN2, (1000.0, 10.0), SETTINGS)
    assert (found.noise, found.step_size) == pytest.approx((1.25, 3.75))
    assert found.applied == pytest.approx(5.0)


def test_kinetic_samplers_use_the_surer_of_probe_and_thermometer():
    noise, heat = (400.0, 4.0), (5.2, 0.1)
    probe = heating("baoab", 0.01, 0.2, 400.0)
    sure = bias_of("baoab", 100.0, 1.0, (5.2, 100.0), noise, SETTINGS)
    assert sure.applied == pytest.approx(probe)
    assert sure.stderr == pytest.approx(math.hypot(probe / 100, probe / 4))
    unsure = bias_of("baoab", 100.0, 1.0, heat, (400.0, 400.0), SETTINGS)
    assert unsure.applied == heat[0]
    assert unsure.stderr == pytest.approx(math.hypot(heat[1], heat[0] / 4))
    half = bias_of("baoab", 100.0, 1.0, NAN2, noise, {**SETTINGS, "control_variate": True})
    assert half.applied == pytest.approx(probe / 2)
    assert half.stderr > probe / 8


def test_a_sampler_without_a_theory_is_left_as_it_is():
    found = bias_of("", 10.0, 1.0, NAN2, (3.0, 1.0), SETTINGS)
    assert found.applied == 0.0
    assert "no theory" in found.why


def test_the_thermometer_reads_heat():
    kinetic = np.random.default_rng(0).normal(1.02, 0.01, size=(4, 500))
    value, error = thermometer(kinetic, 200, 2000.0)
    assert abs(value - 2.0) < 4 * error
    assert error == pytest.approx(100 * 0.01 / math.sqrt(2000), rel=4 / math.sqrt(2 * kinetic.size))


def result_of(draws, nbeta=100.0, gap_var=None, **settings):
    loss = (1.0 + draws / nbeta).astype(np.float64)
    given = {
        "nbeta": nbeta, "num_data": 1000, "num_free": 10, "localization": 1.0, "step_size": 1e-3, "friction": 0.1,
        "family": "exact", "sampler": "hmc", "thinning": 1, **settings,
    }  # fmt: skip
    var = 0.0 if gap_var is None else gap_var
    return made_result(loss, np.ones_like(loss[:, :1]), given, baseline=1.0, gap_var=var, virial=10.0)


def test_variance_estimator_subtracts_the_spread_in_the_batch():
    draws, noise = gamma_draws(4.0), np.random.default_rng(1).normal(size=(8, 4000)) * 3
    found = slt.variance_estimator(result_of(draws + noise, gap_var=np.full(draws.shape, 9.0 / 100**2)))
    assert abs(found.llc - 4.0) < 4 * found.llc_stderr
    assert found.llc_stderr < 0.4
    heated = slt.variance_estimator(result_of(draws + noise))
    assert heated.llc - 4.0 > 4 * heated.llc_stderr


def test_variance_estimator_needs_single_losses():
    draws = gamma_draws(4.0, 2, 50)
    with pytest.raises(ValueError, match="one loss per example"):
        slt.variance_estimator(result_of(draws, gap_var=np.full(draws.shape, np.nan)))


def test_two_temperatures_need_no_loss_at_the_center():
    a, b = (result_of(gamma_draws(4.0, seed=i), nbeta) for i, nbeta in enumerate((100.0, 50.0)))
    moved = [with_traces(r, baseline=r.baseline_trace + 7) for r in (a, b)]
    found = slt.two_temperature_estimator(*moved)
    assert abs(found.llc - 4.0) < 4 * found.llc_stderr
    assert found.llc_stderr < 0.2
    with pytest.raises(ValueError, match="both results have nbeta"):
        slt.two_temperature_estimator(a, a)
    with pytest.raises(ValueError, match="differ in localization"):
        slt.two_temperature_estimator(a, result_of(gamma_draws(4.0), 50.0, localization=2.0))


def test_cross_checks_agree_on_a_real_run():
    """Each with its own value on a Gaussian. Minibatches heat by 0.3 %, twice that in the variance: 0.02 of 3, a third
    of its error.
    """
    x = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float32)
    center = {"w": jnp.zeros(6)}
    runs, plan = [], {"num_draws": 8000, "num_warmup": 200, "thinning": 4, "batch_size": 100}
    for key, nbeta in enumerate((200.0, 100.0)):
        posterior = slt.LocalPosterior(lambda p, x: 0.5 * (x @ p["w"]) ** 2, center, 2000, nbeta, localization=0.1)
        runs.append(slt.estimate_llc(posterior, x, sampler=slt.underdamped(0.05 / nbeta, 0.7), key=key, **plan))
    share, less = (c / (c + 0.1) for c in np.multiply.outer((200.0, 100.0), np.linalg.eigvalsh(x.T @ x / 2000)))
    by_variance, by_two = (share**2).sum() / 2, (share / 200 - less / 100).sum() / 2 / (1 / 200 - 1 / 100)
    checks = (slt.variance_estimator(runs[0]), by_variance), (slt.two_temperature_estimator(*runs), by_two)
    for check, exact in checks:
        assert abs(check.llc - exact) < 4 * check.llc_stderr < 0.3


VERDICTS = {
    "depends on nbeta or localization": {
        "nbeta_slope": Slope(2.0, 0.3), "localization_slope": Slope(-2.0, 0.3), "bias": None,
    },
    "biased by the step size": {"kinetic": 1.4, "bias": bias_of("baoab", 30.0, 1, NAN2, (1.0, 1.0), SETTINGS)},
    "heated by minibatch noise": {"bias": bias_of("baoab", 30.0, 1.0, NAN2, (500.0, 1.0), SETTINGS)},
}  # fmt: skip


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts_from_the_evidence(verdict):
    health = assess(gamma_draws(30.0, 4, 1000), Evidence(num_free=100, **VERDICTS[verdict]))
    assert health.verdict == verdict
    assert health.flags == (verdict,)


def test_losses_that_spike_are_no_posterior():
    """One draw in two hundred is thrown off: in the mean it counts, and R-hat and trend are in order."""
    calm = gamma_draws(30.0, 4, 2000)
    spiked = np.where(np.random.default_rng(5).random(calm.shape) < 0.005, 40 * calm, calm)
    health = result_of(spiked).health
    assert health.rhat < 1.01
    assert (health.verdict, health.flags) == ("biased by the step size", ("biased by the step size",))
    assert "the variance of nbeta L is" in health.reason
    assert result_of(calm).health.verdict == "converged"
    wide = result_of(gamma_draws(30.0, 4, 2000) + np.random.default_rng(6).normal(size=calm.shape) * math.sqrt(60))
    assert wide.health.verdict == "converged"  # three times the variance: below the limit
    broad = result_of(60 + 30 * np.random.default_rng(7).normal(size=calm.shape)).health
    assert broad.verdict == "depends on nbeta or localization"
    assert "as around weights that are no minimum" in broad.reason


@pytest.mark.parametrize(
    ("degree", "share", "verdict"),
    [
        (6.0, 0.3, "converged"), (8.0, 0.3, "depends on nbeta or localization"),
        (4.0, 0.8, "converged"), (5.0, 0.8, "depends on nbeta or localization"), (5.0, math.nan, "converged"),
    ],
)  # fmt: skip
def test_a_loss_that_grows_too_steeply_was_sampled_too_far_out(degree, share, verdict):
    health = assess(gamma_draws(30.0, 4, 1000), Evidence(degree=Slope(degree, 0.1), localized_share=share))
    assert health.verdict == verdict
    unsure = assess(gamma_draws(30.0, 4, 1000), Evidence(degree=Slope(degree, 1.0), localized_share=share))
    assert unsure.verdict == "converged"


def test_the_share_of_directions_that_the_localization_confines():
    """Two of five directions are flat: on a quadratic the share is (2 + sum localization / (x + localization)) / 5."""
    x = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    posterior = slt.LocalPosterior(lambda p, x: 0.5 * (x @ p["w"][:3]) ** 2, {"w": jnp.zeros(5)}, 2000, 50.0, 5.0)
    result = slt.estimate_llc(posterior, x, sampler=slt.hmc(5e-3, 9), num_draws=2000, num_warmup=100)
    stiff = 50 * np.linalg.eigvalsh(x.T @ x / len(x)) + 5
    # of a mean of 3 / 5 of chi-squares with 3 degrees of freedom, whose relative variance is 2 / 3
    error = 3 / 5 * math.sqrt(2 / 3 / result.ess)
    assert error < 0.02
    assert abs(result.health.evidence.localized_share - (2 + np.sum(5 / stiff)) / 5) < 4 * error


def test_heat_is_judged_more_strictly_in_a_metric_s_coordinates():
    bias = bias_of("baoab", 30.0, 1.0, NAN2, (1.0, 1.0), SETTINGS)
    for metric, verdict in ((False, "converged"), (True, "biased by the step size")):
        evidence = Evidence(kinetic=1.09, bias=bias, num_free=900, metric=metric)
        assert assess(gamma_draws(30.0, 4, 1000), evidence).verdict == verdict


def test_in_a_metric_heat_that_noise_does_not_explain_is_named():
    """One percent of 900 directions, and a sixth of the estimate. Kills: a limit in shares of all directions alone."""
    draws = gamma_draws(30.0, 4, 1000)

    def verdict(heat, error, noise=0.0, metric=True):
        bias = Bias(0.0, noise, 0.1, 0.0, "")
        return assess(draws, Evidence(kinetic=1.01, bias=bias, num_free=900, metric=metric, heat=Slope(heat, error)))

    found = verdict(6.0, 0.5)
    assert found.verdict == "biased by the step size"
    assert "adds up to 6 of" in found.reason
    assert "Raise localization" in found.reason
    for other in (verdict(6.0, 2.0), verdict(4.0, 0.5), verdict(6.0, 0.5, noise=3.0), verdict(6.0, 0.5, metric=False)):
        assert other.verdict == "converged"


def test_chains_that_hardly_moved_in_most_directions_have_not_converged():
    """The flat trace of the few directions that have settled says nothing about the others."""
    health = assess(gamma_draws(30.0, 4, 1000), Evidence(virial=0.1))
    assert health.verdict == "still rising"
    assert "10% of the directions" in health.reason
    assert assess(gamma_draws(30.0, 4, 1000), Evidence(virial=0.5)).verdict == "converged"


def test_the_step_size_bias_under_a_preconditioner_leaves_the_localization_out():
    """Half of the directions are flat, and P there is far above 1: what the localization does to them costs nothing.

    Kills: localization <w - w*, G> in place of localization <w - w*, P G>.
    """
    curvature = jnp.asarray([1.0] * 10 + [1e-14] * 10)
    posterior = slt.LocalPosterior(
        lambda w, x: 0.5 * jnp.sum(curvature * w**2) * x[:, 0], jnp.zeros(20), 100, nbeta=1e4, localization=1.0
    )
    result = slt.estimate_llc(
        posterior, jnp.ones((100, 1)), sampler=slt.preconditioned_sgld(2e-5, floor=2e-5), num_draws=20_000, batch_size=2
    )
    assert result.llc_raw - 5 > 4 * result.llc_stderr
    assert abs(result.llc - 5) < 4 * result.llc_stderr


def test_an_estimate_of_little_precision_is_not_called_converged():
    assert assess(gamma_draws(0.5, 4, 16), Evidence()).verdict == "too few draws"
    assert assess(gamma_draws(0.5, 4, 400), Evidence()).verdict == "converged"


def test_a_step_that_is_too_long_for_a_correction():
    health = assess(gamma_draws(30.0, 4, 1000), Evidence(bias=bias_of("euler", 30.0, 8000.0, NAN2, NAN2, SETTINGS)))
    assert health.verdict == "biased by the step size"


def test_hot_chains_that_did_not_come_down():
    draws = gamma_draws(30.0, 4, 1000)
    cold, hot = draws[::2].mean(), draws[1::2].mean()
    draws[1::2] += 3
    health = assess(draws, Evidence(hot=np.array([False, True, False, True])))
    assert health.verdict == "chains disagree"
    assert health.bracket == pytest.approx((cold, hot + 3))
    assert "hot" in health.reason
