"""The runner for deep linear teachers: rows and resuming, memory, protocols, devices and processes."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from scaling.dln import devices, memory, records, rows, run, teachers
from scaling.dln.methods import Method

ROOT = Path(__file__).parents[2]
TINY = ("--num-data", "300", "--batch-size", "20", "--chains", "4")
FIXED = Method("sgld", 1e-6, localization=1.0, num_warmup=4, num_draws=4, batch_size=20, num_data=300)


# --- records


@pytest.fixture
def store_path(tmp_path):
    path = tmp_path / "new folder" / "rows.jsonl"
    store = records.Store(path, ("kind", "seed"))
    for seed in range(3):
        store.add({"kind": "A", "seed": seed, "llc": seed / 2, "reason": "long" * seed**6})
    return path


@pytest.mark.quick
def test_a_torn_last_line_costs_that_row_alone(store_path):
    """As a process killed in the middle of a write leaves it; the next row must not be glued to the half."""
    whole = store_path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1, 3):
        store_path.write_bytes(whole[:-cut])
        store = records.Store(store_path, ("kind", "seed"))
        assert len(store.rows) == (3 if cut == 1 else 2)  # cut == 1 is a whole row that lacks its end of line
        assert ({"kind": "A", "seed": 2} in store) == (cut == 1)
        store.add({"kind": "B", "seed": 2, "llc": None})
        lines = [json.loads(line) for line in store_path.read_text().splitlines()]
        kept = [("A", 0), ("A", 1), ("A", 2)][: 3 if cut == 1 else 2]
        assert [(r["kind"], r["seed"]) for r in lines] == [*kept, ("B", 2)]
        assert lines == list(records.Store(store_path, ("kind", "seed")).rows.values())


def test_a_damaged_line_in_the_middle_is_named(store_path):
    lines = store_path.read_text().splitlines(keepends=True)
    store_path.write_text("".join([lines[0], "[1, 2]\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl is not a JSON object: '\[1, 2\]'. Remove that line"):
        records.Store(store_path, ("kind", "seed"))


def test_nan_is_not_written(store_path):
    before = store_path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.Store(store_path, ("kind", "seed")).add({"kind": "C", "seed": 0, "llc": float("nan")})
    assert store_path.read_bytes() == before


def test_error_statistics_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    truths = rng.integers(1, 8, 40).tolist()  # with ties
    pairs = [(float(t), float(t * (1 + 0.3 * rng.standard_normal()))) for t in truths]
    with_gaps = [*pairs, (3.0, None), (2.0, float("nan"))]
    found = records.errors_of(with_gaps)
    assert (found.count, found.non_finite) == (42, 2)
    assert found.median == pytest.approx(np.median([abs(e / t - 1) for t, e in pairs]))
    assert found.ninetieth == pytest.approx(np.quantile([abs(e / t - 1) for t, e in pairs], 0.9))
    couples = [(a, b) for a, b in itertools.combinations(pairs, 2) if a[0] != b[0]]
    right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in couples)
    assert found.ranked == pytest.approx(right / len(couples))
    assert np.isnan(records.errors_of([(1.0, None)]).median)
    assert np.isnan(records.ranked_right([(1.0, 2.0)]))


# --- resuming


def arguments(out, *more):
    return run.parse(["--class", "1K", "--type", "A", "C", "--count", "2", "--out", str(out), *TINY, *more])


@pytest.fixture
def counted(monkeypatch):
    """The teachers that were run, by an estimate that costs nothing."""
    ran = []

    def fake(teacher, method, most_devices):
        ran.append((teacher.size, teacher.kind, teacher.seed))
        return rows.row_of(teacher, method, "not run", 0.0)

    monkeypatch.setattr(run, "run_one", fake)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return ran


@pytest.mark.quick
def test_a_row_that_is_there_is_not_run_again(tmp_path, counted):
    out = tmp_path / "rows.jsonl"
    run.sweep(arguments(out))
    first = [("1K", kind, seed) for seed in (0, 1) for kind in "AC"]
    assert counted == first
    run.sweep(arguments(out))
    assert counted == first
    run.sweep(arguments(out, "--count", "3"))
    assert counted == [*first, ("1K", "A", 2), ("1K", "C", 2)]
    out.write_bytes(out.read_bytes()[:-30])  # killed in the middle of the last row
    run.sweep(arguments(out, "--count", "3"))
    assert counted[6:] == [("1K", "C", 2)]
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "change",
    [
        ("--step-size", "1e-6"), ("--sampler", "sgld"), ("--budget", "500"), ("--batch-size", "30"), ("--nbeta", "50"),
        ("--localization", "3"), ("--label-noise", "1"), ("--num-data", "400"), ("--chains", "2"), ("--data", "drawn"),
        ("--data", "population", "--batch-size", "500"),
        ("--friction", "0.2"), ("--warmup", "3"), ("--draws", "7"), ("--seed-start", "5"), ("--class", "10K"),
        ("--type", "B", "published"),
    ],
)  # fmt: skip
def test_whatever_changes_the_numbers_makes_another_row(tmp_path, counted, change):
    run.sweep(arguments(tmp_path / "rows.jsonl"))
    run.sweep(arguments(tmp_path / "rows.jsonl", *change))
    assert len(counted) == 8


def test_a_loss_that_is_not_finite_is_a_row(monkeypatch):
    def raises(*_):
        raise FloatingPointError("the loss at w* is inf over a sample of the data")

    monkeypatch.setattr(run, "estimate", raises)
    row = run.run_one(teachers.make_teacher("A", "1K", 0), FIXED, None)
    assert (row["llc"], row["verdict"]) == (None, "not finite at w*")
    assert "is inf" in row["reason"]


def test_a_row_tells_all():
    """On drawn data: the whole row, from a run of a few steps."""
    teacher = teachers.make_teacher("C", "1K", 0)
    row = run.run_one(teacher, dataclasses.replace(FIXED, data="drawn"), None)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["truth"] == row["bounds"][0] == row["bounds"][1] == float(teacher.truth)
    assert row["gradients"]["total"] == row["gradients"]["steps"] == 4 * 8
    assert row["request"] == dataclasses.asdict(dataclasses.replace(FIXED, data="drawn"))
    assert row["device"] == "4 x cpu"
    assert row["nbeta"] == pytest.approx(300 / np.log(300))
    for name in ("llc", "llc_raw", "localization", "step_size", "friction", "seconds"):
        assert isinstance(row[name], float)


# --- memory


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_of_process", lambda: 6e9)
    monkeypatch.setattr(run, "make_teacher", lambda *_: pytest.fail("weights were drawn"))
    asked_for = ["--class", "100K", "--type", "B", "--data", "stored", "--devices", "1"]
    args = run.parse([*asked_for, "--out", str(tmp_path / "x")])
    told = (
        r"type B, class 100K, teacher \d+ \(widths [\d-]+\) needs about [\d.]+ GB of this process \(data set "
        r"[\d.]+ GB, weights .* and 6 GB are free. Enough would be --data drawn, or --num-data \d+."
    )
    with pytest.raises(MemoryError, match=told):
        run.sweep(args)
    monkeypatch.setattr(memory, "free_of_process", lambda: 6e7)
    with pytest.raises(MemoryError, match="Take a machine with more memory"):
        run.sweep(args)


@pytest.mark.quick
def test_the_memory_that_is_told_has_its_parts():
    shape = teachers.Shape((1000, 2000, 500), (1, 1))
    method = Method(num_data=10_000, batch_size=100)
    one, two = (memory.need_of(shape, method, 4, d) for d in (1, 2))
    assert two.data - one.data == 4 * 10_000 * 1500
    assert two.activations == 2 * one.activations == 2 * 4 * 4 * 100 * 3500
    sgld = memory.need_of(shape, Method("sgld", num_data=10_000), 4, 1)
    assert one.weights - sgld.weights == (4 + 3) * 4 * 3_000_000  # a momentum for each chain, three for the moved one
    drawn_ = memory.need_of(shape, Method(num_data=10_000, data="drawn"), 4, 1)
    assert drawn_.data == 2.5 * 4 * 10_000
    law = memory.need_of(shape, Method(num_data=10_000, data="population"), 4, 1)
    assert law.data == 2.5 * 4 * 3_000_000
    assert law.activations == 4 * 4 * 2 * 500 * 3500
    displaced = memory.need_of(shape, Method(localization=1.0, num_data=10_000, data="displaced"), 4, 1)
    assert (displaced.data, displaced.activations) == (drawn_.data, law.activations)
    assert displaced.weights - drawn_.weights == 3 * 4 * 3_000_000  # the teacher, beside its product
    gpu = memory.need_of(shape, method, 4, 2, accelerated=True)
    assert gpu.accelerator > 0
    assert gpu.process < one.process
    assert memory.free_of_process() > 0


def test_what_was_told_of_an_accelerator_covers_the_peaks_seen_there():
    """Kills: no room for the matrices that a wide side is taken apart with (100M B 4: 2987 wide, few weights)."""
    seen = [
        row for card in ("H100", "H200") for row in records.read_rows(ROOT / f"scaling/dln/results/{card}-law.jsonl")[0]
    ]
    assert len(seen) == 34
    for row in seen:
        shape = teachers.draw_shape(row["kind"], row["class"], row["seed"])
        told = memory.need_of(shape, Method(**row["request"]), 2, 1, accelerated=True).accelerator
        assert 1.1 < told / (row["cost"]["device_peak_mib"] * 2**20) < 3.5


# --- devices and processes


@pytest.mark.quick
def test_a_mesh_takes_the_devices_that_divide_the_chains():
    assert devices.mesh_for(4).shape == {"chain": 4}
    assert devices.mesh_for(6).shape == {"chain": 6}
    assert devices.mesh_for(9, most=8).shape == {"chain": 3}
    assert devices.mesh_for(4, most=1).shape == {"chain": 1}


@pytest.mark.quick
def test_processes_are_joined_when_asked_or_under_srun():
    assert devices.cluster(None, None, None, {}) is None
    assert devices.cluster(None, None, None, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None  # a batch script
    assert devices.cluster(None, None, None, {"SLURM_STEP_NUM_TASKS": "2"}) == {}
    expected = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
    assert devices.cluster("a:1", 2, 0, {}) == expected


def started(out, *more):
    """The command line on a teacher, with the calibration, the sampler and the looks at the chains' ends."""
    command = [sys.executable, "-W", "error", "-m", "scaling.dln.run", "--class", "1K", "--type", "C", "--count", "1"]
    command += ["--out", str(out), *TINY, "--budget", "800", *more]
    environment = {k: v for k, v in os.environ.items() if not (k.startswith("SLURM") or "device_count" in v)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


REORDERED = 200 * 6e-8  # the order of float32 sums, one rounding for each of at most 200 steps; here it is bit-equal


def test_eight_devices_and_two_processes_give_one_result(tmp_path):
    together = ("--devices", "2", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    runs = [
        started(tmp_path / "eight.jsonl", "--devices", "8"),
        started(tmp_path / "two.jsonl", *together, "--process-id", "0"),
        started(tmp_path / "nothing.jsonl", *together, "--process-id", "1"),
    ]
    for process in runs:
        told, _ = process.communicate(timeout=240)
        assert process.returncode == 0, told
    assert not (tmp_path / "nothing.jsonl").exists()  # only the first process writes
    eight, two = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("eight", "two"))
    assert [r["device"] for r in (eight, two)] == ["4 x cpu"] * 2
    assert [r["processes"] for r in (eight, two)] == [1, 2]
    assert eight["request"] == two["request"]
    for name in ("llc", "llc_raw", "llc_stderr", "step_size", "friction", "localization"):
        assert two[name] == pytest.approx(eight[name], rel=REORDERED), name


def test_one_device_gives_the_result_of_four():
    teacher = teachers.make_teacher("C", "1K", 1)
    one, four = (run.run_one(teacher, FIXED, most) for most in (1, 4))
    assert (one["device"], four["device"]) == ("1 x cpu", "4 x cpu")
    assert one["llc"] == pytest.approx(four["llc"], rel=REORDERED)
