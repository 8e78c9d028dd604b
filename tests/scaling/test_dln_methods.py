"""How a deep linear teacher is sampled: what is asked for, what is usual, and the data in each form."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from scaling.dln import devices, drawn, population, records, run, teachers
from scaling.dln.methods import Method, estimate, exact_rows, filled, posterior_and_data

ROOT = Path(__file__).parents[2]
FIXED = Method("sgld", 1e-6, localization=1.0, num_warmup=4, num_draws=4, batch_size=20, num_data=300)


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
        (("--data", "displaced"), "no typical weight to take a localization from, got no --localization"),
        (("--sampler", "hmc", "--data", "displaced", "--localization", "1"), "got --data displaced. Take --data"),
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
    assert result.settings.nbeta == pytest.approx(300 / np.log(300))
    assert result.settings.num_data == 300
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


def test_in_displacements_the_loss_on_drawn_inputs_is_the_same():
    """And to second order exact where a difference of outputs would be nothing but rounding."""
    method = Method(nbeta=1e4, localization=1.0, num_data=1000, data="displaced")
    teacher = teachers.make_teacher("B", "1K", 1)
    posterior, ids = posterior_and_data(teacher, method)
    assert method.name == "default, displaced"
    assert len(ids) == posterior.num_data == 1000
    assert posterior.num_free == sum(w.size for w in teacher.weights)  # the teacher does not move
    moves = [0.01 * np.random.default_rng(0).normal(size=w.shape).astype(np.float32) for w in teacher.weights]

    def loss_at(scale):
        return posterior.loss_fn({**posterior.center, "displacements": [scale * v for v in moves]}, ids[:40])

    plain = drawn.posterior(teacher, 1000, None, None)
    moved = {**plain.center, "weights": [w + v for w, v in zip(teacher.weights, moves, strict=True)]}
    np.testing.assert_allclose(loss_at(1), plain.loss_fn(moved, ids[:40]), rtol=1e-4)
    np.testing.assert_allclose(1e8 * loss_at(1e-12), 1e-8 * loss_at(1e-4), rtol=1e-2)
    assert not loss_at(0).any()


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
    assert result.settings.batch_size == 1
    assert result.settings.baseline == "full"
    assert result.init_loss == 0
    assert not result.traces.gap_var.any()
    posterior, data = posterior_and_data(teacher, method)
    assert posterior.num_data == 300
    assert len(data[0]) == 1
