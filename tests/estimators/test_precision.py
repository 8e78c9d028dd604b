"""Estimates that go on until they are precise enough: their numbers, limits, notes, and interruptions."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.durable import watched
from tests.small import posterior, refuses, traces_of

DATA = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
SGLD = slt.sgld(0.003, noise="leimkuhler-matthews")
GIVEN = {"sampler": SGLD, "num_chains": 4, "batch_size": 200, "thinning": 4, "chunk_size": 512}


def regression(**more):
    """Six weights, no label noise: in the mean over draws, 3 less the share of the localization."""
    return posterior(center=jnp.zeros(6), num_data=200, nbeta=50.0, **more)


def run(target=None, **more):
    return slt.estimate_llc(regression() if target is None else target, DATA, **{**GIVEN, **more})


@pytest.mark.quick
def test_it_goes_on_until_the_error_is_small_enough():
    """Kills: draws before the split counted, a state that starts anew, an error that is not relative."""
    result = run(target_error=0.005, budget=900_000)
    x = 50.0 * np.linalg.eigvalsh(DATA.T @ DATA / 200)
    truth = float(np.sum(x / (x + 1.0)) / 2)
    assert result.llc_stderr <= 0.005 * result.llc
    assert result.llc_stderr > 0.0025 * result.llc  # it stopped there
    assert abs(result.llc - truth) < 4 * result.llc_stderr
    assert not any("target_error" in note for note in result.notes)
    s = result.settings
    assert abs(s.num_warmup / (s.num_warmup + s.thinning * s.num_draws) - 0.4) < 0.01
    assert s.gradients["steps"] == 4 * (s.num_warmup + s.thinning * s.num_draws)


def test_rounds_are_one_run():
    """Kills: keys, or a place of the draws, that depend on the round."""
    result = run(target_error=0.005, budget=900_000)
    s = result.settings
    first = 16_665
    rest = (s.num_warmup + s.num_draws * s.thinning - first) // s.thinning
    whole = run(num_warmup=first, num_draws=rest)
    for name, trace in traces_of(result).items():
        if name not in ("tilt", "warmup_loss"):
            np.testing.assert_array_equal(trace, traces_of(whole)[name][:, -s.num_draws :], err_msg=name)
    assert s.num_draws < rest


def test_a_budget_that_is_too_small_is_named():
    """Kills: a recommended budget that does not do, or is far too large."""
    result = run(target_error=0.005, budget=20_000)
    (note,) = [note for note in result.notes if "target_error" in note]
    assert "target_error = 0.005 was not reached within budget = 20,000: the error is " in note
    needed = int(re.search(r"About budget=([\d_]+) would do", note)[1].replace("_", ""))
    assert sum(result.settings.spent.values()) <= 20_000
    exact = 20_000 * (result.llc_stderr / (0.005 * result.llc)) ** 2
    assert exact / 2 < needed < 2 * exact
    more = run(target_error=0.005, budget=int(1.3 * needed))
    assert more.llc_stderr <= 0.005 * more.llc


def test_minutes_are_a_limit():
    result = run(target_error=0.001, budget=10_000_000, minutes=1e-4)
    assert any("within budget = 10,000,000 or minutes = 0.0001" in note for note in result.notes)
    assert result.settings.num_draws * result.settings.thinning < 30_000


def test_soft_directions_are_waited_for():
    """Kills: a small error that ends a run whose soft directions are still filling."""
    soft = np.array([1, 1, 1, 1, 0.02, 0.02], np.float32)
    target = regression(loss_fn=lambda w, x: 0.5 * (x @ (w * soft)) ** 2, localization=1e-4)
    result = run(target, target_error=0.3, budget=2_000_000)
    short = run(target, budget=166_666)
    assert "still rising" in short.health.flags
    assert short.llc_stderr < 0.3 * short.llc
    assert "still rising" not in result.health.flags
    assert result.settings.spent["steps"] > 1.9 * short.settings.spent["steps"]


@pytest.mark.parametrize("part", [0, 1])
def test_interrupted_and_resumed(tmp_path, part):
    """Kills: a round that starts anew; a decision that is taken again."""
    unbroken = run(target_error=0.005, budget=700_000)
    with watched(stop_at=12_000 if part == 0 else 50_000, part=part), pytest.raises(KeyboardInterrupt):
        run(target_error=0.005, budget=700_000, checkpoint_dir=tmp_path / "run", checkpoint_seconds=0)
    resumed = run(target_error=0.005, budget=700_000, checkpoint_dir=tmp_path / "run")
    for name, trace in traces_of(unbroken).items():
        np.testing.assert_array_equal(traces_of(resumed)[name], trace, err_msg=name)
    with watched() as begun:
        run(target_error=0.005, budget=700_000, checkpoint_dir=tmp_path / "run")
    assert begun == []


def test_a_larger_budget_goes_on_with_the_same_run(tmp_path):
    few = run(target_error=0.005, budget=200_000, checkpoint_dir=tmp_path / "run")
    with watched() as begun:
        more = run(target_error=0.005, budget=900_000, checkpoint_dir=tmp_path / "run")
    assert any("target_error" in note for note in few.notes)
    assert min(begun) >= 40_000
    assert more.llc_stderr <= 0.005 * more.llc


def test_open_settings_are_calibrated_once():
    target = posterior(center=jnp.zeros(6), num_data=200, localization=None)
    result = slt.estimate_llc(target, DATA, target_error=0.05, num_chains=2)
    assert result.llc_stderr <= 0.05 * result.llc
    assert result.verdict == "converged"


@pytest.mark.usefixtures("wrong_types")
def test_what_is_refused():
    for bad in (0, -0.1, float("nan")):
        refuses(
            ValueError, lambda bad=bad: run(target_error=bad), f"target_error must be a finite number > 0, got {bad}"
        )
    refuses(ValueError, lambda: run(target_error=3), "target_error must be below 1, got 3", "0.03 for 3 %")
    refuses(TypeError, lambda: run(target_error="3%"), "target_error must be a finite number", "'3%'")
    refuses(ValueError, lambda: run(target_error=0.1, num_draws=10), "num_draws = 10", "Give one of them")
    refuses(ValueError, lambda: run(minutes=3.0), "minutes = 3.0 is a limit for target_error")
    refuses(ValueError, lambda: run(target_error=0.1, minutes=0), "minutes must be a finite number > 0, got 0")
