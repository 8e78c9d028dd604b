"""Results as ArviZ takes them."""

import sys
import warnings

import numpy as np
import pytest
import xarray as xr

import slt_jax as slt
from tests.small import made_result

SETTINGS = {"nbeta": 100.0, "num_data": 5000, "num_chains": 3, "num_draws": 200, "localization": 1.0, "num_free": 4}


@pytest.fixture(scope="module")
def result():
    rng = np.random.default_rng(0)
    loss = (0.5 + rng.gamma(2.0, size=(3, 200)) / 100).astype(np.float32)
    loss[1, 50:] = np.nan
    baseline = np.full_like(loss, 0.5)
    distance_sq = rng.gamma(2.0, size=(3, 200)).astype(np.float32)
    return made_result(loss, loss[:, :20], SETTINGS, stopped={1: 70}, baseline=baseline, distance_sq=distance_sq)


def summary_of(tree):
    try:
        from arviz import summary
    except (ImportError, AttributeError):  # Python 3.11 has no ArviZ of this time, but has its parts
        from arviz_stats import summary
    return summary(tree)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of ArviZ
def test_the_summary_is_that_of_the_result(result):
    """Kills: draws of a chain that went non-finite, whose mean is then NaN; a group that ArviZ does not look at."""
    row = summary_of(result.to_xarray()).loc["llc"]
    assert float(row["mean"]) == pytest.approx(result.llc_raw, rel=0.02)
    assert float(row["ess_bulk"]) == pytest.approx(result.ess, rel=0.3)
    posterior = result.to_xarray()["posterior"].to_dataset()
    np.testing.assert_array_equal(posterior["llc"].values, result.llc_draws)
    assert posterior["chain"].values.tolist() == [0, 2]
    assert set(posterior.data_vars) == {"llc", "loss", "distance"}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="ArviZ 1 needs Python 3.12")
def test_its_traces_can_be_drawn(result):
    import arviz as az

    assert az.plot_trace(result.to_xarray()) is not None


@pytest.mark.quick
def test_a_saved_result_opens_in_xarray_without_a_warning(result, tmp_path):
    """Kills: metadata that xarray looks for in vain, with a warning, and then reads file by file."""
    result.save(tmp_path / "run.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")
    np.testing.assert_array_equal(tree["posterior"]["llc"].values, result.llc_draws)
    assert slt.load_result(tmp_path / "run.zarr").llc == result.llc


def test_a_sweep_has_a_row_for_each_cell(result):
    import dataclasses

    def cell(nbeta):
        settings = dataclasses.replace(result.settings, nbeta=nbeta, step_size=1e-3)
        return dataclasses.replace(result, stopped={}, settings=settings)

    axes = {"nbeta": np.array([50.0, 100.0]), "localization": np.array([1.0]), "step_size": np.array([1e-3])}
    found = slt.Sweep(axes, (cell(50.0), cell(100.0)), np.ones((1, 2)))
    llc = found.to_xarray()["posterior"]["llc"]
    assert llc.dims == ("nbeta", "localization", "step_size", "chain", "draw")
    np.testing.assert_array_equal(llc.values[1, 0, 0, 0], result.llc_draws[0])


def test_a_result_without_a_finite_chain_has_no_posterior(result):
    lost = made_result(result.traces.loss[1:2], result.warmup_loss[1:2], SETTINGS, stopped={0: 0})
    assert "posterior" not in lost.to_xarray()
