"""Observables of an estimate: values and moments at its draws, however the run is laid out, kept and ended."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.loop import Engine
from slt_jax.engine.mesh import chain_mesh
from slt_jax.estimators import observing
from tests.durable import watched
from tests.small import posterior as quadratic
from tests.small import refuses, traces_of

DATA = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
PROBE = DATA[:19]
PLAN = {"num_chains": 4, "num_draws": 20, "num_warmup": 5, "thinning": 3, "batch_size": 8}


def loss_fn(params, x):
    return 0.5 * (jnp.tanh(x @ params["w"]) + params["b"] - 0.3) ** 2


def weights(params, x):
    """The parameters themselves, once for each example."""
    return jnp.broadcast_to(jnp.append(params["w"], params["b"]), (len(x), 4))


def observables(**more):
    return {
        "probe": slt.Observable(PROBE, **more),
        "moments": slt.Observable(PROBE, keep="moments"),
        "weights": slt.Observable(DATA[:2], fn=weights),
    }


def estimate(observe=None, **changed):
    center = {"w": jnp.array([0.2, -0.1, 0.4]), "b": jnp.float32(0.1)}
    posterior = slt.LocalPosterior(loss_fn, center, 60, nbeta=20.0, localization=2.0)
    given = {"sampler": slt.sgld(0.02), "also": {"other": DATA[:30]}, **PLAN, **changed}
    return slt.estimate_llc(posterior, DATA, observe=observables() if observe is None else observe, **given)


@pytest.fixture(scope="module")
def whole():
    return estimate()


def assert_same(result, expected, exactly=True):
    """All that was observed, bit for bit or up to rounding."""
    compare = np.testing.assert_array_equal if exactly else lambda a, b, err_msg: np.testing.assert_allclose(
        a, b, 2e-5, 1e-6, err_msg=err_msg
    )  # fmt: skip
    for name, one in expected.observed.items():
        found = result.observed[name]
        if one.values is not None:
            compare(np.asarray(found.values), np.asarray(one.values), err_msg=name)
        for field, value in one.as_moments()._asdict().items():
            compare(getattr(found.as_moments(), field), value, err_msg=f"{name}, {field}")
        compare(found.gap, one.gap, err_msg=f"gap of {name}")


@pytest.mark.quick
def test_values_are_those_of_a_plain_loop(whole):
    """Kills: values after the move, of other draws, of the filled-up rows of the last block, or of other chains."""
    drawn = whole.observed["weights"].values[:, :, 1]
    assert drawn.shape == (4, 20, 4)
    expected = np.array([
        [loss_fn({"w": w[:3], "b": w[3]}, PROBE) for w in chain] for chain in drawn
    ])  # fmt: skip
    np.testing.assert_allclose(whole.observed["probe"].values, expected, 1e-5, 1e-6)
    np.testing.assert_allclose(
        np.sum((drawn - [0.2, -0.1, 0.4, 0.1]) ** 2, axis=-1), whole.traces.distance_sq, rtol=1e-4, atol=1e-7
    )
    at_center = loss_fn({"w": jnp.array([0.2, -0.1, 0.4]), "b": 0.1}, PROBE)
    np.testing.assert_allclose(whole.observed["probe"].center, at_center, 1e-5)


def test_moments_are_those_of_the_values(whole):
    """Kills: blocks that begin elsewhere, a co-moment with another loss, a mean that forgets its chunk."""
    kept, streamed = whole.observed["probe"].as_moments(), whole.observed["moments"].moments
    assert whole.observed["moments"].values is None
    for name in kept._fields:
        scale = np.abs(getattr(kept, name)).max()
        np.testing.assert_allclose(getattr(streamed, name), getattr(kept, name), 1e-5, 1e-5 * scale, err_msg=name)
    assert streamed.count.sum() == 80


def test_a_run_is_the_same_with_and_without(whole):
    """Kills: an observable that takes a random number, moves a chain, or changes a further data set's batches."""
    without = estimate({})
    assert without.observed == {}
    for name, trace in traces_of(without).items():
        np.testing.assert_array_equal(traces_of(whole)[name], trace, err_msg=name)
    np.testing.assert_array_equal(whole.traces.also, without.traces.also)


@pytest.mark.parametrize("changed", [
    {"chunk_size": 4}, {"mesh": 2, "chain_batch": 2}, {"mesh": 1, "chain_batch": 2},
], ids=str)  # fmt: skip
def test_the_layout_of_a_run_changes_nothing(whole, changed):
    """Kills: values of a group written to another's rows, moments that begin anew with each chunk."""
    exactly = "mesh" not in changed
    if not exactly:
        changed = {**changed, "mesh": chain_mesh(4, jax.devices()[: changed["mesh"]])}
    assert_same(estimate(**changed), whole, exactly)


@pytest.mark.parametrize("stop_at", [pytest.param(3, marks=pytest.mark.slow), 30])
def test_a_run_is_resumed_bit_for_bit(tmp_path, whole, stop_at):
    """In memory, as moments and on disk. Kills: what is observed left out of a save, or counted twice."""
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_seconds": 0, "chunk_size": 7}
    with watched(stop_at=stop_at), pytest.raises(KeyboardInterrupt):
        estimate(observables(path=tmp_path / "values"), **options)
    with watched() as begun:
        resumed = estimate(observables(path=tmp_path / "values"), **options)
    assert begun[0] > 0
    assert_same(resumed, whole)
    assert_same(estimate(observables(path=tmp_path / "values"), **options), whole)  # nothing left to do


def test_ctrl_c_leaves_what_was_observed_so_far(tmp_path, whole):
    """Kills: rows of draws that were not taken, in memory or on disk."""
    advance = Engine.advance

    def interrupting(self, run, *rest, **more):
        advance(self, run, *rest, **more)
        if run.drawn >= 11:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"checkpoint_dir": tmp_path / "run", "chunk_size": 7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "advance", interrupting)
        result = estimate(observables(path=tmp_path / "values"), **options)
    drawn = result.settings.num_draws
    assert result.interrupted
    assert 11 <= drawn < 20
    values = np.asarray(result.observed["probe"].values)
    np.testing.assert_array_equal(values, whole.observed["probe"].values[:, :drawn])
    streamed, kept = result.observed["moments"].moments, result.observed["probe"].as_moments()
    assert streamed.count.sum() == kept.count.sum() == 4 * drawn
    pooled = (streamed.count[..., None] * streamed.mean).sum((0, 1)) / (4 * drawn)
    np.testing.assert_allclose(pooled, values.mean((0, 1)), 1e-5)
    assert_same(estimate(observables(path=tmp_path / "values"), **options), whole)


def test_results_are_saved_with_what_was_observed(tmp_path, whole):
    """Kills: an observable, its mask or its place that a file loses."""
    assert_same(slt.load_result(whole.save(tmp_path / "memory.zarr")), whole)
    on_disk = estimate(observables(path=tmp_path / "values"))
    loaded = slt.load_result(on_disk.save(tmp_path / "disk.zarr"))
    assert not isinstance(loaded.observed["probe"].values, np.ndarray)
    assert_same(loaded, whole)
    for name, one in whole.observed.items():
        assert (loaded.observed[name].level, loaded.observed[name].nbeta) == (one.level, 20.0)
        np.testing.assert_array_equal(loaded.observed[name].center, one.center)
    expected = on_disk.observed["probe"].as_moments().m2
    (tmp_path / "values").rename(tmp_path / "elsewhere")
    moved = slt.load_result(tmp_path / "disk.zarr").observed["probe"]
    assert moved.values is None
    np.testing.assert_array_equal(moved.as_moments().m2, expected)
    tree = whole.to_xarray()
    assert tree["observed_0"]["values"].dims == ("chain", "draw", "example")
    assert tree["observed_0"].attrs["name"] == "probe"


def test_values_of_another_run_are_not_written_over(tmp_path):
    """Kills: the only copy of somebody's values replaced."""
    observe = {"probe": slt.Observable(PROBE, path=tmp_path / "values")}
    first = np.asarray(estimate(observe).observed["probe"].values)
    with pytest.raises(FileExistsError, match="'loss_probe' of another run"):
        estimate(observe, key=3)
    import zarr

    stored = zarr.open_array(tmp_path / "values" / "loss_probe", mode="r")
    np.testing.assert_array_equal(stored[:], first)
    assert stored.metadata.dimension_names == ("chain", "draw", "batch_probe")


def test_chains_that_went_non_finite_are_left_out(tmp_path):
    """Kills: rows of one chain under another's number; NaN in the moments of all."""

    def loss(params, x):
        return jnp.where(params["w"] > 1.2, jnp.nan, 1.0) * (x * params["w"]) ** 2

    posterior = slt.LocalPosterior(loss, {"w": jnp.float32(0)}, 60, nbeta=1.0, localization=1.0)
    observe = {
        "values": PROBE[:, 0], "moments": slt.Observable(PROBE[:, 0], keep="moments"),
        "disk": slt.Observable(PROBE[:, 0], path=tmp_path / "values"),
    }  # fmt: skip
    given = {"sampler": slt.sgld(0.1), "num_chains": 8, "num_draws": 30, "num_warmup": 10, "batch_size": 60}
    result = slt.estimate_llc(posterior, DATA[:, 0], observe=observe, key=1, **given)
    assert 0 < len(result.stopped) < 8
    kept = 8 - len(result.stopped)
    values = result.observed["values"].values
    assert values.shape == (kept, 30, 19)
    own = np.square(PROBE[:, 0]) * result.traces.distance_sq[result.kept_chains][..., None]
    np.testing.assert_allclose(values, own, 1e-5, 1e-7)
    np.testing.assert_array_equal(np.asarray(result.observed["disk"].values), values)
    np.testing.assert_allclose(
        result.observed["moments"].moments.m2, result.observed["values"].as_moments().m2, 1e-4, 1e-7
    )


def test_what_does_not_fit_is_kept_as_moments(monkeypatch):
    """Kills: a choice that is not told, or that overrides what was asked for."""
    observe = {"probe": PROBE, "asked": slt.Observable(PROBE, keep="values")}
    assert all(one.values is not None for one in estimate(observe).observed.values())
    monkeypatch.setattr(observing, "MOST_VALUES", 4 * 4 * 20 * 19 * 2 - 1)
    result = estimate(observe)
    assert [one.values is None for one in result.observed.values()] == [True, False]
    assert "of 'probe' only moments were kept" in result.notes[0]
    assert result.settings.observed["probe"] == {"level": "example", "kept": "moments", "shape": [19], "bytes": 7296}
    assert result.settings.observed["asked"]["bytes"] == 4 * 20 * 19 * 4


def test_what_observing_costs_is_counted():
    """A forward pass is a third of a gradient. Kills: a budget that is overdrawn by what is observed."""
    result = estimate()
    assert result.settings.spent["observe"] == pytest.approx(4 * 20 * (19 + 19 + 2) / 8 / 3)
    lengths = {"num_draws": None, "num_warmup": None, "thinning": None}
    settings = estimate(budget=3_000, **lengths).settings
    assert 0.95 * 3_000 < settings.spent["steps"] + settings.spent["observe"] <= 3_000
    assert settings.spent["observe"] < settings.spent["steps"] / 2


def test_rounds_of_a_run_keep_what_their_draws_are(monkeypatch):
    """Kills: warm-up of a longer run among its draws; blocks of an earlier round that are lost or split."""
    monkeypatch.setattr("slt_jax.estimators.precision._FIRST_SHARE", 0.0)  # a first round of 1,600 gradients
    given = {"sampler": slt.sgld(0.003, noise="leimkuhler-matthews"), "batch_size": 60, "thinning": 4}
    observe = {
        "probe": PROBE, "moments": slt.Observable(PROBE, keep="moments"),
        "weights": slt.Observable(DATA[:1], fn=lambda w, x: w[None]),
    }  # fmt: skip
    target = quadratic(center=jnp.zeros(3), num_data=60, nbeta=50.0)
    result = slt.estimate_llc(target, DATA, target_error=0.03, observe=observe, **given)
    settings, values = result.settings, result.observed["probe"].values
    assert settings.num_warmup > 3 * 320  # three rounds, or more
    assert values.shape == (2, settings.num_draws, 19)
    drawn = result.observed["weights"].values[:, :, 0]
    np.testing.assert_allclose(np.sum(drawn**2, axis=-1), result.traces.distance_sq, rtol=1e-5)
    np.testing.assert_allclose(values, 0.5 * (drawn @ PROBE.T) ** 2, 1e-4, 1e-6)
    streamed = result.observed["moments"].moments
    per_chain = int(streamed.count[0].sum())
    assert 8 <= streamed.count.shape[1] <= 32
    assert 0.85 * settings.num_draws < per_chain <= settings.num_draws
    ends = settings.num_draws - per_chain + np.cumsum([0, *streamed.count[0]]).astype(int)
    for start, end, mean, m2 in zip(ends, ends[1:], streamed.mean[0], streamed.m2[0], strict=False):
        np.testing.assert_allclose(values[0, start:end].mean(0), mean, rtol=1e-4)
        np.testing.assert_allclose(values[0, start:end].var(0) * (end - start), m2, rtol=1e-3)


@pytest.mark.quick
def test_an_observable_that_cannot_be_evaluated_is_named():
    """Kills: an error about loss_fn, with the shapes of a batch that is not the run's."""
    refuses(TypeError, lambda: estimate({"held": DATA[:20, :2]}), "observe['held']", ", 2) of float32")
    wrong = {"probe": PROBE, "own": slt.Observable(PROBE, fn=lambda params, x: x @ params["v"])}
    with pytest.raises(KeyError) as error:
        estimate(wrong)
    assert "the function of observe['own'] raised this" in str(error.value)
    pair = {"a": DATA[:4, :1], "b": DATA[:4]}
    with pytest.raises(TypeError, match=r"a \(4, 1\) of float32, b \(4, 3\) of float32"):
        estimate({"pair": slt.Observable(pair, fn=lambda params, x: x["a"] @ params["w"])})


def test_a_custom_observable():
    """An activation, in five lines."""

    def activation(params, x):
        return jnp.tanh(x @ params["w"])

    result = estimate({"activation": slt.Observable(PROBE, fn=activation)})
    assert result.observed["activation"].level == "custom"
    assert result.observed["activation"].values.shape == (4, 20, 19)
    assert result.settings.observed["activation"]["kept"] == "values"
