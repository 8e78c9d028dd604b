"""Rows with a loss that is not finite are named."""

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.small import DATA, estimate, refuses, square
from tests.sources import Rows

MANY = np.random.default_rng(3).normal(size=(2000, 3)).astype(np.float32)
LONG = {"sampler": slt.sgld(1e-5), "num_chains": 2, "num_draws": 200, "num_warmup": 20, "batch_size": 64, "key": 1}


def with_nan(rows):
    data = MANY.copy()
    data[rows, 1] = np.nan
    return data


def near(loss_fn=square, **more):
    return slt.LocalPosterior(loss_fn, jnp.zeros(3), num_data=len(MANY), localization=1.0, **more)


@pytest.mark.parametrize("one_number", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_a_row_that_is_nan_is_named(one_number, host, tmp_path):
    """Kills: "take a smaller step_size" for a NaN in one row of many."""
    loss_fn = (lambda w, x: jnp.mean(square(w, x))) if one_number else square
    data = with_nan([777])
    result = slt.estimate_llc(near(loss_fn), Rows(data) if host else data, **LONG)
    words = "the loss at w* is not finite on row 777 of the data. Repair or remove it."
    assert result.verdict == "diverged"
    assert words in result.health.reason
    assert "step_size" not in result.health.reason
    assert words in str(slt.load_result(result.save(tmp_path / "result")))
    assert not slt.estimate_llc(near(loss_fn), MANY, **LONG).stopped


def test_a_row_that_is_nan_is_named_where_the_calibration_chose():
    result = slt.estimate_llc(near(), with_nan([777]), budget=3000, batch_size=64, key=3)
    assert "row 777 of the data" in result.health.reason


def test_a_row_that_is_nan_is_named_in_sweeps_and_trajectories():
    given = {**LONG, "num_warmup": 20}
    for cell in slt.sweep(near(), with_nan([777]), nbeta=[1.0, 2.0], **given).results:
        assert "row 777 of the data" in cell.health.reason
    course = slt.trajectory(near(), {1: jnp.zeros(3)}, with_nan([777]), **given)
    assert "row 777 of the data" in next(iter(course.results.values()))[0].health.reason


def test_a_step_that_is_too_long_is_told_as_one():
    result = slt.estimate_llc(near(), MANY, **{**LONG, "sampler": slt.sgld(100.0)})
    assert "take a smaller step_size" in result.health.reason


def test_a_batch_that_is_masked_out():
    def loss(w, batch):
        return jnp.sum(batch[1] * square(w, batch[0])) / jnp.sum(batch[1])

    mask = (np.arange(len(MANY)) % 100 == 0).astype(np.float32)
    result = slt.estimate_llc(near(loss), (MANY, mask), **{**LONG, "batch_size": 200})
    for words in ("not finite on a batch", "a mean over a mask that leaves out all of them"):
        assert words in result.health.reason


def test_a_gradient_that_is_not_finite_on_one_row():
    def loss(w, x):
        return square(w, x) + jnp.sqrt(jnp.abs(x[:, 0]) * (1 + jnp.sum(w**2)))

    data = MANY.copy()
    data[32] = 0.0
    result = slt.estimate_llc(near(loss), data, **{**LONG, "batch_size": 16})
    assert "the gradient of the loss at w* is not finite on row 32 of the data" in result.health.reason


def test_a_row_of_the_first_batch_is_named():
    words = ("the loss at w* is nan on the first batch of chain 0", "is not finite on rows 5, 9 of the data")
    refuses(FloatingPointError, lambda: estimate(data=np.where(np.isin(np.arange(40), (5, 9))[:, None], np.nan, DATA),
                                                 batch_size=40), *words)  # fmt: skip
    words = ("on the first examples of 'a'", "on row 5 of the data")
    other = np.where(np.arange(40)[:, None] == 5, np.nan, DATA)
    refuses(FloatingPointError, lambda: estimate(also={"a": other}), *words)


def test_a_measurement_at_the_end_that_fails_costs_no_result(monkeypatch):
    def fails(*_):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", fails)
    result = slt.estimate_llc(near(), MANY, **{**LONG, "num_draws": 2000})
    assert np.isfinite(result.llc)
    assert any("the curvatures at w* at the end failed (LinAlgError: Eigenvalues" in note for note in result.notes)
