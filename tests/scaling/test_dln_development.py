"""The study of development: its network, its plateaus, and the exact values it draws."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.dln import development, development_plot, truth


@pytest.fixture(scope="module")
def target():
    return development.make_target(np.random.default_rng(0))


@pytest.fixture(scope="module")
def history(target):
    """The run of the study itself; a second or two."""
    rng = np.random.default_rng(0)
    start = (development.make_target(rng), development.make_start(rng))[1]
    return development.train(start, target, development.STEPS, looks=200)


@pytest.mark.quick
def test_the_gradients_are_those_of_the_loss(target):
    """Kills a transposed factor, and left and right products exchanged."""
    rng = np.random.default_rng(1)
    weights = tuple(rng.standard_normal(pair) for pair in itertools.pairwise(development.WIDTHS))
    batch = jnp.asarray(target, jnp.float32)[None]
    singles = tuple(jnp.asarray(w, jnp.float32) for w in weights)
    expected = jax.grad(lambda w: development.loss_fn(w, batch)[0])(singles)
    for mine, theirs in zip(development.gradients(weights, target), expected, strict=True):
        # float32 sums of a few hundred terms
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(mine).max())


@pytest.mark.quick
def test_the_loss_is_that_of_whitened_inputs(target):
    """Half the squared error, summed over outputs, over any inputs with X'X / n = 1."""
    rng = np.random.default_rng(2)
    x = np.linalg.qr(rng.standard_normal((50, target.shape[0])))[0] * math.sqrt(50)
    weights = tuple(rng.standard_normal(pair) for pair in itertools.pairwise(development.WIDTHS))
    errors = x @ (development.product(weights) - target)
    expected = 0.5 * float(np.mean(np.sum(errors**2, axis=1)))
    assert float(development.loss_fn(weights, target[None])[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.quick
def test_the_target_has_the_singular_values_it_names(target):
    values = np.linalg.svd(target, compute_uv=False)
    np.testing.assert_allclose(values[: len(development.SINGULAR)], development.SINGULAR, rtol=1e-12)
    np.testing.assert_allclose(values[len(development.SINGULAR) :], 0, atol=1e-12)


@pytest.mark.quick
def test_plateau_losses_are_half_the_sum_of_the_squares_that_are_left(target):
    left, values, right = np.linalg.svd(target, full_matrices=False)
    for k, loss in enumerate(development.plateau_losses()):
        learned = left[:, :k] * values[:k] @ right[:k]
        assert loss == pytest.approx(0.5 * np.sum((learned - target) ** 2), abs=1e-12)
        assert development.plateau_of(loss) == k
    assert development.plateau_of(5.0) is None


@pytest.mark.quick
def test_the_exact_values_are_those_of_the_theorem():
    values = [development.exact(k) for k in range(5)]
    assert [v["exact"] for v in values] == [13.5, 17, 20, 23, 25.5]
    for k, known in enumerate(values):
        value, multiplicity = truth.learning_coefficient(development.WIDTHS, k)
        assert (known["exact"], known["multiplicity"]) == (float(value), multiplicity)
        assert known["expected"] == pytest.approx(float(value) - (multiplicity - 1) / math.log(development.NBETA))


def test_training_visits_every_plateau_with_its_rank(history):
    """Loss, effective rank and the ranks of all three layers, at the checkpoints that stand for the plateaus."""
    still = development.stillest(history)
    assert sorted(still, key=still.get) == [0, 1, 2, 3, 4]
    for k, index in still.items():
        loss, weights = history[index].loss, history[index].weights
        assert loss == pytest.approx(development.plateau_losses()[k], abs=2e-3)
        assert development.effective_rank(development.product(weights)) == k
        for layer in weights:
            values = np.linalg.svd(layer, compute_uv=False)
            # half the posterior's spread in these directions
            assert values[k:].max() < 0.5 * development.NBETA ** (-1 / 6)
            assert k == 0 or values[k - 1] > 0.75


def test_the_loss_never_rises_and_checkpoints_are_dense_where_it_moves(history):
    losses = [s.loss for s in history]
    assert max(np.diff(losses)) < 1e-12
    chosen = development.choose(history, 18)
    between = [s for s in chosen if development.plateau_of(s.loss) is None]
    assert {history[i].step for i in development.stillest(history).values()} <= {s.step for s in chosen}
    # plateaus fill more than four fifths of log step, and would get as much of an even grid
    assert len(between) >= len(chosen) / 4


@pytest.mark.quick
def test_a_singular_value_counts_from_one_unit_of_loss():
    edge = math.sqrt(2 / development.NBETA)
    matrix = np.diag([1.0, 1.01 * edge, 0.99 * edge])
    assert development.effective_rank(matrix) == 2


def test_the_own_function_is_a_minimum_and_the_true_labels_are_not(history, target):
    """On plateau 2: own labels give loss 0 at w* and a positive estimate, the true ones run downhill."""
    snapshot = history[development.stillest(history)[2]]
    row = development.measure(snapshot, target, 8_000, reference=False)
    assert row["effective_rank"] == row["plateau"] == 2
    assert row["own"]["llc"] > 10
    assert row["labels"]["llc"] < -1000
    assert row["labels"]["verdict"] != "converged"


@pytest.mark.quick
def test_the_picture_needs_only_the_record(tmp_path):
    found = {"llc": 13.0, "llc_stderr": 0.1, "verdict": "converged", "reason": ""}
    below = {**found, "llc": -1e4, "llc_stderr": None, "verdict": "not a minimum"}
    lost = {**found, "llc": None, "llc_stderr": None, "verdict": "diverged"}
    rows = [
        {"step": 100 * 4**k, "loss": loss, "plateau": k, "own": found, "labels": below if k else lost, "hmc": found}
        for k, loss in enumerate(development.plateau_losses())
    ]
    record = {
        "settings": {"widths": (6, 6, 6, 10), "nbeta": 1e4, "localization": 1.0},
        "plateaus": [development.exact(k) | {"steps": (100 * 4**k, 300 * 4**k)} for k in range(5)],
        "history": {"step": [r["step"] for r in rows], "loss": [r["loss"] for r in rows]},
        "checkpoints": rows,
    }
    development_plot.draw(json.loads(json.dumps(record)), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
