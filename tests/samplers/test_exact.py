"""BlackJAX's full-batch algorithms on a LocalPosterior: their law, their identity with BlackJAX, bad input."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt

CURVATURE = jnp.geomspace(1.0, 10.0, 5)
DATA = jnp.asarray(np.random.default_rng(0).choice([0.5, 1.5], size=(40, 1)), jnp.float32)
NBETA, PULL = 50.0, 2.0


def quadratic(p, x):
    return 0.5 * jnp.sum(CURVATURE * p["w"] ** 2) * x[:, 0] / DATA.mean()


def quartic(p, x):
    return jnp.sum(p["w"] ** 4) * x[:, 0] / DATA.mean()


def posterior(loss_fn=quadratic, **more):
    more = {"nbeta": NBETA, "localization": PULL, **more}
    return slt.LocalPosterior(loss_fn, {"w": jnp.zeros(5)}, num_data=40, **more)


SAMPLERS = {
    "mala": (slt.mala(1e-3), 3000, 10),
    "hmc": (slt.hmc(2e-3, 12), 1500, 1),
    "nuts": (slt.nuts(2e-3, 5), 1000, 1),
    "mclmc": (slt.mclmc(1e-3), 3000, 10),
}


def estimate(name, target, key=0, **more):
    sampler, draws, thinning = SAMPLERS[name]
    options = {"num_chains": 4, "num_draws": draws, "num_warmup": 200, "thinning": thinning, "key": key, **more}
    return slt.estimate_llc(target, DATA, sampler=sampler, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_on_a_quadratic(name):
    result = estimate(name, posterior())
    exact = float(jnp.sum(NBETA * CURVATURE / (NBETA * CURVATURE + PULL))) / 2
    assert result.llc_stderr < 0.05 * exact
    assert abs(result.llc - exact) < 4 * result.llc_stderr
    assert result.settings.batch_size == 40
    if name != "mclmc":
        assert 0.5 < np.nanmean(result.traces.acceptance) <= 1


STIFF = jnp.geomspace(1.0, 1000.0, 5)
STIFF_SAMPLERS = {
    "mala": (slt.mala(1.2 / 5e4), 2000, 40, 16_000),
    "hmc": (slt.hmc(0.7 / 5e4, 57), 1500, 1, 200),
    "nuts": (slt.nuts(0.8 / 5e4, 7), 600, 1, 100),
    "mclmc": (slt.mclmc(0.2 / 5e4, 60.0), 2000, 40, 4000),
}


@pytest.mark.parametrize("name", STIFF_SAMPLERS)
def test_the_law_on_a_quadratic_of_condition_number_1000(name):
    """Every direction counts alike, so a soft one that does not move would take 1/5 off."""
    sampler, draws, thinning, warmup = STIFF_SAMPLERS[name]
    target = posterior(lambda p, x: 0.5 * jnp.sum(STIFF * p["w"] ** 2) * x[:, 0] / DATA.mean(), localization=1e-3)
    result = slt.estimate_llc(
        target, DATA, sampler=sampler, num_chains=4, num_draws=draws, num_warmup=warmup, thinning=thinning, key=3
    )
    assert result.llc_stderr < 0.05 * 2.5
    assert abs(result.llc - 2.5) < 4 * result.llc_stderr


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_on_a_quartic(name):
    """|w|_4^4 in five dimensions: 5/4, less the 0.1 % that the weak localization takes, by quadrature."""
    result = estimate(name, posterior(quartic, localization=0.02))
    w = np.linspace(-2, 2, 20_001)
    weight = np.exp(-NBETA * w**4 - 0.02 / 2 * w**2)
    assert result.llc_stderr < 0.06
    assert abs(result.llc - 5 * NBETA * (weight @ w**4) / weight.sum()) < 4 * result.llc_stderr


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_a_step_size_one_is_chosen(name):
    sampler = {"mala": slt.mala(), "hmc": slt.hmc(None, 12), "nuts": slt.nuts(None, 4), "mclmc": slt.mclmc()}[name]
    result = slt.estimate_llc(posterior(localization=None), DATA, sampler=sampler, num_draws=1000, num_chains=4)
    assert abs(result.llc - 2.5) < 5 * result.llc_stderr
    assert result.settings.calibration["lines"]


@pytest.mark.quick
def test_any_algorithm_of_blackjax_can_be_passed_in():
    """Built by the caller on the posterior's own log density; step by step what BlackJAX does by itself."""
    target = posterior()
    algorithm = blackjax.hmc(target.log_density(DATA), 0.05, jnp.ones(5), 8)
    result = slt.estimate_llc(target, DATA, sampler=algorithm, num_chains=2, num_draws=5, num_warmup=0, key=3)
    position = target.program.split(target.center)[0]
    state = algorithm.init(position, jax.random.key(0))
    keys = jax.random.fold_in(jax.random.key(3), 0)
    for step in range(4):
        own = jax.random.fold_in(jax.random.fold_in(keys, step), 1)
        state, _ = algorithm.step(own, state)
        expected = target.program.mean_loss(state.position, (), DATA)
        np.testing.assert_allclose(result.loss_trace[0, step + 1], expected, rtol=1e-4)


BUILT = {
    "mala": (slt.mala(2e-3), lambda density: blackjax.mala(density, 1e-3)),
    "hmc": (slt.hmc(4e-4, 9), lambda density: blackjax.hmc(density, 0.02, jnp.ones(5), 9)),
    "nuts": (slt.nuts(4e-4, 4), lambda density: blackjax.nuts(density, 0.02, jnp.ones(5), max_num_doublings=4)),
    "mclmc": (slt.mclmc(4e-4, 7.0), lambda density: blackjax.mclmc(density, 0.14 * 5**0.5, 0.02 * 5**0.5)),
}


@pytest.mark.parametrize("name", BUILT)
def test_step_sizes_are_in_the_units_of_the_docstrings(name):
    """Kills: SGLD's step for MALA's twice of it; a squared time step taken for a time step."""
    ours, build = BUILT[name]
    target = posterior()
    options = {"num_chains": 2, "num_draws": 6, "num_warmup": 0, "key": 1}
    first = slt.estimate_llc(target, DATA, sampler=ours, **options)
    second = slt.estimate_llc(target, DATA, sampler=build(target.log_density(DATA)), **options)
    np.testing.assert_allclose(first.loss_trace, second.loss_trace, rtol=2e-4)


def test_same_key_same_bits():
    first, again = (estimate("hmc", posterior(), num_draws=20) for _ in range(2))
    np.testing.assert_array_equal(first.loss_trace, again.loss_trace)
    assert (estimate("hmc", posterior(), key=1, num_draws=20).loss_trace != first.loss_trace).any()


@pytest.mark.quick
def test_part_of_the_data_is_refused():
    with pytest.raises(ValueError, match="over the whole data set"):
        estimate("mala", posterior(), batch_size=8)


@pytest.mark.quick
def test_a_log_density_needs_a_localization():
    with pytest.raises(ValueError, match="needs a localization"):
        posterior(localization=None).log_density(DATA)


def test_the_whole_data_set_has_no_sampling_noise():
    """The draws are losses over all data: their spread between examples must not be taken off their variance.

    On a quadratic of curvatures x = nbeta h the loss's own variance is sum (x / (x + localization))^2 / 2, whatever the
    examples' factors; the factors here differ by three, which would take off about as much as there is.
    """
    result = estimate("hmc", posterior(), num_draws=3000)
    x = NBETA * np.asarray(CURVATURE, np.float64)
    found = slt.variance_estimator(result)
    assert abs(found.llc - np.sum((x / (x + PULL)) ** 2) / 2) < 4 * found.llc_stderr
    assert (result.traces.gap_var == 0).all()
    slope = result.health.evidence.nbeta_slope
    exact = np.sum(x * PULL / (x + PULL) ** 2) / 2
    assert abs(slope.value - exact) < 4 * slope.stderr
