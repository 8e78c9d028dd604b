"""The table of estimates in standard errors from a reference, and the networks that it is about."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from scaling.checkpoints import problems, zscores
from scaling.dln.records import Store


def row(method, key, llc, stderr, verdict="converged"):
    more = {"verdict": verdict, "rhat": 1.01, "num_free": 7}
    return {"problem": "MLP", "method": method, "key": key, "llc": llc, "llc_stderr": stderr, **more}


def test_z_counts_both_errors():
    rows = [row("reference", 1, 10.0, 0.3), row("default", 1, 10.5, 0.4), row("default", 2, 8.5, 0.4, "still rising")]
    assert [zscores.zscore(one, rows[0]) for one in rows[1:]] == pytest.approx([1.0, -3.0])
    lines = zscores.table(rows).splitlines()[2:]
    assert lines[0] == "| default | MLP | 7 | 10 ± 0.3 | 1.010 | 2 | 9.5 | 0.4 | -1.00 | 2.83 | 1 | 0 |"
    assert lines[1] == "| default | all with a settled reference |  |  |  | 2 |  |  | -1.00 | 2.83 | 1 | 0 |"
    assert lines[2] == "| default | of them converged |  |  |  | 1 |  |  | +1.00 |  | 1 | 0 |"


def test_what_is_converged_and_off_is_counted_where_the_reference_is_known():
    rows = [row("reference", 1, 10.0, 0.1), row("default", 1, 9.0, 0.1), row("default", 2, 9.0, 0.1, "still rising")]
    assert zscores.table(rows).splitlines()[2].endswith("| -7.07 | 0.00 | 1 | 1 |")
    rows[0]["rhat"] = 1.2
    assert len(zscores.table(rows).splitlines()) == 3
    assert zscores.table(rows).splitlines()[2].endswith("| 1 | 0 |")


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, np.zeros(2, np.float32), 300)
    monkeypatch.setitem(zscores.PROBLEMS, "MLP", lambda: problems.Problem(posterior, x, 256))
    given = {"sampler": slt.sgld(1e-3), "num_chains": 2, "num_draws": 20, "num_warmup": 0}
    near = dataclasses.replace(posterior, localization=2.0)
    monkeypatch.setitem(zscores.METHODS, "default", given)
    monkeypatch.setattr(zscores, "reference", lambda problem: (near, slt.estimate_llc(near, problem.data, **given)))
    path = tmp_path / "z.jsonl"
    zscores.run(Store(path, zscores.FIELDS), "MLP", ["default"], range(3, 4))
    zscores.run(Store(path, zscores.FIELDS), "MLP", ["default"], range(3, 5))
    rows = list(Store(path, zscores.FIELDS).rows.values())
    assert [(r["method"], r["key"]) for r in rows] == [("reference", 1), ("default", 3), ("default", 4)]
    assert {r["localization"] for r in rows} == {2.0}
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.slow
def test_an_autoencoder_whose_soft_directions_have_not_relaxed():
    """148 weights, of which 68 have curvatures under 3e-6 of the largest. Estimate and bias together are the Hessian's
    41.5 (HMC: 41.7); before, 39.7 was called converged.
    """
    problem = problems.autoencoder()
    result = slt.estimate_llc(problem.posterior, problem.data, key=71)
    with jax.enable_x64(True):
        center, unravel = ravel_pytree(jax.tree.map(lambda w: np.asarray(w, np.float64), problem.posterior.center))
        data = np.asarray(problem.data, np.float64)
        hessian = jax.hessian(lambda w: problem.posterior.loss_fn(unravel(w), data).mean())(center)
        curvature = result.settings.nbeta * np.linalg.eigvalsh(hessian)
    truth = (curvature / (curvature + result.settings.localization)).sum() / 2
    owed = result.settings.probe["owed"]
    assert owed > 0.5
    assert result.verdict != "converged"
    assert abs(result.llc + owed - truth) < 4 * result.llc_stderr


@pytest.mark.slow
def test_an_mlp_that_minibatches_would_heat():
    """1,210 weights on digits; HMC gives 74.0 +/- 0.4 at this localization. Four keys, in their own errors."""
    problem = problems.digits(problems.MLP)
    posterior, scores = dataclasses.replace(problem.posterior, localization=0.18644), []
    for key in range(210, 214):
        result = slt.estimate_llc(posterior, problem.data, key=key)
        assert result.settings.batch_size == 1797
        assert result.bias.noise == 0.0
        scores.append(
            zscores.zscore({"llc": result.llc, "llc_stderr": result.llc_stderr}, {"llc": 74.0, "llc_stderr": 0.41})
        )
    assert np.abs(scores).max() < 4


def test_the_page_has_the_committed_rows():
    rows = Store(zscores.RESULTS, zscores.FIELDS).rows.values()
    assert zscores.table(rows) in (zscores.RESULTS.parents[1] / "README.md").read_text()
