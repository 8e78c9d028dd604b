"""A result: what it says, and what comes back from disk."""

import json
import math

import matplotlib
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.report.training import plot_training
from tests.small import made_result, traces_of, with_traces

SETTINGS = {
    "num_chains": 3, "num_draws": 40, "num_warmup": 5, "thinning": 2, "batch_size": 8, "nbeta": 10.0, "step_size": 1e-3,
    "localization": 2.0, "num_data": 100, "num_free": 6, "sampler": "sgld", "family": "euler", "devices": "1 x cpu",
    "versions": {}, "cost": {"seconds": 12.0, "steps_per_s": 345.6, "process_peak_mib": 789},
}  # fmt: skip


def result(stopped=None, draws=40, **settings):
    rng = np.random.default_rng(0)
    loss, virial = (rng.normal(c, 0.05, size=(3, draws)).astype(np.float32) for c in (0.7, 6.0))
    baseline = rng.normal(0.2, 0.001, size=(3, draws)).astype(np.float32)
    warmup = rng.normal(0.5, 0.05, size=(3, 5)).astype(np.float32)
    for chain, step in (stopped or {}).items():
        loss[chain, max(step - 5, 0) // 2 :] = np.nan
    return made_result(
        loss, warmup, {**SETTINGS, **settings}, baseline=baseline, virial=virial, stopped=stopped, notes=("a note",)
    )


@pytest.mark.quick
def test_the_estimate_is_nbeta_times_the_gap():
    r = result()
    gap = r.loss_trace.astype(float) - r.baseline_trace.astype(float)
    assert r.llc_raw == pytest.approx(10 * gap.mean(), rel=1e-12)
    drift_sq, virial = r.traces.drift_sq.mean(), r.traces.virial.mean()
    assert r.llc == pytest.approx(10 * gap.mean() - 1e-3 / 8 * (drift_sq - 2 * virial), rel=1e-6)
    assert r.llc_stderr == pytest.approx(10 * gap.std(ddof=1) / math.sqrt(r.ess), rel=1e-9)
    assert r.health.virial == pytest.approx(r.traces.virial.mean() / (6 + 1e-3 / 4), rel=1e-5)


@pytest.mark.quick
def test_printed_it_is_a_paragraph():
    text = str(result(stopped={1: 25}))
    r = result(stopped={1: 25})
    for part in (
        f"LLC {r.llc:.4g} +/- {r.llc_stderr:.2g}", "Verdict: diverged", "step_size 0.001", "nbeta 10", "localization 2",
        "thinning 2", "chain 1 at step 25", "Note: a note", "12 s", "345.6 steps/s", "789 MiB",
    ):  # fmt: skip
        assert part in text


def test_stopped_chains_are_left_out():
    whole, part = result(), result(stopped={1: 25})
    gap = (whole.loss_trace.astype(float) - whole.baseline_trace)[[0, 2]]
    assert part.llc_raw == pytest.approx(10 * gap.mean())
    none = result(stopped={0: 5, 1: 5, 2: 5})
    assert math.isnan(none.llc)
    assert none.verdict == "diverged"
    json.dumps(none.to_dict(), allow_nan=False)


def test_a_loss_of_zero_is_a_value():
    """Kills: `if not init_loss`."""
    r = with_traces(result(), baseline=np.zeros((3, 40), np.float32))
    assert r.init_loss == 0.0
    assert r.llc_raw == pytest.approx(10 * r.loss_trace.mean(), rel=1e-6)
    assert r.to_dict()["init_loss"] == 0.0


def test_wbic_only_at_its_own_temperature():
    assert math.isnan(result().wbic)
    r = result(nbeta=100 / math.log(100))
    assert r.wbic == pytest.approx(100 * r.loss_trace.mean(), rel=1e-6)


@pytest.mark.quick
def test_disk_gives_back_every_bit(tmp_path):
    r = result(stopped={1: 25})
    r.save(tmp_path / "r.zarr")
    back = slt.load_result(tmp_path / "r.zarr")
    for name, value in traces_of(r).items():
        np.testing.assert_array_equal(traces_of(back)[name], value, err_msg=name)
    for name in ("stopped", "settings", "notes", "other_names"):
        assert getattr(back, name) == getattr(r, name)
    assert str(back) == str(r)


def test_xarray_has_named_axes():
    tree = result().to_xarray()
    assert tree["sample_stats"]["loss_trace"].dims == ("chain", "draw")
    assert tree["warmup_sample_stats"]["loss"].dims == ("chain", "step")


def test_an_existing_path_is_kept_unless_told(tmp_path):
    path = result().save(tmp_path / "r.zarr")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        result().save(path)
    assert result(draws=20).save(path, overwrite=True) == path
    assert slt.load_result(path).loss_trace.shape == (3, 20)


def labels(figure):
    return [text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel())]


@pytest.mark.parametrize("case", [{}, {"stopped": {1: 25}}, {"draws": 1}, {"stopped": {0: 5, 1: 5, 2: 5}}])
def test_traces_are_drawn(tmp_path, case):
    figure = result(**case).plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "minibatch loss (nats per example)" in labels(figure)
    assert "running LLC" in labels(figure)
    assert matplotlib.rcParams["axes.spines.top"]  # the caller's settings are left alone


def test_training_is_drawn(tmp_path):
    runs = [result(), result(stopped={1: 25})]
    figure = plot_training([10, 100], [3.0, 2.0], runs, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert {"training step", "local learning coefficient", "loss (nats per byte)"} <= set(labels(figure))
    assert {t.get_text() for t in figure.axes[0].get_legend().get_texts()} >= {"* not converged", "loss"}


def test_only_a_result_is_replaced(tmp_path):
    """Kills: overwrite=True empties somebody's folder."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not a result of slt-jax"):
        result().save(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "precious").read_text() == "mine"


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = result().save(tmp_path / "r.zarr")
    import xarray

    def full(self, target, **_):
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xarray.DataTree, "to_zarr", full)
    with pytest.raises(OSError, match="No space left on device"):
        result(draws=20).save(path, overwrite=True)
    monkeypatch.undo()
    assert slt.load_result(path).loss_trace.shape == (3, 40)
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_no_error_bar_is_said_in_words():
    assert "without an error bar" in str(result(draws=1))
    assert "nan" not in str(result(draws=1)).partition("\n")[0].replace("R-hat nan, ESS nan", "")
    assert str(result(stopped={0: 5, 1: 5, 2: 5})).startswith("LLC unknown")
