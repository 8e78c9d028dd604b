"""The LLC over checkpoints: each one's estimate, one compilation, one setting that serves the sharpest, resumed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import slt_jax as slt
from slt_jax.results.plateau import SETTLED
from tests.durable import watched
from tests.small import refuses, traces_of

DATA = jax.random.normal(jax.random.key(1), (200, 6))
PLAN = {"num_chains": 4, "num_draws": 600, "num_warmup": 20, "batch_size": 40, "key": 5}
STEPS = (0, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
RANKS = (1, 1, 1, 3, 3, 3, 6, 6, 6)


def center(rank):
    return {"on": (jnp.arange(6) < rank).astype(jnp.float32), "w": jnp.full(6, 10.0 * rank)}


CENTERS = {step: center(rank) for step, rank in zip(STEPS, RANKS, strict=True)}


def loss_at_own(p, x):
    """Least at each checkpoint's own ``w``, told by ``on``; the LLC is half the number that are on."""
    return 0.5 * jnp.sum((x * p["on"] * (p["w"] - 60 * jnp.mean(p["on"]))) ** 2, -1)


def posterior(loss=loss_at_own, **numbers):
    numbers = {"nbeta": 50.0, "localization": 0.5, **numbers}
    return slt.LocalPosterior(loss, center(1), 200, mask=lambda path: path == ("w",), **numbers)


def run(centers=CENTERS, target=None, **changes):
    target = posterior() if target is None else target
    return slt.trajectory(target, centers, DATA, **{"sampler": slt.sgld(1e-2), **PLAN, **changes})


@pytest.fixture(scope="module")
def cold():
    return run(warm_start=False)


@pytest.fixture(scope="module")
def warm():
    return run()


@pytest.mark.quick
@pytest.mark.parametrize("step", [10, 1000])
def test_without_a_warm_start_it_is_the_estimate_of_each(cold, step):
    """Kills: another checkpoint's weights; a key used twice."""
    alone = slt.estimate_llc(
        slt.LocalPosterior(loss_at_own, CENTERS[step], 200, 50.0, 0.5, mask=lambda path: path == ("w",)), DATA,
        sampler=slt.sgld(1e-2), **{**PLAN, "key": jax.random.fold_in(jax.random.key(5), step)},
    )  # fmt: skip
    found = cold.results["all"][STEPS.index(step)]
    for name, values in traces_of(found).items():
        np.testing.assert_allclose(values, traces_of(alone)[name], rtol=1e-6, err_msg=name)
    assert found.llc == pytest.approx(alone.llc, rel=1e-6)


def exact(rank):
    curvature = 50.0 * np.asarray((DATA[:, :rank] ** 2).mean(0), float)
    return float(np.sum(curvature / (curvature + 0.5)) / 2)


@pytest.mark.parametrize("warm_start", [True, False])
def test_estimates_are_those_of_the_posteriors(warm_start):
    """Half the number of directions that count, less the localization's share, at each checkpoint."""
    found = run(warm_start=warm_start, num_draws=1500, num_warmup=200, sampler=slt.underdamped(1e-2, 0.3))
    for result, rank in zip(found.results["all"], RANKS, strict=True):
        assert abs(result.llc - exact(rank)) < 4 * result.llc_stderr, rank


def test_chains_start_where_those_before_ended(warm, cold):
    """As far from the new w* as from the old. Kills: a start at w*; at the old place."""
    np.testing.assert_array_equal(warm.results["all"][0].loss_trace, cold.results["all"][0].loss_trace)
    for result in cold.results["all"]:
        assert (result.warmup_loss[:, 0] < 1e-9).all()
    for at in (1, 4):  # those whose posterior is that of the one before
        first, later = warm.results["all"][at].warmup_loss[:, 0], warm.results["all"][at].loss_trace
        assert (first > 1e-6).all()
        assert first.mean() < 10 * later.mean()
    assert warm.results["all"][3].warmup_loss[:, 0].max() < 50  # at the old place about 3 / 2 x 20^2


def test_chains_that_have_not_settled_are_not_carried(tmp_path):
    """Kills: a chain that got lost and is taken along; states of done checkpoints that stay on disk."""
    short = run(num_draws=8, num_warmup=0, checkpoint_dir=tmp_path / "run")
    assert {r.verdict for r in short.results["all"]}.isdisjoint(SETTLED)
    for result in short.results["all"]:
        assert (result.loss_trace[:, 0] < 1e-9).all()
    kept = sorted(p.name for p in (tmp_path / "run" / "all").iterdir() if p.suffix != ".zarr")
    assert kept == ["step-30000"]


@pytest.mark.quick
@pytest.mark.parametrize("given", [{}, {"observe": {"probe": DATA[:7]}, "num_draws": 20}], ids=["plain", "observed"])
def test_all_checkpoints_share_a_program(given):
    """Kills: a checkpoint that became part of the program."""
    counts = []
    for steps in (STEPS[:1], STEPS):
        traces = []

        def loss(p, x, traces=traces):
            traces.append(1)
            return loss_at_own(p, x)

        run({step: CENTERS[step] for step in steps}, posterior(loss), warm_start=False, **given)
        counts.append(len(traces))
    assert counts[0] == counts[1]


def of_scales(scales, sampler, localization=None, **lengths):
    """Checkpoints 1, 2, ... of which the curvatures of the loss are these numbers squared."""

    def loss(p, x):
        return 0.5 * jnp.sum((x * p["scale"] * p["w"]) ** 2, -1)

    centers = {s: {"scale": jnp.float32(c), "w": jnp.zeros(6)} for s, c in enumerate(scales, start=1)}
    target = slt.LocalPosterior(loss, centers[1], 200, 50.0, localization, mask=lambda path: path == ("w",))
    return slt.trajectory(target, centers, DATA, **{**PLAN, "sampler": sampler, **lengths})


def test_the_step_size_serves_the_sharpest_checkpoint():
    """Curvatures of 1, 100 and 10: calibrated at the second. A step for the first would be 100 times too long."""
    found = of_scales((1.0, 10.0, 3.2), None, num_draws=300, num_warmup=200)
    sharpest = 50.0 * 100.0 * float(np.linalg.eigvalsh(np.asarray(DATA.T @ DATA) / 200)[-1])
    assert 0.02 < found.setting["step_size"] * sharpest < 0.5
    assert found.setting["friction"] > 0
    assert not found.unserved()
    assert len({r.settings.step_size for r in found.results["all"]}) == 1


def test_a_setting_that_does_not_serve_is_told():
    found = of_scales((1.0, 3.0), slt.sgld(5e-3), localization=0.5, num_draws=2000, num_warmup=500)
    assert found.unserved() == {2: "biased by the step size"}
    assert "is not right for 2 (biased by the step size): take a shorter step_size for all" in str(found)
    assert "friction" not in str(found)  # SGLD has none


def test_parts_have_results_of_their_own():
    """Two halves of the weights: their LLCs add up to the whole's, as the loss is a sum over them."""

    def half(posterior, low):
        mask = {"on": np.zeros(6, bool), "w": (np.arange(6) < 3) == low}
        return slt.LocalPosterior(posterior.loss_fn, posterior.center, 200, 50.0, 0.5, mask)

    parts = {"low": functools.partial(half, low=True), "high": functools.partial(half, low=False)}
    found = run({7: center(6)}, parts=parts, num_draws=800, sampler=slt.underdamped(1e-2, 0.3))
    assert list(found.results) == ["all", "low", "high"]
    whole, low, high = (found.results[name][0] for name in found.results)
    assert [r.settings.num_free for r in (whole, low, high)] == [6, 3, 3]
    errors = np.array([r.llc_stderr for r in (whole, low, high)])
    assert abs(whole.llc - low.llc - high.llc) < 4 * np.sqrt(np.sum(errors**2))
    assert found.dataset.llc.sel(part="low").values == pytest.approx(low.llc)
    with pytest.raises(KeyError, match="no part 'middle' in this trajectory, which has all, low, high"):
        found.stages_of("middle")


@pytest.mark.quick
def test_a_tree_for_a_part_is_refused():
    """What susceptibilities takes for a component. Kills: 'dict' object is not callable."""
    parts = {"low": {"on": False, "w": np.arange(6) < 3}}
    refuses(TypeError, lambda: run({7: center(6)}, parts=parts), "parts['low']", "function of a path", "mask=tree")


def test_stages_are_found(warm):
    """Ranks 1, 3, 6, three checkpoints each."""
    assert warm.stages is not None
    assert [b.between for b in warm.stages.boundaries] == [(30, 100), (1000, 3000)]
    assert str(warm.stages) in str(warm)
    assert run({1: center(1), 2: center(3)}).stages is None


@pytest.mark.quick
def test_saved_and_read_again(warm, tmp_path):
    warm.save(tmp_path / "t.zarr")
    again = slt.load_trajectory(tmp_path / "t.zarr")
    assert not again.interrupted
    dataclasses.replace(warm, interrupted=20).save(tmp_path / "cut.zarr")
    assert slt.load_trajectory(tmp_path / "cut.zarr").interrupted == 20
    assert json.dumps(again.to_dict()) == json.dumps(warm.to_dict())
    assert str(again) == str(warm)
    with pytest.raises(ValueError, match=r"holds a trajectory, not a sweep. Read it with load_trajectory"):
        slt.load_sweep(tmp_path / "t.zarr")


@pytest.mark.parametrize("stop_at", [(0, 200), (1, 0), (7, 200)])
def test_interrupted_and_resumed(warm, tmp_path, stop_at):
    """In the first checkpoint, at the beginning of the second, in the middle of the eighth; loaded by functions."""
    checkpoint, step = stop_at
    options = {"checkpoint_dir": tmp_path / "run", "chunk_size": 200, "checkpoint_seconds": 0}
    with watched(step, checkpoint):
        if checkpoint:
            so_far = run(**options)
            assert so_far.steps == STEPS[:checkpoint]
            assert f"Interrupted after {checkpoint} of {len(STEPS)} checkpoints." in str(so_far)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(**options)
    again = run({step: lambda c=c: c for step, c in CENTERS.items()}, **options)
    for one, other in zip(again.results["all"], warm.results["all"], strict=True):
        for name, values in traces_of(one).items():
            np.testing.assert_array_equal(values, traces_of(other)[name], err_msg=name)
    kept = sorted(p.name for p in (tmp_path / "run" / "all").iterdir())
    assert kept == sorted([*(f"step-{s}.zarr" for s in STEPS), "step-30000"])
    with pytest.raises(ValueError, match=r"another steps"):
        run({1: center(1)}, **options)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, TypeError, "an empty dict"),
        ([center(1)], TypeError, "a list"),
        ({"one": center(1)}, ValueError, "'one'"),
        ({-1: center(1)}, ValueError, "-1"),
        ({1: {"w": jnp.zeros(6)}}, ValueError, "the checkpoint of step 1: "),
        ({1: {"on": jnp.ones(6), "w": jnp.zeros(7)}}, ValueError, r"'w' has shape \(7,\) there, \(6,\) here"),
        ({1: {"on": jnp.ones(6), "w": jnp.full(6, jnp.nan)}}, ValueError, "the checkpoint of step 1: parameter 'w'"),
    ],
)
def test_checkpoints_that_cannot_be_used(given, error, words):
    with pytest.raises(error, match=words):
        run(given)


OBSERVE = {"probe": DATA[:7], "sums": slt.Observable(DATA[:7], keep="moments")}
FEW = tuple(STEPS[k] for k in (0, 3, 8))


def observing(**changes):
    given = {
        "centers": {s: CENTERS[s] for s in FEW},
        "observe": OBSERVE,
        "num_draws": 40,
        "warm_start": False,
        **changes,
    }
    return run(**given)


def test_what_is_observed_is_that_of_each_checkpoint(tmp_path):
    """Kills: losses of another checkpoint's weights, observing that changes the draws, a covariance of other signs."""
    found, bare = observing(), observing(observe=None)
    over = {name: found.observed(name) for name in OBSERVE}
    for k, step in enumerate(FEW):
        result = found.results["all"][k]
        np.testing.assert_array_equal(result.loss_trace, bare.results["all"][k].loss_trace)
        alone = slt.estimate_llc(
            dataclasses.replace(posterior(), center=CENTERS[step]), DATA, sampler=slt.sgld(1e-2),
            **{**PLAN, "num_draws": 40, "key": jax.random.fold_in(jax.random.key(5), step)},
            observe={"probe": DATA[:7]},
        ).observed["probe"]  # fmt: skip
        values = np.asarray(alone.values, np.float64).reshape(-1, 7)
        gap = np.asarray(alone.gap, np.float64).reshape(-1)
        expected = {
            "center": loss_at_own(CENTERS[step], DATA[:7]), "mean": values.mean(0), "variance": values.var(0, ddof=1),
            "covariance": (gap - gap.mean()) @ (values - values.mean(0)) / (len(gap) - 1),
        }  # fmt: skip
        for name, data in over.items():
            for key, value in expected.items():
                scale = 1e-4 * np.abs(value).max() + 1e-12
                np.testing.assert_allclose(data[key].values[k], value, rtol=1e-4, atol=scale, err_msg=f"{name} {key}")
    loaded = slt.load_trajectory(found.save(tmp_path / "t.zarr"))
    xr.testing.assert_allclose(loaded.observed("sums"), over["sums"], rtol=1e-6)
    np.testing.assert_array_equal(
        loaded.results["all"][1].observed["probe"].values, found.results["all"][1].observed["probe"].values
    )
    with pytest.raises(KeyError, match="no observable 'other' in this trajectory, which has probe, sums"):
        found.observed("other")


def test_observables_of_a_trajectory_are_resumed(tmp_path):
    """Stopped after the second checkpoint: the third starts as warm as it would have; the values are all there."""
    given = {"warm_start": True, "observe": {"probe": slt.Observable(DATA[:7], path=tmp_path / "values")}}
    whole = observing(**{**given, "observe": {"probe": DATA[:7]}})
    with pytest.raises(RuntimeError, match="stop"):
        observing(
            **given, checkpoint_dir=tmp_path / "run", centers={**{s: CENTERS[s] for s in FEW[:2]}, FEW[2]: stopping}
        )
    found = observing(**given, checkpoint_dir=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "values").iterdir()) == sorted(f"step-{s}" for s in FEW)
    for mine, theirs in zip(found.results["all"], whole.results["all"], strict=True):
        np.testing.assert_array_equal(mine.loss_trace, theirs.loss_trace)
        np.testing.assert_array_equal(np.asarray(mine.observed["probe"].values[:]), theirs.observed["probe"].values)


def stopping():
    raise RuntimeError("stop")


@pytest.mark.quick
def test_common_noise_gives_all_checkpoints_the_same_random_numbers():
    """Three checkpoints with equal weights have equal draws with it, and others without."""
    centers = dict.fromkeys(FEW, CENTERS[0])
    same, other = (observing(centers=centers, common_noise=on, observe=None).results["all"] for on in (True, False))
    np.testing.assert_array_equal(same[0].loss_trace, same[2].loss_trace)
    assert np.abs(other[0].loss_trace - other[2].loss_trace).max() > 0
    with pytest.raises(TypeError, match="common_noise must be True or False, got 1"):
        observing(common_noise=1)
