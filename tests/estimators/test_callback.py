"""``callback`` sees the run between its chunks."""

import math

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.estimators import llc
from slt_jax.results.observed import pooled_moments
from tests.small import DATA, estimate, refuses


@pytest.mark.quick
def test_it_is_called_with_the_result_so_far(monkeypatch):
    """Kills: the draws of the whole run, NaN where they are not yet taken; a call that changes the numbers."""
    monkeypatch.setattr(llc, "_CALLBACK_SECONDS", 0.0)
    seen = []
    result = estimate(num_draws=30, chunk_size=5, callback=lambda step, partial: seen.append((step, partial)))
    steps = [step for step, _ in seen]
    assert steps == sorted(set(steps))
    assert len(steps) >= 4
    assert steps[-1] == 32
    for step, partial in seen:
        assert isinstance(partial, slt.LLCResult)
        assert partial.loss_trace.shape == (4, step - 2)
        np.testing.assert_array_equal(partial.loss_trace, result.loss_trace[:, : step - 2])
        assert math.isfinite(partial.llc)
        assert not partial.interrupted
    np.testing.assert_array_equal(estimate(num_draws=30).loss_trace, result.loss_trace)


def test_it_is_given_what_was_observed_so_far(monkeypatch, tmp_path):
    """Kills: values that are not yet drawn; a file cut to the draws so far, while the run goes on."""
    monkeypatch.setattr(llc, "_CALLBACK_SECONDS", 0.0)
    observe = {
        "values": DATA[:5], "disk": slt.Observable(DATA[:5], path=tmp_path / "disk"),
        "moments": slt.Observable(DATA[:5], keep="moments"),
    }  # fmt: skip
    seen = []
    whole = estimate(
        num_draws=30, chunk_size=5, observe=observe, callback=lambda step, partial: seen.append((step - 2, partial))
    )
    values = whole.observed["values"].values
    assert len(seen) >= 4
    for draws, partial in seen:
        assert list(partial.observed) == ["values", "moments"]
        kept, streamed = partial.observed["values"], partial.observed["moments"]
        np.testing.assert_array_equal(kept.values, values[:, :draws])
        np.testing.assert_array_equal(kept.gap, whole.observed["values"].gap[:, :draws])
        assert streamed.moments.count.sum() == 4 * draws
        for name, value in pooled_moments(kept).items():
            found = pooled_moments(streamed)[name]
            np.testing.assert_allclose(found, value, 1e-4, 1e-4 * np.abs(value).max(), err_msg=f"{name}, {draws}")
    np.testing.assert_array_equal(np.asarray(whole.observed["disk"].values), values)


@pytest.mark.quick
def test_it_is_called_about_once_a_second_and_at_the_end():
    """Kills: hundreds of calls a second where steps take a microsecond."""
    steps = []
    estimate(num_draws=3000, callback=lambda step, partial: steps.append(step))
    assert steps[-1] == 3002
    assert len(steps) < 8


def test_its_errors_are_the_callers(tmp_path):
    def fail(step, partial):
        raise RuntimeError("the tracker is gone")

    with pytest.raises(RuntimeError, match="the tracker is gone"):
        estimate(callback=fail, checkpoint_dir=tmp_path / "run")


def test_what_cannot_be_called_is_refused():
    words = "callback must be a function callback(step, partial_result), got 3"
    refuses(TypeError, lambda: estimate(callback=3), words)
