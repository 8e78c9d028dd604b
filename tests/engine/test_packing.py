"""Chains whose many small arrays lie side by side: the same numbers, restarts and devices, and a small program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.loop import Engine
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.engine.problem import Problem
from slt_jax.posterior import packing
from slt_jax.posterior.data import as_source
from tests.small import traces_of
from tests.sources import Rows

SIZES = tuple(1 + i % 3 for i in range(24))
NAMES = ("loss_trace", "baseline_trace", "drift_sq", "virial", "distance_sq", "warmup_loss")
SHORT = {"num_chains": 2, "num_draws": 20, "num_warmup": 10, "batch_size": 16, "key": 3}


def problem_of(sizes=SIZES, **more):
    """(posterior, data): a linear regression whose weights are in arrays of these sizes, and one large matrix."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, sum(sizes))).astype(np.float32)
    center = {f"w{i:03d}": jnp.asarray(rng.normal(size=n), jnp.float32) for i, n in enumerate(sizes)}
    center["z"] = 0.01 * jnp.ones((sum(sizes), 100))

    def loss_fn(p, batch):
        weights = jnp.concatenate([p[name] for name in p if name != "z"])
        return 0.5 * (batch @ weights) ** 2 + 0.5 * jnp.mean((batch @ p["z"]) ** 2, axis=-1)

    return slt.LocalPosterior(loss_fn, center, 200, nbeta=20.0, localization=10.0, **more), x


def estimate(posterior, data, sampler=None, **changed):
    return slt.estimate_llc(posterior, data, sampler=sampler or slt.underdamped(1e-4, 0.2), **{**SHORT, **changed})


def assert_same(a, b, rtol=0.0):
    for name in NAMES:
        np.testing.assert_allclose(traces_of(a)[name], traces_of(b)[name], rtol=rtol, atol=rtol, err_msg=name)


def engine_of(sizes, sampler, packs=True):
    posterior, data = problem_of(sizes)
    problem = Problem(posterior, as_source(data), chain_mesh(1, jax.devices()[:1]), 16, packs=packs)
    return Engine(problem, sampler, Schedule(1, 20, 10, 1, 16, 1, "paired", 1, 50), jax.random.key(0))


SAMPLERS = {
    "underdamped": slt.underdamped(1e-4, 0.2), "sgld": slt.sgld(1e-4),
    "matthews": slt.sgld(1e-4, noise="leimkuhler-matthews"), "rmsprop": slt.preconditioned_sgld(1e-4),
    "sghmc": slt.sghmc(1e-4, 0.1), "sgnht": slt.sgnht(1e-4, 0.1),
}  # fmt: skip


DEFAULT = ("underdamped",)


@pytest.mark.parametrize("name", [x if x in DEFAULT else pytest.param(x, marks=pytest.mark.slow) for x in SAMPLERS])
def test_packed_chains_are_those_of_separate_arrays(name, monkeypatch):
    """Up to the order of sums: thirty steps from the same noise. Kills: noise or weights of another array."""
    posterior, data = problem_of()
    packed = estimate(posterior, data, SAMPLERS[name])
    monkeypatch.setattr(packing, "LIMITS", packing.Limits(0, 0))
    apart = estimate(posterior, data, SAMPLERS[name])
    assert_same(packed, apart, rtol=3e-5)


DYNAMICS = {"given": SAMPLERS["sgld"], "calibrated": slt.underdamped()}


@pytest.mark.parametrize("dynamics", ["given", pytest.param("calibrated", marks=pytest.mark.slow)])
def test_masks_observables_and_a_calibration_see_the_same_weights(dynamics, monkeypatch):
    """Kills: an observable, a mask or a measurement that takes the packed arrays for the weights."""
    mask = {f"w{i:03d}": np.arange(n) > 0 if i % 5 else True for i, n in enumerate(SIZES)} | {"z": False}
    sampler = DYNAMICS[dynamics]
    posterior, data = problem_of(mask=mask)
    posterior = dataclasses.replace(posterior, localization=None if dynamics == "calibrated" else 10.0)
    norm = slt.Observable(data[:10], lambda p, batch: batch[:, 0] * p["w007"][0] + p["w022"][1], level="custom")

    def found():
        return estimate(posterior, data, sampler, observe={"norm": norm})

    packed = found()
    monkeypatch.setattr(packing, "LIMITS", packing.Limits(0, 0))
    apart = found()
    assert packed.settings.step_size == pytest.approx(apart.settings.step_size, rel=1e-4)
    values = [np.asarray(result.observed["norm"].values) for result in (packed, apart)]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)


def test_eight_devices_give_what_one_gives():
    posterior, data = problem_of()
    one = estimate(posterior, data, num_chains=8, mesh=chain_mesh(8, jax.devices()[:1]))
    assert_same(one, estimate(posterior, data, num_chains=8, mesh=chain_mesh(8)), rtol=1e-5)


class Stopping(Rows):
    """Ctrl-C at one of its reads."""

    reads, stop = 0, 6

    def fetch(self, indices):
        self.reads += np.size(indices) > 1
        if self.reads == self.stop:
            raise KeyboardInterrupt
        return super().fetch(indices)


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    posterior, data = problem_of()
    options = {"chunk_size": 4, "checkpoint_seconds": 0}
    whole = estimate(posterior, Rows(data), **options)
    with pytest.raises(KeyboardInterrupt):
        estimate(posterior, Stopping(data), checkpoint_dir=tmp_path / "run", **options)
    assert any((tmp_path / "run" / "steps").iterdir())
    assert_same(whole, estimate(posterior, Rows(data), checkpoint_dir=tmp_path / "run", **options))


@pytest.mark.parametrize("sampler", [slt.underdamped(metric="kronecker"), slt.mala(1e-4)], ids=["kronecker", "mala"])
def test_samplers_that_see_arrays_keep_them_apart(sampler):
    assert not sampler.entrywise


@pytest.mark.quick
@pytest.mark.parametrize("name", ["underdamped", "sgld"])
def test_the_program_has_the_code_of_one_array(name):
    """What an array adds is its part of the loss. Kills: noise or an update written out for each array."""
    few, many = (len(engine_of(SIZES * k, SAMPLERS[name]).lower().as_text()) for k in (1, 3))
    apart = len(engine_of(SIZES, SAMPLERS[name], packs=False).lower().as_text())
    each = (many - few) / (2 * len(SIZES))
    print(f"{each:.0f} characters an array, of {few}; {apart} apart")
    assert each < 0.01 * few
