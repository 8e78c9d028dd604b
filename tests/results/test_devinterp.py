"""To and from devinterp 2: its numbers on a tiny trace, its files, and its own code where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import zarr

import slt_jax as slt
from tests.results.devinterp_case import EXPECTED, influences, trace
from tests.small import refuses


def ours(seen):
    """The same arrays, by our influence: theirs are positive covariances of mean losses."""
    found = {}
    for level, name in (("token", "token"), ("example", "sequence")):
        for normalized in (True, False):
            every = slt.influence(None, seen, seen, level=level, normalized=normalized).block(slice(None), slice(None))
            if not normalized:
                every = -every / (9 if level == "example" else 1)  # of means over 3 tokens
            if level == "token":
                every = every.reshape(4, 3, 4, 3).transpose(0, 2, 1, 3)
            found[f"{name}, {'correlation' if normalized else 'covariance'}"] = every
    return found


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


@pytest.mark.quick
def test_our_influence_is_that_of_devinterp():
    """On numbers that devinterp 2.0.1 gave. Kills: another center, ddof or sign; tokens in another order."""
    equal(ours(trace()), json.loads(EXPECTED.read_text()))


@pytest.mark.skipif(importlib.util.find_spec("devinterp") is None, reason="devinterp is not installed")
def test_devinterp_reads_what_is_written(tmp_path):
    """Kills: expected numbers that were never devinterp's."""
    seen = trace()
    found = influences(seen.to_devinterp(tmp_path / "tiny.zarr"))
    equal({name: np.array(values) for name, values in found.items()}, json.loads(EXPECTED.read_text()))
    equal(ours(seen), found)


@pytest.mark.quick
def test_there_and_back(tmp_path, monkeypatch):
    """Kills: draws written to another chunk; n_beta, localization or the gap lost; padding that counts again."""
    monkeypatch.setattr("slt_jax.results.observed._PIECE", 30)
    seen = trace()
    path = seen.to_devinterp(tmp_path / "a.zarr", input_ids=np.arange(16).reshape(4, 4))
    found = slt.from_devinterp(path, num_data=100)["tiny"]
    assert np.array_equal(np.asarray(found.values[:]), seen.values)
    assert (found.nbeta, found.localization, found.level, found.valid) == (10.0, 5.0, "token", None)
    np.testing.assert_allclose(found.gap, seen.gap, atol=1e-6)
    assert np.array_equal(zarr.open_group(path)["input_ids_tiny"][:], np.arange(16).reshape(4, 4))
    a, b = slt.influence(None, found, found), slt.influence(None, seen, seen)
    assert np.array_equal(a.row(3), b.row(3))
    assert slt.generalization(None, found).functional_variance == slt.generalization(None, seen).functional_variance
    padded = seen.__class__(**{**vars(seen), "name": "2 b", "valid": np.arange(12).reshape(4, 3) != 5})
    found = slt.from_devinterp(padded.to_devinterp(tmp_path / "b.zarr"), num_data=100)["_2_b"]
    assert np.array_equal(found.valid, padded.valid)
    texts = seen.by_example()
    back = slt.from_devinterp(texts.to_devinterp(tmp_path / "c.zarr"), num_data=100)["tiny"]
    assert np.array_equal(np.asarray(back.values[:])[..., 0], texts.values)


def test_refusals(tmp_path):
    seen = trace()
    path = seen.to_devinterp(tmp_path / "a.zarr")
    refuses(FileExistsError, lambda: seen.to_devinterp(path), "a.zarr", "another path")
    refuses(ValueError, lambda: seen.to_devinterp(tmp_path / "b.zarr", input_ids=np.zeros((4, 3))), "(4, 4)", "(4, 3)")
    assert not (tmp_path / "b.zarr").exists()
    refuses(FileNotFoundError, lambda: slt.from_devinterp(tmp_path / "none.zarr", 10), "none.zarr")
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    refuses(ValueError, lambda: slt.from_devinterp(tmp_path / "empty.zarr", 10), "0 data sets", "n_beta")
    (tmp_path / "text").write_text("x")
    refuses(ValueError, lambda: slt.from_devinterp(tmp_path / "text", 10), "no zarr group")
