"""Memory told before a run: of the right size, against what the process really takes, and in time to refuse."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.engine import memory
from slt_jax.engine.memory import MemoryEstimate, estimate_memory, layouts
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.engine.progress import span
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.hub import save_decoder
from tests.engines import engine_of
from tests.sources import Rows

WIDTH = 512
MIB = 2**20


def loss_fn(w, x):
    return jnp.sum((x @ w) ** 2, axis=-1)


def posterior(width=WIDTH):
    return slt.LocalPosterior(loss_fn, jnp.zeros((width, width)), 64, 10.0, 1.0)


DATA = jnp.ones((64, WIDTH))


def estimate(**changed):
    options = {"sampler": slt.sgld(1e-6), "num_chains": 4, "num_draws": 4, "num_warmup": 2, "batch_size": 8}
    return slt.estimate_llc(posterior(), DATA, **{**options, **changed})


def need(sampler, devices=1, chains=4, group=1, saves=False, measurements=()):
    plan = Schedule(chains, 4, 2, 1, 8, 1, "paired", group, 512)
    mesh = chain_mesh(chains, jax.devices()[:devices])
    engine = engine_of(posterior(), DATA, sampler, plan, jax.random.key(0), mesh)
    return estimate_memory(engine, measurements, saves=saves)


@pytest.mark.parametrize(("sampler", "copies"), [(slt.sgld(1e-6), 1), (slt.underdamped(1e-6), 2)])
def test_a_chain_holds_its_samplers_copies(sampler, copies):
    one = WIDTH * WIDTH * 4
    found = need(sampler)
    assert found.chain == pytest.approx(copies * one, rel=1e-3)
    assert found.chains == pytest.approx(4 * copies * one, rel=1e-3)
    assert found.step >= one  # a gradient at least
    assert found.save == 0
    assert need(sampler, saves=True).save == found.chains


def test_more_devices_and_larger_groups_take_more():
    few, spread, grouped = need(slt.sgld(1e-6)), need(slt.sgld(1e-6), devices=4), need(slt.sgld(1e-6), group=4)
    assert spread.chains == few.chains
    assert spread.step > 2 * few.step
    assert grouped.step > 2 * few.step
    assert (few.at_once, spread.at_once, grouped.at_once) == (1, 4, 4)


def test_a_measurement_takes_a_position_and_its_noise_beside_its_program():
    found = need(slt.sgld(1e-6), measurements=[10 * MIB, 50 * MIB])
    assert found.measurement == pytest.approx(memory.HEAP + 50 * MIB + 2 * WIDTH * WIDTH * 4)
    assert found.additional == found.chains + found.measurement  # more than a step


def test_a_metric_takes_its_decompositions_and_what_comes_back_late():
    """Fitted to processes with sides of 1000, 2000, 3000: 1.8, 1.8, 2.0 GiB, of which 0.5 to 0.9 had not been told."""
    sampler = slt.underdamped(1e-6)
    plain, metric = (need(sampler._replace(metric=m), measurements=[10 * MIB]) for m in (False, True))
    weights, matrix = WIDTH * WIDTH * 4, WIDTH * WIDTH * 8
    assert metric.measurement - plain.measurement == pytest.approx(2 * memory.HEAP + 6.5 * weights + 8 * matrix)
    assert metric.step - plain.step > 2 * memory.HEAP + 3 * weights


def test_the_batches_of_data_on_disk_are_counted():
    """Three times: those in use, the next ones, and these as they were read."""
    plan = Schedule(4, 6, 0, 1, 8, 1, "paired", 1, 512)
    mesh = chain_mesh(4, jax.devices()[:2])
    engine = engine_of(posterior(), Rows(DATA), slt.sgld(1e-6), plan, jax.random.key(0), mesh)
    found = estimate_memory(engine, [], saves=False)
    assert found.batches == 3 * 4 * 6 * 8 * WIDTH * 4
    assert found.additional == found.chains + found.batches + found.step
    assert need(slt.sgld(1e-6)).batches == 0


def test_control_variates_are_not_taken_up_where_they_do_not_fit(monkeypatch):
    two = 2 * WIDTH * WIDTH * 4
    free = need(slt.sgld(1e-6))
    assert free.control == two
    asked = dataclasses.replace(free, available=1.05 * free.additional + two / 2)
    assert asked.fits
    assert not asked.fits_with_control
    assert dataclasses.replace(free, available=1.06 * (free.additional + two)).fits_with_control


def test_a_run_tells_what_it_will_take(capfd, monkeypatch):
    assert estimate(progress=True).settings.memory == {}  # too small to ask
    monkeypatch.setattr(memory, "MUCH", 0)
    result = estimate(progress=True)
    words = r"memory: 1 MiB a chain, 4 of 4 chains at once on 4 devices; at most [\d,]+ MiB of this process"
    assert re.search(words, capfd.readouterr().err)
    assert result.settings.memory["chain_mib"] == 1
    assert "predicted)" in str(result)


def test_the_time_to_go_is_told_after_the_first_steps(capfd):
    estimate(num_draws=2000, progress=True)
    assert re.search(r"  sampling: [\d,]+ steps of 4 chains, about \d+ s to go", capfd.readouterr().err)
    assert [span(s) for s in (0.2, 119, 200, 7300, 200_000)] == ["0 s", "119 s", "3 min", "2 h", "2.3 days"]
    estimate(num_draws=20)
    assert capfd.readouterr().err == ""


def test_what_does_not_fit_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setattr(memory, "MUCH", 0)
    monkeypatch.setattr("slt_jax.machine.free_of_process", lambda: 3.0 * MIB)
    with pytest.raises(MemoryError, match=r"the run needs about [\d,]+ MiB of this process .* 4 chains of 1 MiB 4 MiB"):
        estimate()
    with pytest.raises(MemoryError, match="Take more micro-batches"):
        estimate(num_chains=1)


def test_fewer_chains_that_fit_are_named():
    some = MemoryEstimate(
        where="each device", peak=0.0, in_use=5.0 * MIB, available=12.0 * MIB, chain=2.0 * MIB, chains=16.0 * MIB,
        batches=0.0, step=3.0 * MIB, measurement=1.0 * MIB, save=0.0, control=0.0, num_chains=8, at_once=1, devices=1,
    )  # fmt: skip
    assert not some.fits
    assert "Take at most 4 chains, more" in some.refusal()
    assert dataclasses.replace(some, num_chains=4, chains=8.0 * MIB).fits
    assert not dataclasses.replace(some, num_chains=5, chains=10.0 * MIB).fits


def test_a_cpu_takes_fewer_devices_where_all_do_not_fit(monkeypatch):
    """And finds the same numbers."""
    monkeypatch.setattr(memory, "MUCH", 0)
    whole = estimate()
    assert whole.settings.devices.startswith("4 x")
    enough = need(slt.sgld(1e-6), devices=2)
    monkeypatch.setattr("slt_jax.machine.free_of_process", lambda: 1.06 * enough.additional)
    fewer = estimate()
    assert fewer.settings.devices.startswith("2 x")
    np.testing.assert_allclose(fewer.loss_trace, whole.loss_trace, rtol=1e-5)


@pytest.mark.quick
def test_layouts_keep_to_what_was_given():
    mesh = chain_mesh(4, jax.devices()[:2])
    assert list(layouts(4, mesh, 2, 10)) == [(mesh, 2)]
    assert [(m.devices.size, g) for m, g in layouts(4, None, None, 10)] == [(4, 1), (2, 1), (1, 1)]
    with pytest.raises(ValueError, match="does not divide the 2 chains"):
        list(layouts(4, mesh, 3, 10))


# On one core, so that no two chains have their peaks together in one run and apart in another.
RUN = """
import json, os, resource, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from slt_jax.cli.commands import main
code = main(json.loads(sys.argv[1]))
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


CASES = {
    "given": ["--step-size", "1e-6"],
    "underdamped": ["--sampler", "underdamped", "--chains", "4", "--draws", "60"],
}


@pytest.mark.parametrize("name", ["given", pytest.param("underdamped", marks=pytest.mark.slow)])
def test_the_prediction_is_close_to_what_a_process_takes(tmp_path, name):
    """13M weights in a process of its own; larger models: scaling/throughput/memory.py."""
    config = DecoderConfig(20_000, 64, 512, 2, 8)
    save_decoder(tmp_path / "model", Decoder(config, rngs=nnx.Rngs(0)))
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 20_000, 6400).astype(np.uint16))
    words = ["llc", str(tmp_path / "model"), "--tokens", str(tmp_path / "t.npy"), "--chains", "2", "--draws", "4"]
    words += ["--batch-size", "2", "--seq-len", "32", *CASES[name]]
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = int(re.search(r"at most ([\d,]+) MiB of this process", done.stderr)[1].replace(",", ""))
    code, peak = map(int, done.stderr.splitlines()[-1].split())
    assert code == 0
    assert told == pytest.approx(peak, rel=0.15)
