"""What nobody chose: the calibration's choices, their reasons, their cost, and what overrides them."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from scaling.known_answers import by_name
from slt_jax._io import digest_of_json
from slt_jax.calibration.effort import default_budget
from slt_jax.engine import memory
from slt_jax.engine.chunk import run_chunk
from slt_jax.engine.mesh import chain_mesh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4000, 8)).astype(np.float32)
NOISE = RNG.normal(size=4000)
NOISE = (NOISE - X @ np.linalg.lstsq(X, NOISE, rcond=None)[0]).astype(np.float32)
WIDE = X.astype(np.float64)
HESSIAN = WIDE.T @ WIDE / 4000


def posterior(scale=1.0, **more):
    return slt.LocalPosterior(
        lambda p, xy: 0.5 * ((scale * xy[0]) @ (p["w"] - 1) - xy[1]) ** 2, {"w": jnp.ones(8)}, 4000, **more
    )


def estimate(target=None, noise=0.0, **more):
    data = (X, noise * NOISE)
    return slt.estimate_llc(posterior() if target is None else target, data, **{"budget": 20_000, **more})


def exact_llc(settings):
    """Of the Gaussian that the posterior is."""
    curvature = settings.nbeta * np.linalg.eigvalsh(HESSIAN)
    return float((curvature / (curvature + settings.localization)).sum() / 2)


def test_nothing_given_and_the_answer_is_right():
    result = slt.estimate_llc(posterior(), (X, 0 * NOISE))
    assert abs(result.llc - 4) < 4 * result.llc_stderr
    assert result.llc_stderr < 0.06
    assert result.verdict == "converged"
    lines = " ".join(result.settings.calibration["lines"])
    for word in ("curvature", "step_size", "friction", "localization"):
        assert word in lines
        assert word in str(result)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_step_follows_the_scale_of_the_loss(scale):
    """Kills: a step size with a fixed scale. The curvature is that over four minibatches of the data."""
    result = estimate(posterior(scale))
    chosen, rng = result.settings.calibration, np.random.default_rng(0)
    parts = [WIDE[rng.choice(4000, 4 * result.settings.batch_size, replace=False)] for _ in range(200)]
    largest = [result.settings.nbeta * scale**2 * np.linalg.eigvalsh(x.T @ x / len(x))[-1] for x in parts]
    assert abs(chosen["curvature"] - np.mean(largest)) < 4 * np.std(largest)
    assert chosen["step_size"] * (chosen["curvature"] + chosen["localization"]) == pytest.approx(0.25, rel=1e-6)


def test_around_a_saddle_the_step_is_that_of_the_curvature():
    """There is no positive estimate there that minibatch noise could spoil. Kills: a step cut to nearly nothing."""
    saddle = slt.LocalPosterior(
        lambda p, xy: 0.5 * (xy[0] @ (p["a"] * p["b"] - 1) - xy[1]) ** 2,
        {"a": jnp.full(8, 0.01), "b": jnp.full(8, 0.01)}, 4000, localization=3000.0,
    )  # fmt: skip
    result = estimate(saddle)
    chosen = result.settings.calibration
    assert result.verdict == "not a minimum"
    assert chosen["step_size"] * (chosen["curvature"] + 3000) == pytest.approx(0.25, rel=1e-6)
    assert "no positive estimate" in " ".join(chosen["lines"])


def test_a_flat_direction_moves_a_weight_by_two_and_a_half_typical_ones():
    """All weights are 1: the localization is 2.5^-2, unless the curvature asks for more than a millionth of it."""
    assert estimate().settings.localization == pytest.approx(0.16, rel=1e-6)
    stiff = estimate(posterior(scale=1e3)).settings
    assert stiff.localization == pytest.approx(stiff.calibration["curvature"] / 1e6, rel=1e-6)


@pytest.mark.parametrize(("budget", "least"), [(10_000, 0.02), (15_999, 0.02), (16_000, 0.1), (40_000, 0.1)])
def test_long_chains_get_more_friction(budget, least):
    """Four chains; without label noise the noise asks for less than the least. Kills: short and long exchanged."""
    settings = estimate(budget=budget, batch_size=4000).settings
    assert settings.friction == pytest.approx(least, rel=1e-6)


def noise_of_a_gradient(label, nbeta, pull):
    """Trace of the covariance of one example's gradient: of labels of noise ``label``, and for each unit of the LLC."""
    size = (WIDE**2).sum(1)
    spread = np.linalg.inv(nbeta * HESSIAN + pull * np.eye(8))
    of_weights = (WIDE.T * size) @ WIDE / 4000 - HESSIAN @ HESSIAN
    llc = nbeta / 2 * np.trace(HESSIAN @ spread)
    return label**2 * np.mean(size * NOISE.astype(float) ** 2), np.trace(of_weights @ spread) / llc


def test_friction_lets_minibatch_noise_add_what_it_may():
    """3 % of the pilot run's own LLC, in which the directions that the localization holds have no part.

    Eight noisy directions, LLC 4, heated to 4.1 by the pilot's friction of 0.2; and forty flat ones. The heat is
    step_size / tanh(friction / 2) / 8 times the noise. Kills: half of the room; a pilot's LLC with the flat directions
    in it, which would be 24.
    """
    flat = slt.LocalPosterior(
        lambda p, xy: 0.5 * (xy[0] @ (p["w"][:8] - 1) - xy[1]) ** 2, {"w": jnp.ones(48)}, 4000, localization=5.0
    )
    given = {"noise": 0.15, "control_variate": False, "budget": 8000}
    runs = [estimate(flat, **given, key=key).settings for key in range(24)]
    assert all(0.021 < s.friction < 0.69 for s in runs)
    nbeta, batch, cold = runs[0].nbeta, runs[0].batch_size, exact_llc(runs[0])
    step_size = np.mean([s.step_size for s in runs])
    label, per_llc = (nbeta**2 / batch * x for x in noise_of_a_gradient(0.15, nbeta, 5.0))
    heat = step_size / math.tanh(0.1) / 8
    llc = (cold + heat * label) / (1 - heat * per_llc)
    found = [math.tanh(s.friction / 2) / s.step_size for s in runs]
    expected, error = (label + per_llc * llc) / (8 * 0.03 * llc), np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 4 * error < 0.25 * expected


@pytest.mark.parametrize("budget", [2_000, 20_000])
def test_the_budget_counts_everything_and_calibration_is_little_of_it(budget):
    result = estimate(budget=budget)
    spent = result.settings.gradients
    assert 0.9 * budget < sum(spent.values()) < 1.02 * budget
    assert spent["calibration"] <= 0.15 * budget
    plan = result.settings
    assert plan.num_chains * (plan.num_warmup + plan.thinning * plan.num_draws) == spent["steps"]


@pytest.mark.parametrize("control", [False, True])
def test_the_budget_counts_everything_where_nothing_is_open(control):
    """Kills: a step with control variates for one gradient; curvatures on top."""
    given = {"sampler": slt.underdamped(1e-5, 0.3), "control_variate": control}
    spent = estimate(posterior(localization=0.7), budget=3000, **given).settings.gradients
    assert spent["calibration"] == 0
    assert 0.9 * 3000 < sum(spent.values()) < 1.02 * 3000


def test_what_is_given_is_taken():
    result = estimate(
        posterior(localization=0.7),
        sampler=slt.underdamped(1e-5, 0.3),
        num_chains=2,
        num_warmup=30,
        thinning=3,
        hot=1.0,
    )
    s = result.settings
    assert (s.step_size, s.friction, s.localization) == (1e-5, 0.3, 0.7)
    assert (s.num_chains, s.num_warmup, s.thinning, s.hot) == (2, 30, 3, 1.0)
    assert s.calibration == {}
    partly = estimate(sampler=slt.underdamped(1e-5)).settings
    assert partly.step_size == 1e-5
    assert partly.friction > 0


@pytest.mark.parametrize(
    "sampler", [slt.sgld(), slt.sgld(noise="leimkuhler-matthews"), slt.preconditioned_sgld(), slt.sghmc(), slt.sgnht()]
)
def test_every_sampler_can_be_calibrated(sampler):
    result = estimate(sampler=sampler, budget=60_000)
    assert abs(result.llc - exact_llc(result.settings)) < 4 * result.llc_stderr < 0.3
    assert result.settings.sampler == sampler.name


def test_control_variates_are_chosen_where_they_pay():
    """Label noise: the gradient's noise stays at w*. Without, nothing is gained."""
    noisy, quiet = estimate(noise=1.0), estimate(noise=0.0)
    assert noisy.settings.control_variate
    assert not quiet.settings.control_variate
    assert "two gradients" in " ".join(noisy.settings.calibration["lines"])
    assert abs(noisy.llc - 4) < 4 * noisy.llc_stderr
    plain = estimate(noise=1.0, control_variate=False, sampler=slt.sgld())
    assert not plain.settings.control_variate


def test_control_variates_are_left_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(memory, "MUCH", 0)
    monkeypatch.setattr(memory.MemoryEstimate, "fits_with_control", False)
    assert not estimate(noise=1.0).settings.control_variate


def heated(settings, label):
    """The LLC that SGLD reads with labels of noise ``label``: its second moments are linear in those a step before."""
    nbeta, pull, batch = settings.nbeta, settings.localization, settings.batch_size
    half, one = settings.step_size / 2, np.eye(8)
    pairs = (WIDE[:, :, None] * WIDE[:, None, :]).reshape(4000, 64)
    scatter = (nbeta**2 / batch) * (pairs.T @ pairs / 4000 - np.kron(HESSIAN, HESSIAN))
    kept = one - half * (nbeta * HESSIAN + pull * one)
    added = 2 * half * one + half**2 * nbeta**2 / batch * label**2 * (WIDE.T * NOISE.astype(float) ** 2) @ WIDE / 4000
    moments = np.linalg.solve(np.eye(64) - np.kron(kept, kept) - half**2 * scatter, added.ravel())
    return nbeta / 2 * HESSIAN.ravel() @ moments


def test_control_variates_remove_the_noise_at_the_center():
    """Same settings, SGLD with a long step: heated by the noise of labels without them, and not with them."""
    given = {"sampler": slt.sgld(2e-4), "num_chains": 8, "num_draws": 3000, "num_warmup": 500, "batch_size": 8}
    target = posterior(localization=0.1)
    on, off = (estimate(target, 1.0, budget=None, control_variate=c, **given) for c in (True, False))
    for result, label in ((on, 0.0), (off, 1.0)):
        assert abs(result.llc_raw - heated(result.settings, label)) < 4 * result.llc_raw_stderr < 1
    assert abs(on.llc - exact_llc(on.settings)) < 4 * on.llc_stderr < 1


def test_half_of_the_chains_start_hot_and_come_down():
    result = estimate(hot=50.0, num_chains=4)
    warm = result.warmup_loss - 0
    early = warm[:, 20:80].mean(1)
    assert early[1::2].min() > 5 * early[::2].max()
    cold, hot = result.health.bracket
    assert abs(hot - cold) < 6 * result.llc_stderr


def test_hot_starts_change_nothing_for_the_cold():
    hot, cold = estimate(hot=50.0), estimate(hot=1.0)
    np.testing.assert_array_equal(hot.loss_trace[::2], cold.loss_trace[::2])
    assert (hot.warmup_loss[1::2] != cold.warmup_loss[1::2]).any()


def test_same_key_same_choice():
    first, again = (estimate(key=3) for _ in range(2))
    assert first.settings.calibration == again.settings.calibration
    np.testing.assert_array_equal(first.loss_trace, again.loss_trace)


def test_an_interrupted_run_keeps_its_choice(tmp_path):
    """Kills: a calibration made anew on resuming, at its full cost."""
    whole = estimate(checkpoint_dir=tmp_path / "run")
    path = tmp_path / "run" / "calibration.json"
    kept = json.loads(path.read_text())
    assert kept["step_size"] == whole.settings.step_size
    signature = {name: kept.pop(name) for name in ("note_format", "sha256")}
    kept["lines"] = ["told by the file"]
    path.write_text(json.dumps({**kept, **signature, "sha256": digest_of_json(kept)}))
    again = estimate(checkpoint_dir=tmp_path / "run")
    assert again.settings.calibration["lines"] == ["told by the file"]
    np.testing.assert_array_equal(again.loss_trace, whole.loss_trace)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"calibration\.json is truncated"):
        estimate(checkpoint_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": 10}, "Raise the budget"),
        ({"budget": 100, "num_draws": 5}, "Give one of them"),
        ({"hot": 0.5}, "at least 1"),
        ({"control_variate": 3}, "True, False or None"),
        ({"budget": 2.5}, "whole number"),
    ],
)
def test_what_cannot_be_used_is_refused(given, words):
    with pytest.raises((ValueError, TypeError), match=words):
        estimate(**given)


def test_a_quartic_at_rest_has_a_step_all_the_same():
    """The Hessian at w* is zero: a step from it alone would be endless. Its LLC by quadrature, 0.249."""
    target = slt.LocalPosterior(lambda p, x: (p - 1) ** 4 + 0 * x[:, 0], jnp.float32(1), 4000)
    result = slt.estimate_llc(target, X[:, :1], budget=100_000)
    away, nbeta = np.linspace(-2, 2, 20_001), result.settings.nbeta
    weight = np.exp(-nbeta * away**4 - result.settings.localization / 2 * away**2)
    assert abs(result.llc - nbeta * (weight @ away**4) / weight.sum()) < 4 * result.llc_stderr < 0.04
    assert not result.stopped


def test_batches_from_the_host_are_calibrated_too(tmp_path):
    tokens = RNG.integers(0, 5, 4000).astype(np.uint16)
    np.save(tmp_path / "t.npy", tokens)
    data = slt.token_file(tmp_path / "t.npy", 4, vocab_size=5)
    target = slt.LocalPosterior(lambda p, x: 0.5 * ((x - 2) @ p["w"]) ** 2, {"w": jnp.zeros(4)}, data.num_data)
    result = slt.estimate_llc(target, data, budget=4_000, batch_size=50)
    assert abs(result.llc - 2) < 5 * result.llc_stderr


def test_a_pilots_chain_that_was_thrown_off_does_not_set_the_step():
    """With this key the pilot of x^2 y^2 ends where the curvature is 1e24; it starts anew, with a shorter step."""
    target = by_name("x^2 y^2")
    result = slt.estimate_llc(
        slt.LocalPosterior(target.loss_fn, target.center, target.num_data, localization=1.0), target.data,
        budget=10_000, key=99,
    )  # fmt: skip
    assert result.settings.calibration["curvature"] < 1e5
    assert abs(result.llc - target.exact(result.settings.nbeta, 1.0)) < 4 * result.llc_stderr


def test_a_loss_that_never_moves_says_so():
    """Kills: the advice to draw more, where each of hundreds of draws is the same."""
    flat = slt.LocalPosterior(lambda p, xy: 1.0 + 0 * p["w"][0] * xy[1], {"w": jnp.ones(8)}, 4000, localization=1.0)
    result = slt.estimate_llc(flat, (X, NOISE), sampler=slt.sgld(1e-3), num_draws=40, num_warmup=4)
    assert result.verdict == "too few draws"
    assert "did not move" in result.health.reason


@pytest.mark.quick
@pytest.mark.parametrize(
    ("num_free", "budget"),
    [(1, 2_000_000), (4, 1_000_000), (10, 400_000), (250, 400_000), (1000, 100_000), (10_000, 10_000), (10**8, 10_000)],
)
def test_the_default_budget_is_about_the_same_time_for_all_but_the_smallest_and_largest(num_free, budget):
    assert default_budget(num_free) == budget


@pytest.mark.parametrize(
    ("given", "chains"),
    [
        ({"budget": 499}, 1),
        ({"budget": 500}, 2),
        ({"budget": 3999}, 2),
        ({"budget": 4000}, 4),
        ({"budget": 499, "num_chains": 4}, 4),
        ({"budget": 600, "chain_batch": 1}, 4),
        ({"budget": 600, "mesh": chain_mesh(4)}, 4),
    ],
    ids=str,
)
def test_a_small_budget_has_fewer_chains(given, chains):
    """Kills: fewer chains than were asked for, or than a layout that was asked for needs."""
    assert estimate(**given).settings.num_chains == chains


def test_one_chain_gets_where_four_do_not():
    target = by_name("quadratic, d = 20, 1 decades")
    posterior = slt.LocalPosterior(target.loss_fn, target.center, target.num_data)
    one, four = (slt.estimate_llc(posterior, target.data, budget=300, num_chains=n) for n in (None, 4))
    exact = target.exact(one.settings.nbeta, one.settings.localization)
    assert abs(one.llc - exact) < 4 * one.llc_stderr < 0.5 * exact
    assert four.llc < 0.7 * exact


def test_a_short_estimate_is_compiled_once():
    """Kills: a program of the pilot's own, for traces of another length."""
    data = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, jnp.zeros(3), 300)
    before = run_chunk._cache_size()
    result = slt.estimate_llc(posterior, data, budget=800, batch_size=50)
    assert result.settings.num_warmup + result.settings.num_draws < 512
    assert run_chunk._cache_size() == before + 1
