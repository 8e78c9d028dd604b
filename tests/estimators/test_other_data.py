"""Further data sets: their losses at the draws of a run, against a known truth, and without touching the run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.mesh import chain_mesh
from tests.sources import Rows

DIMENSION, NBETA, GAMMA = 50, 40.0, 2.0
KEYS = jax.random.split(jax.random.key(5), 3)
OWN = jax.random.uniform(KEYS[0], (64,), minval=0.5, maxval=1.5)
OTHER = jax.random.uniform(KEYS[1], (37,), minval=2.0, maxval=4.0)
AWAY = jnp.linspace(-0.3, 0.3, DIMENSION)


def loss_fn(w, rows):
    """Curvature x around w = 0 for the run's own rows; for rows above 1.5, around AWAY."""
    shift = jnp.where(rows > 1.75, 1.0, 0.0)[:, None] * AWAY
    return 0.5 * rows * jnp.sum((w - shift) ** 2, axis=-1)


def estimate(**changed):
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(DIMENSION), 64, NBETA, GAMMA)
    options = {
        "sampler": slt.underdamped(4e-3, 0.3), "num_chains": 4, "num_draws": 500, "num_warmup": 200, "batch_size": 64,
        "key": 1, "also": {"other": OTHER, "own": OWN},
    }  # fmt: skip
    return slt.estimate_llc(posterior, OWN, **{**options, **changed})


@pytest.mark.quick
def test_the_other_loss_has_its_expectation_under_this_posterior():
    result = estimate()
    variance = 1 / (NBETA * OWN.mean() + GAMMA)
    for name, rows in {"other": OTHER, "own": OWN}.items():
        read, expected = result.also[name], NBETA * 0.5 * float(rows.mean()) * DIMENSION * variance
        assert abs(read.llc - expected) < 4 * read.llc_stderr
        assert read.llc_stderr < 0.05 * expected
        assert read.rhat < 1.05
    at_center = result.also["other"].baseline_trace
    exact = 0.5 * float(OTHER.mean()) * float(jnp.sum(AWAY**2))
    assert abs(result.also["other"].init_loss - exact) < 4 * at_center.std() / math.sqrt(at_center.size)
    assert "On 'other': " in str(result)
    assert result.to_dict()["also"]["other"]["llc"] == result.also["other"].llc


@pytest.mark.parametrize(("batch_size", "num_draws"), [(32, 500), (8, 2000)])
def test_the_spread_of_the_batch_is_told(batch_size, num_draws):
    """gap_var is the variance of the batch mean of L' - L'* given w, and the rest is what the chain's motion adds.

    L' - L'* is x (|w|^2 / 2 - <w, AWAY>), with w Gaussian. Kills: the variance of an example for that of the mean; a
    deviation for a variance. The run's own minibatches heat by 0.3 % at most: a third of the smallest error.
    """
    read = estimate(batch_size=batch_size, num_draws=num_draws).also["other"]
    variance = 1 / (NBETA * float(OWN.mean()) + GAMMA)
    mean, moved = DIMENSION * variance / 2, DIMENSION * variance**2 / 2 + float(jnp.sum(AWAY**2)) * variance
    gaps = read.loss_trace.astype(float) - read.baseline_trace
    found = {
        float(OTHER.var()) / batch_size * (mean**2 + moved): read.gap_var,
        float(OTHER.mean()) ** 2 * moved: (gaps - gaps.mean()) ** 2 - read.gap_var,
    }
    for exact, values in found.items():
        quarters = values.reshape(16, -1).mean(1, dtype=float)
        error = quarters.std(ddof=1) / 4
        assert abs(quarters.mean() - exact) < 4 * error < 0.3 * exact


def test_the_run_itself_does_not_change_by_a_bit():
    short = {"num_draws": 20, "num_warmup": 10, "thinning": 3}
    alone, beside = estimate(**short, also=None), estimate(**short)
    np.testing.assert_array_equal(alone.loss_trace, beside.loss_trace)
    assert alone.also == {}
    assert beside.also["own"].loss_trace.shape == (4, 20)
    assert np.isfinite(beside.also["own"].loss_trace).all()


def test_chunks_devices_groups_and_sources_change_nothing(tmp_path):
    short = {"num_draws": 12, "num_warmup": 5, "thinning": 2}
    first = estimate(**short).also
    one = chain_mesh(4, jax.devices()[:1])
    cases = [
        {"chunk_size": 3}, {"mesh": one}, {"mesh": one, "chain_batch": 4}, {"checkpoint_dir": tmp_path / "run"},
        {"also": {"other": Rows(OTHER), "own": OWN}}, {"micro_batches": 4},
    ]  # fmt: skip
    for changed in cases:
        found = estimate(**short, **changed).also
        for name in first:
            np.testing.assert_allclose(found[name].loss_trace, first[name].loss_trace, rtol=1e-5)
    again = estimate(**short, checkpoint_dir=tmp_path / "run").also
    np.testing.assert_allclose(again["other"].loss_trace, first["other"].loss_trace, rtol=1e-5)
    with pytest.raises(ValueError, match="also"):
        estimate(**short, checkpoint_dir=tmp_path / "run", also={"other": 2 * OTHER, "own": OWN})


def test_an_exact_sampler_reads_whole_data_sets():
    result = estimate(sampler=slt.hmc(1e-2), num_draws=20, num_warmup=5, batch_size=None)
    np.testing.assert_allclose(result.also["own"].loss_trace, result.loss_trace, rtol=1e-5)
    assert (result.also["other"].gap_var == 0).all()


def test_a_result_keeps_them_on_disk(tmp_path):
    result = estimate(num_draws=20, num_warmup=10)
    back = slt.load_result(result.save(tmp_path / "r.zarr"))
    assert list(back.also) == ["other", "own"]
    assert back.also["other"].llc == result.also["other"].llc
    tree = result.to_xarray()["also_sample_stats"]
    assert dict(tree.sizes) == {"data_set": 2, "chain": 4, "draw": 20}


@pytest.mark.parametrize("also", [OTHER, {"": OTHER}, {3: OTHER}, {"code": "text"}])
def test_what_is_no_named_data_set_is_refused(also):
    with pytest.raises(TypeError, match=r"also|data leaf"):
        estimate(also=also)


def test_a_file_too_large_to_hold_is_refused(monkeypatch):
    monkeypatch.setattr("slt_jax.posterior.data.MEMORY_LIMIT", 100)
    with pytest.raises(ValueError, match=r"'big' would take .* 25 examples at most"):
        estimate(also={"big": Rows(OTHER)})


def test_a_loss_that_is_not_finite_at_the_center_is_named():
    with pytest.raises(FloatingPointError, match=r"the loss at w\* is nan on the first examples of 'other'"):
        estimate(also={"own": OWN, "other": OTHER.at[3].set(jnp.nan)})
