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

from scaling.dln import devices, drawn, memory, population, records, rows, run, teachers
from scaling.dln.methods import Method, estimate, exact_rows, filled, posterior_and_data

ROOT = Path(__file__).parents[1]
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


# --- methods


@pytest.mark.quick
@pytest.mark.parametrize(
    ("size", "step_size", "steps", "num_data"),
    [
        ("1K", 5e-7, 10_000, 100_000), ("10K", 5e-7, 10_000, 100_000), ("100K", 1e-7, 50_000, 1_000_000),
        ("1M", 5e-8, 50_000, 1_000_000), ("10M", 2e-8, 50_000, 1_000_000), ("100M", 2e-8, 50_000, 1_000_000),
    ],
)  # fmt: skip
def test_the_published_protocol_is_the_published_one(size, step_size, steps, num_data):
    """The table of Lau et al., once more by hand."""
    args = run.parse(["--class", size, "--type", "published", "--out", "x", "--protocol", "published"])
    found = run.method_of(args, size, "published")
    assert (found.sampler, found.step_size, found.localization, found.num_chains) == ("sgld", step_size, 1.0, 1)
    assert (found.num_warmup, found.num_draws, found.budget) == (0.9 * steps, 0.1 * steps, None)
    assert (found.batch_size, found.num_data, found.nbeta) == (500, num_data, None)
    assert found.name == "published"


def asked(size, *more, kind="B"):
    return run.method_of(run.parse(["--class", size, "--type", kind, "--out", "x", *more]), size, kind)


@pytest.mark.quick
@pytest.mark.parametrize(("size", "file"), [("100K", "100K-law"), ("1M", "1M")])
def test_the_command_alone_gives_the_committed_rows_of_a_large_class(size, file):
    """Nothing but class and type said. Kills: another nbeta, localization, friction or length."""
    found, _ = records.read_rows(ROOT / f"scaling/dln/results/{file}.jsonl")
    assert len(found) >= 6
    assert all(row["request"] == dataclasses.asdict(asked(size)) for row in found)


@pytest.mark.quick
def test_what_is_asked_for_takes_the_place_of_the_usual():
    """Kills: the large classes' setting in small ones or beside another sampler; a localization that nbeta leaves."""
    assert asked("10K") == filled(Method(), "10K")
    assert asked("1M", "--sampler", "default") == filled(Method(), "1M")
    assert asked("1M", kind="A") == filled(Method(), "1M")
    assert asked("1M", kind="C") == asked("1M")
    assert asked("1M", "--label-noise", "1") == filled(Method(label_noise=1.0), "1M")
    other = asked("1M", "--nbeta", "1e10", "--budget", "900", "--chains", "4")
    assert (other.nbeta, other.localization, other.num_chains, other.friction) == (1e10, 1e6, 4, 0.05)
    assert (other.budget, other.num_warmup, other.num_draws) == (900, None, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--protocol", "published", "--budget", "10"), "the published protocol sets budget itself"),
        (("--sampler", "sgld", "--friction", "0.1"), "sgld has no friction, got --friction 0.1"),
        (("--data", "drawn", "--label-noise", "1"), "label noise of 1.0 needs all inputs at once"),
        (("--data", "population", "--label-noise", "1"), "got --data population. Take --data stored"),
        (("--data", "population", "--batch-size", "9"), "population has no minibatches, got --batch-size 9"),
        (("--data", "population", "--protocol", "published"), "the published protocol takes minibatches"),
        (("--sampler", "hmc", "--budget", "100"), "hmc uses no minibatches, got --budget 100"),
        (("--sampler", "hmc", "--label-noise", "1"), "only shifts; got --label-noise 1.0"),
        (("--budget", "100", "--draws", "5"), "--budget 100 and --draws 5 both set the length"),
        (("--coordinator", "a:1"), "go together, got a:1, None and None"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(capsys, more, message):
    assert run.main(["--class", "1K", "--type", "A", "--out", "unused.jsonl", *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path("unused.jsonl").exists()


def test_the_default_budget_is_the_published_number_of_steps():
    assert filled(Method(), "100K").budget == 50_000
    assert filled(Method(), "100K").num_data == 1_000_000
    exact = filled(Method("hmc"), "1K")
    assert (exact.budget, exact.num_draws, exact.num_warmup) == (None, 800, 400)


def test_hmc_samples_the_whole_data_set():
    """A few moves on sufficient data; nbeta is that of the data set, not of its pseudo-inputs."""
    method = Method("hmc", 1e-7, localization=1.0, num_warmup=1, num_draws=4, num_data=300)
    teacher = teachers.make_teacher("B", "1K", 0)
    posterior, data = posterior_and_data(teacher, method)
    moved = [w + np.float32(0.01) for w in teacher.weights]
    whole = teachers.loss_fn(moved, teachers.make_data(teacher, 300, seed=0)).mean()
    assert posterior.loss_fn(moved, data).mean() == pytest.approx(float(whole), rel=1e-4)
    result = estimate(teacher, method, devices.mesh_for(4))
    assert result.settings["nbeta"] == pytest.approx(300 / np.log(300))
    assert result.settings["num_data"] == 300
    assert 0 < result.llc < 240.5


def test_drawn_inputs_are_a_function_of_their_row_and_uniform():
    x = np.asarray(drawn.inputs(3, np.arange(2000, dtype=np.int32), 7))
    some = np.array([5, 1999, 5], np.int32)
    np.testing.assert_array_equal(drawn.inputs(3, some, 7), x[some])
    assert not np.array_equal(drawn.inputs(4, some, 7), x[some])
    assert np.abs(x).max() < 10
    assert abs(x.mean()) < 4 * np.sqrt(100 / 3 / x.size)
    covariance = x.T @ x / len(x)
    assert np.abs(covariance - 100 / 3 * np.eye(7)).max() < 5 * 100 / 3 / np.sqrt(len(x))


def test_the_loss_on_drawn_inputs_is_that_on_stored_ones():
    teacher = teachers.make_teacher("A", "1K", 1)
    posterior = drawn.posterior(teacher, 1000, None, None)
    assert posterior.num_free == sum(w.size for w in teacher.weights)  # the target does not move
    ids = np.arange(40, dtype=np.int32)
    x = np.asarray(drawn.inputs(teacher.seed, ids, teacher.widths[0]))
    y = x @ teachers.end_to_end(teacher.weights).astype(np.float32)
    moved = [w + np.float32(0.01) for w in teacher.weights]
    losses = posterior.loss_fn({**posterior.center, "weights": moved}, ids)
    np.testing.assert_allclose(losses, teachers.loss_fn(moved, (x, y)), rtol=1e-4)


@pytest.mark.parametrize("widths", [(9, 5, 7, 3), (3, 7, 5, 9), (6, 8, 3, 7, 9), (4, 6)], ids=str)
def test_the_loss_over_the_law_of_inputs_is_the_mean_of_the_others(widths):
    """Wherever the narrowest width is; and close to w*, where float32 and float64 leave nothing of a difference."""
    rng = np.random.default_rng(0)
    layers = tuple(rng.normal(size=pair).astype(np.float32) for pair in itertools.pairwise(widths))
    teacher = teachers.make_teacher("B", "1K", 0)._replace(widths=widths, weights=layers)
    inputs, outputs = exact_rows(teacher, 300, "population")
    for distance in (0.3, 1e-6, 1e-16):
        moves = [np.float32(distance) * rng.normal(size=w.shape).astype(np.float32) for w in layers]
        ends = [w.astype(float) + move for w, move in zip(layers, moves, strict=True)]
        change = np.linalg.multi_dot([inputs, *ends]) - outputs
        if distance < 1e-9:  # of which float64 knows the first order alone
            sums = [[*layers[:k], move, *layers[k + 1 :]] for k, move in enumerate(moves)]
            change = sum(np.linalg.multi_dot([inputs, *(x.astype(float) for x in mixed)]) for mixed in sums)
        found = population.loss_fn(moves, [w[None] for w in layers])
        assert found.shape == (1,)
        assert float(found[0]) == pytest.approx(np.mean(change**2), rel=2e-5)


def test_over_the_law_of_inputs_a_row_has_no_minibatches():
    method = dataclasses.replace(FIXED, data="population", batch_size=500, nbeta=1e4, num_warmup=20, num_draws=40)
    teacher = teachers.make_teacher("B", "1K", 0)
    result = estimate(teacher, method, devices.mesh_for(4))
    assert method.name == "sgld, population"
    assert result.settings["batch_size"] == 1
    assert result.settings["baseline"] == "full"
    assert result.init_loss == 0
    assert not result.gap_var.any()
    posterior, data = posterior_and_data(teacher, method)
    assert posterior.num_data == 300
    assert len(data[0]) == 1


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
    gpu = memory.need_of(shape, method, 4, 2, accelerated=True)
    assert gpu.accelerator > 0
    assert gpu.process < one.process
    assert memory.free_of_process() > 0


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
