"""Two solutions' free energies: their difference, its error, and where the preference changes."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import root_scalar
from scipy.stats import norm

import slt_jax as slt
from slt_jax.results.comparison import compare
from tests.small import made_result

SETTINGS = {
    "num_draws": 200, "num_warmup": 5, "thinning": 1, "batch_size": 8, "nbeta": 100.0, "step_size": 1e-3,
    "localization": 1.0, "num_data": 5000, "num_free": 20, "sampler": "hmc", "family": "exact",
}  # fmt: skip


def made(llc, loss, *, noise=1e-6, loss_noise=0.0, draws=200, seed=0, stopped=None, **settings):
    """A result of exactly this LLC and loss at w*; noise: standard deviations over the draws."""
    rng = np.random.default_rng(seed)
    settings = {**SETTINGS, **settings}

    def drawn(mean, spread):
        raw = rng.normal(size=(4, draws))
        return mean + spread * (raw - raw.mean())

    baseline, gap = drawn(loss, loss_noise), drawn(llc / settings["nbeta"], noise / settings["nbeta"])
    return made_result(
        baseline + gap, np.ones((4, 5)), settings, baseline=baseline, gap_var=1e-9, virial=settings["num_free"],
        stopped=stopped,
    )  # fmt: skip


def root(llc):
    """n above e with n / 1000 = llc log n, by bisection."""
    return root_scalar(lambda n: 1e-3 * n - llc * math.log(n), bracket=(math.e, 1e14), rtol=1e-12).root


@pytest.mark.quick
def test_the_free_energy_is_n_times_the_loss_and_llc_times_log_n():
    found = compare(made(12.0, 0.5), made(20.0, 0.49))
    assert found.free_energy(1000) == pytest.approx((500 + 12 * math.log(1000), 490 + 20 * math.log(1000)))
    assert found.difference(1000)[0] == pytest.approx(10 - 8 * math.log(1000))
    assert found.free_energy() == pytest.approx((2500 + 12 * math.log(5000), 2450 + 20 * math.log(5000)))


@pytest.mark.quick
@pytest.mark.parametrize("n", [2.8, 50.0, 1e3, 1e7, 1e12])
def test_the_switch_is_where_both_are_equal(n):
    """The gap in LLC is chosen so that n solves it; and a root found by bisection agrees."""
    llc = 1e-3 * n / math.log(n)
    found = compare(made(5.0, 0.201), made(5.0 + llc, 0.2))
    assert found.switch is not None
    assert found.switch.num_data == pytest.approx(n, rel=1e-6)
    assert found.switch.num_data == pytest.approx(root(llc), rel=1e-6)
    assert found.difference(found.switch.num_data)[0] == pytest.approx(0, abs=1e-6 * llc * math.log(n))


@pytest.mark.parametrize("flipped", [False, True])
def test_the_simpler_is_preferred_below_the_switch_and_the_better_above(flipped):
    simple, good = made(5.0, 0.21), made(25.0, 0.2)
    found = compare(good, simple) if flipped else compare(simple, good)
    below, above = ("b", "a") if flipped else ("a", "b")
    assert found.switch is not None
    n = found.switch.num_data
    assert n > math.e
    assert (found.prefers(0.9 * n), found.prefers(1.1 * n)) == (below, above)
    assert f"switch at n = {n:,.0f}" in str(found)
    assert f"{below} below it, {above} above it" in str(found)


@pytest.mark.parametrize(
    ("a", "b", "winner"),
    [
        ((5.0, 0.2), (6.0, 0.21), "a"),  # better in both
        ((6.0, 0.21), (5.0, 0.2), "b"),
        ((5.0, 0.3), (5.2, 0.2), "b"),  # n / log n = 2 < e
        ((5.0, 0.2), (7.0, 0.2), "a"),  # the same loss
        ((5.0, 0.2), (5.0, 0.2), "neither"),
    ],
)
def test_no_switch(a, b, winner):
    found = compare(made(*a), made(*b))
    assert found.switch is None
    assert found.no_switch == 1
    assert {found.prefers(n) for n in (1.5, 2, math.e, 10, 1e9)} == {winner}
    assert "No switch" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_error_is_that_of_independent_normal_errors():
    """Against 200,000 draws of loss and LLC, and against the formula written out."""
    a, b = made(12.0, 0.5, noise=3.0, loss_noise=0.2), made(20.0, 0.49, noise=4.0, loss_noise=0.3, seed=1)
    found, n = compare(a, b), 3000.0
    losses = [r.baseline_trace.std(ddof=1) / math.sqrt(800) for r in (a, b)]
    assert (found.a.loss_stderr, found.b.loss_stderr) == pytest.approx(losses)
    assert (found.a.llc_stderr, found.b.llc_stderr) == (a.llc_stderr, b.llc_stderr)
    rng = np.random.default_rng(5)
    draws = [n * (r.init_loss + s * rng.normal(size=200_000)) for r, s in zip((a, b), losses, strict=True)]
    draws = [
        x + math.log(n) * (r.llc + r.llc_stderr * rng.normal(size=200_000)) for x, r in zip(draws, (a, b), strict=True)
    ]
    apart = draws[0] - draws[1]
    # the standard deviation of 200,000 draws is known to one part in sqrt(400,000)
    assert found.difference(n)[1] == pytest.approx(apart.std(), rel=4 / math.sqrt(400_000))
    value, error = found.difference()
    assert f"({abs(value) / error:.1f} standard errors)" in str(found)


def test_the_interval_of_the_switch_is_that_of_its_resamples():
    """Only the LLC has an error, and n / log n is monotone above e: the quantiles are roots themselves."""
    a, b = made(5.0, 0.201, noise=2.0), made(15.0, 0.2, noise=2.0, seed=1)
    found = compare(a, b)
    assert found.switch is not None
    spread = math.hypot(a.llc_stderr, b.llc_stderr)
    for share, value in ((0.05, found.switch.low), (0.95, found.switch.high)):
        gap = 10 + spread * norm.ppf(share)
        slope = spread * math.sqrt(share * (1 - share) / 20_000) / norm.pdf(norm.ppf(share))  # of a sample quantile
        assert root(gap - 4 * slope) < value < root(gap + 4 * slope)
    assert found.no_switch == 0
    again = compare(a, b)
    assert (again.switch, again.no_switch) == (found.switch, found.no_switch)


def test_the_share_without_a_switch_is_told():
    """Losses two standard errors apart: their order is uncertain, and the other order has no switch."""
    a, b = made(5.0, 0.202, loss_noise=0.02), made(25.0, 0.2, loss_noise=0.02, seed=1)
    found = compare(a, b)
    error = math.hypot(found.a.loss_stderr, found.b.loss_stderr)
    expected = norm.cdf(-0.002 / error)
    assert 0.01 < expected < 0.1
    assert found.no_switch == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
    assert f"no switch in {found.no_switch:.0%} of the resamples" in str(found)
    other = compare(made(5.0, 0.199, loss_noise=0.02), b)
    assert other.switch is None
    assert other.no_switch < 1


def test_an_unknown_error_is_said_in_words():
    found = compare(made(5.0, 0.21, draws=200), made(25.0, 0.2, stopped={0: 1, 1: 1, 2: 1}, draws=1))
    assert found.switch is not None
    assert math.isnan(found.difference()[1])
    assert "nan" not in str(found)
    assert "without an error bar" in str(found)
    assert found.to_dict()["switch"]["low"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_verdicts_and_unlike_settings_are_told():
    good = made(5.0, 0.21, noise=2.0)
    assert good.verdict == "converged"
    assert "Note" not in str(compare(good, good))
    lost = made(25.0, 0.2, noise=2.0, loss_noise=0.1, stopped={1: 30}, nbeta=200.0)
    found = compare(good, lost)
    assert found.b.loss_stderr == pytest.approx(lost.baseline_trace[[0, 2, 3]].std(ddof=1) / math.sqrt(600))
    text = str(found)
    assert f"the verdict of b is '{lost.verdict}'" in text
    assert "verdict of a" not in text
    assert "nbeta is 100 for a and 200 for b" in text


def test_results_of_other_sizes_need_an_n():
    a, b = made(5.0, 0.21), made(25.0, 0.2, num_data=4000)
    with pytest.raises(ValueError, match="5000 and 4000 examples; say with num_data"):
        compare(a, b)
    assert compare(a, b, num_data=4500).num_data == 4500


@pytest.mark.usefixtures("wrong_types")
def test_what_cannot_be_compared_is_refused():
    good, lost = made(5.0, 0.21), made(5.0, 0.2, stopped={0: 1, 1: 1, 2: 1, 3: 1})
    with pytest.raises(ValueError, match=r"b has LLC nan .* 'diverged'"):
        compare(good, lost)
    with pytest.raises(TypeError, match="a must be an LLCResult, got a float"):
        compare(5.0, good)
    for n in (1, 0, -5, math.nan, math.inf):
        with pytest.raises(ValueError, match="num_data must be a number of examples above 1"):
            compare(good, good, num_data=n)
        with pytest.raises(ValueError, match="n must be a number of examples above 1"):
            compare(good, good).difference(n)


def test_the_loss_of_a_run_has_its_minibatch_error_and_a_full_one_has_none():
    """Two linear models on the same data, one with a useless slope less; the loss over all data is known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2)).astype(np.float32)
    y = (x[:, 0] + 0.5 * rng.normal(size=500)).astype(np.float32)

    def loss_fn(w, batch):
        return 0.5 * (batch[0] @ w - batch[1]) ** 2

    center = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0])
    posterior = slt.LocalPosterior(loss_fn, center, 500, localization=1.0)
    plan = {"sampler": slt.sgld(1e-4), "num_chains": 4, "num_draws": 200, "num_warmup": 50, "batch_size": 20}
    paired, full = (slt.estimate_llc(posterior, (x, y), baseline=kind, **plan) for kind in ("paired", "full"))
    found = compare(paired, full)
    losses = 0.5 * (x @ np.asarray(center) - y).astype(np.float64) ** 2
    exact = losses.mean()
    assert found.b.loss == pytest.approx(exact, rel=1e-5)
    assert found.b.loss_stderr == pytest.approx(0, abs=1e-12)
    assert abs(found.a.loss - exact) < 4 * found.a.loss_stderr
    spread = losses.std() / math.sqrt(20 * 800)
    peaked = 3 + (np.mean((losses - exact) ** 4) / losses.var() ** 2 - 3) / 20  # kurtosis of a batch mean
    assert found.a.loss_stderr == pytest.approx(spread, rel=4 * math.sqrt((peaked - 1) / 4 / 800))
