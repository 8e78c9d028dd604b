"""The toy model of superposition: its exact loss, its k-gons, its stages, and what the study found."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.tms import kgons, model, polygons, stages, tables, training
from scaling.tms.picture import draw
from scaling.tms.polygons import OF_FUNCTION, OF_LOSS, Nearest, polygon
from scaling.tms.stages import Stage

RESULTS = Path(model.__file__).parent / "results" / "tms.json"
SMOOTH = {"5-": polygon(5), "5+": polygon(5, 1), "6": polygon(6)}


def turned(p: polygons.Polygon, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same k-gon rotated, reflected, with its units in another order."""
    turn, order = np.linalg.qr(rng.standard_normal((2, 2)))[0], rng.permutation(6)
    return turn @ p.w[:, order], p.b[order]


@pytest.mark.quick
def test_the_exact_loss_is_the_mean_of_the_sampled_one():
    """Kills a wrong integral, and output and input exchanged: biases of all sizes and signs, 4 standard errors."""
    data, rng = model.make_data(200_000, seed=3), np.random.default_rng(0)
    for scale in (0.3, 0.7, 1.2):
        params = {"W": scale * rng.standard_normal((2, 6)), "b": scale * rng.standard_normal(6)}
        losses = np.asarray(model.loss_fn(jax.tree.map(jnp.float32, params), data), np.float64)
        error = losses.std() / math.sqrt(len(losses))
        assert abs(model.population_loss(params["W"], params["b"]) - losses.mean()) < 4 * error
        assert error < 0.01 * losses.mean()


@pytest.mark.quick
def test_losses_known_by_hand():
    """k corners of length 1 at right angles are reproduced; each of the others costs 1/18, 1/24 + ... when open."""
    for corners in range(5):
        dead, opened = polygon(corners), polygon(corners, 6 - corners)
        assert model.population_loss(dead.w, dead.b) == pytest.approx((6 - corners) / 18, abs=1e-12)
        gain = (6 - corners) / 144
        assert model.population_loss(opened.w, opened.b) == pytest.approx((6 - corners) / 18 - gain, abs=1e-12)


def test_inputs_are_as_the_model_says():
    data = model.make_data(60_000)
    assert (np.count_nonzero(data, axis=1) <= 1).all()
    share, height = (data > 0).mean(0), data.sum(1).mean()
    assert np.abs(share - 1 / 6).max() < 4 * math.sqrt(5 / 36 / len(data))
    assert abs(height - 0.5) < 4 * math.sqrt(1 / 12 / len(data))


@pytest.mark.parametrize("corners", [5, 6])
def test_the_k_gons_are_critical(corners):
    """No slope in any of the 18 directions, and longer or shorter columns cost more."""
    p = polygon(corners)
    at = np.concatenate([p.w.ravel(), p.b])
    for i in range(18):
        step = 1e-5 * np.eye(18)[i]
        up, down = (model.population_loss(v[:12].reshape(2, 6), v[12:]) for v in (at + step, at - step))
        assert abs(up - down) / 2e-5 < 1e-6
    for factor in (0.99, 1.01):
        assert model.population_loss(factor * p.w, p.b) > model.population_loss(p.w, p.b) + 1e-6


@pytest.mark.parametrize("label", list(SMOOTH))
def test_all_curvatures_but_the_flat_ones_are_positive(label):
    """The coefficient is half their number."""
    p = SMOOTH[label]
    assert p.label == label
    assert polygons.hessian_rank(p) == 18 - polygons.flat_directions(p) == 2 * OF_LOSS[label]
    assert polygons.function_rank(p) == 2 * OF_FUNCTION[label]
    if label == "5+":  # the open unit's bias: b^2 - b / 6
        assert polygons.curvatures(p)[-1] == pytest.approx(2, abs=1e-3)


def test_what_is_called_a_saddle_is_one():
    p = polygons.doubled()
    assert polygons.curvatures(p)[0] < -1e-3
    assert polygons.function_rank(p) == 2 * OF_FUNCTION[p.label]
    assert polygons.curvatures(polygon(0, 6))[0] < -0.1


@pytest.mark.quick
def test_flat_directions_change_nothing():
    """On any data: rotations of every k-gon; column and bias of the dead unit of a 5-gon, within its piece."""
    data, rng = jnp.asarray(model.make_data(2000)), np.random.default_rng(1)
    value = lambda w, b: model.loss_fn({"W": jnp.asarray(w), "b": jnp.asarray(b)}, data)  # noqa: E731
    for p in (*SMOOTH.values(), polygon(4, 1), polygons.doubled()):
        turn = np.linalg.qr(rng.standard_normal((2, 2)))[0]
        np.testing.assert_allclose(value(turn @ p.w, p.b), value(p.w, p.b), atol=1e-5)
    p = polygon(5)
    for _ in range(5):
        w, b = p.w.copy(), p.b.copy()
        w[:, 5], b[5] = rng.uniform(-0.15, 0.15, 2), -rng.uniform(0.3, 2)
        np.testing.assert_array_equal(value(w, b), value(p.w, p.b))
        assert polygons.nearest(w, b) == Nearest("5-", pytest.approx(0, abs=1e-7))
    b[5] = 0.01
    assert float(jnp.mean(value(w, b))) < float(jnp.mean(value(p.w, p.b))) - 1e-3


def test_the_function_at_a_four_gon_is_a_form_of_degree_two():
    """Across the rotation and the dead biases: twice as far is four times the loss, and nowhere 0."""
    data, rng = jnp.asarray(model.make_data(4000)), np.random.default_rng(2)
    for num_open in (0, 1, 2):
        p = polygon(4, num_open)
        flat = np.zeros((1 + int((~p.counts).sum()), 18))
        flat[0, :12] = np.ravel(np.array([[0, -1], [1, 0]]) @ p.w)
        flat[1:, 12:] = np.eye(6)[~p.counts]
        across = np.linalg.svd(flat)[2][len(flat) :]
        assert len(across) == 2 * OF_FUNCTION[p.label]
        teacher = {"W": jnp.asarray(p.w, jnp.float32), "b": jnp.asarray(p.b, jnp.float32)}

        @jax.jit
        def far(moves, teacher=teacher):
            own = lambda m: {"W": teacher["W"] + m[:12].reshape(2, 6), "b": teacher["b"] + m[12:]}  # noqa: E731
            loss = lambda m: jnp.mean(model.own_loss_fn({"own": own(m), "teacher": teacher}, data))  # noqa: E731
            return jax.vmap(loss)(moves)

        moves = rng.standard_normal((300, len(across)))
        moves = moves / np.linalg.norm(moves, axis=1, keepdims=True) @ across
        near, double = (np.asarray(far(jnp.asarray(e * moves, jnp.float32))) / e**2 for e in (5e-3, 1e-2))
        np.testing.assert_allclose(double, near, rtol=0.1)
        assert near.min() > 0.01


@pytest.mark.quick
@pytest.mark.parametrize("label", ["0++++++", "3---", "4++", "4+-", "4--", "5-", "5+", "6", "5 doubled"])
def test_k_gons_are_told_whatever_their_position(label):
    rng = np.random.default_rng(4)
    p = polygons.doubled() if label == "5 doubled" else polygon(int(label[0]), label.count("+"))
    w, b = turned(p, rng)
    assert polygons.nearest(w, b) == Nearest(label, pytest.approx(0, abs=1e-7))
    noise = 0.02 * rng.standard_normal((3, 6))
    found = polygons.nearest(w + noise[:2], b + noise[2])
    assert found.label == label
    assert 0 < found.distance <= np.linalg.norm(noise) + 0.1  # a dead unit at a 4-gon opens others by its column


def test_the_distance_is_that_of_the_best_match():
    """One column longer by 0.1, then all biases lower by 0.1: known by hand."""
    p = polygon(6)
    longer = p.w.copy()
    longer[:, 2] *= 1 + 0.1 / np.linalg.norm(longer[:, 2])
    assert polygons.distance(longer, p.b, p) == pytest.approx(0.1, rel=0.01)
    assert polygons.distance(p.w, p.b - 0.1, p) == pytest.approx(0.1 * math.sqrt(6), rel=1e-6)


def test_too_many_corners_are_refused():
    with pytest.raises(ValueError, match="5 corners and 2 open units do not fit 6"):
        polygon(5, 2)


@pytest.mark.quick
def test_stages_are_runs_at_one_k_gon():
    near = [Nearest(*x) for x in [("3", 0.9), ("4", 0.1), ("4", 0.2), ("5", 0.9), ("4", 0.1), ("6", 0.2), ("5", 0.1),
                                  ("5", 0.1)]]  # fmt: skip
    found = stages.stages_of(near)
    assert found == [Stage("elsewhere", 0, 0), Stage("4", 1, 2), Stage("5", 6, 7)]
    assert [stages.gap(jump, found[1], found[2]) for jump in (1, 2, 3, 5, 6, 7)] == [2, 1, 0, 0, 0, 1]
    assert stages.strays(found, [0, 6]) == []
    assert stages.strays([Stage("4", 0, 5), Stage("5", 6, 12)], [6, 9]) == [9]


@pytest.mark.quick
def test_a_change_tells_where_the_coefficient_changes():
    found = stages.match([Stage("0++++++", 0, 4), Stage("4++", 6, 9), Stage("5+", 11, 20)], [6])
    assert [(m.tells, m.jump, m.checkpoints) for m in found] == [(True, 6, 0), (False, 6, 4)]
    assert stages.match([Stage("4+-", 0, 3), Stage("3+--", 4, 9)], []) == [("4+-", "3+--", None, None, None)]


def test_training_does_not_depend_on_what_is_kept():
    """Kills keys that depend on the checkpoints, or on the other seeds."""
    data, start = model.make_data(1000), training.Start(0, 0.02, 0.1)
    alone, beside = training.train(start, [7, 5], [9], data), training.train(start, [3, 7], [4, 9], data)
    np.testing.assert_allclose(alone[9][0]["W"], beside[9][1]["W"], rtol=1e-5)
    assert np.abs(alone[9][0]["W"] - beside[9][0]["W"]).max() > 1e-3


def test_descent_ends_at_the_minimum_over_the_data():
    data = model.make_data(1000)
    start = {"W": polygon(6).w.astype(np.float32), "b": polygon(6).b.astype(np.float32)}
    end = training.to_minimum(start, data)
    slopes = jax.grad(lambda p: jnp.mean(model.loss_fn(p, data)))(jax.tree.map(jnp.asarray, end))
    assert max(float(jnp.abs(s).max()) for s in slopes.values()) < 1e-5
    assert model.mean_loss(end, data) < model.mean_loss(start, data) - 1e-6


@pytest.fixture(scope="module")
def record():
    return json.loads(RESULTS.read_text())


@pytest.mark.quick
@pytest.mark.parametrize("name", ["default", "localization 10"])
def test_the_five_gon_and_the_six_gon_are_within_15_percent(record, name):
    """Every seed by itself, with an error bar below 5 %, and at a minimum that is the k-gon it is called."""
    for label in OF_LOSS:
        rows = [row for row in record["kgons"]["rows"] if row["label"] == label]
        assert len(rows) >= 2
        assert {row["truth"] for row in rows} == {OF_LOSS[label]}
        for row in rows:
            found = row["estimates"][name]
            assert abs(found["llc"] / OF_LOSS[label] - 1) < 0.15
            assert found["llc_stderr"] < 0.05 * OF_LOSS[label]
            assert row["distance"] < 0.1
        assert abs(kgons.summary(rows, label, name)["error"]) < 0.15


@pytest.mark.quick
def test_stages_of_the_llc_are_stages_of_the_weights(record):
    """Every change that changes the coefficient has a jump within two checkpoints, and no jump stands elsewhere."""
    seen = 0
    for family in record["families"]:
        assert family["runs"]
        for run in family["runs"]:
            found = [Stage(**stage) for stage in run["stages"]]
            again = stages.stages_of([Nearest(**c["nearest"]) for c in run["checkpoints"]])
            assert found == again
            assert [s.label for s in found if s.label != "elsewhere"] == family["path"]
            assert run["strays"] == []
            telling = [m for m in run["matches"] if m["tells"]]
            assert telling
            assert all(m["checkpoints"] is not None and m["checkpoints"] <= stages.TOLERANCE for m in telling)
            seen += len(telling)
    assert seen >= 3


@pytest.mark.quick
def test_tables_and_picture_need_only_the_record(record, tmp_path):
    text = tables.tables(record)
    readme = (RESULTS.parent.parent / "README.md").read_text()
    for row in (line for line in text.splitlines() if line.startswith("| ")):
        assert row in readme
    draw(record, tmp_path / "tms.png")
    assert (tmp_path / "tms.png").stat().st_size > 20_000
    assert (RESULTS.with_suffix(".png")).stat().st_size < 150_000
