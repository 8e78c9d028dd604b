"""Deep linear teachers and their data: the ranks they were drawn with, the conditions of each type, exact minima."""

import itertools
import math

import jax
import numpy as np
import pytest

from scaling.dln import teachers, truth

# --- teachers


@pytest.mark.quick
@pytest.mark.parametrize("kind", teachers.KINDS)
def test_a_teacher_is_its_arguments(kind):
    one, two, other = (teachers.make_teacher(kind, "1K", seed) for seed in (3, 3, 4))
    assert one.widths == two.widths
    assert all(np.array_equal(a, b) for a, b in zip(one.weights, two.weights, strict=True))
    assert one.widths != other.widths
    assert (one.widths, one.layer_ranks) == teachers.draw_shape(kind, "1K", 3)
    assert [w.shape for w in one.weights] == list(itertools.pairwise(one.widths))
    assert {w.dtype for w in one.weights} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", teachers.KINDS)
@pytest.mark.parametrize(("size", "seeds"), [("1K", 6), ("10K", 2)])
def test_the_weights_have_the_ranks_they_were_drawn_with(kind, size, seeds):
    for seed in range(seeds):
        teacher = teachers.make_teacher(kind, size, seed)
        table = truth.generic_rank_table(teacher.widths, teacher.layer_ranks)
        np.testing.assert_array_equal(truth.rank_table(teacher.weights), table)
        assert teacher.rank == table[0, -1]
        assert teacher.bounds == truth.local_bounds(teacher.weights)
        assert truth.jacobian_rank(teacher.weights) == truth.table_jacobian_rank(table)
        for layer, rank in zip(teacher.weights, teacher.layer_ranks, strict=True):
            values = np.linalg.svd(layer.astype(np.float64), compute_uv=False)
            assert values[0] < 2.5 + 1.2 * math.sqrt(layer.shape[1] / layer.shape[0])
            assert values[rank - 1] > 1e-4
            assert values[rank:].max(initial=0) < 1e-6


@pytest.mark.parametrize(("size", "seeds"), [("1K", 200), ("100K", 50), ("100M", 20)])
def test_kinds_keep_their_conditions(size, seeds):
    for seed in range(seeds):
        for kind in "ABC":
            shape = teachers.draw_shape(kind, size, seed)
            widths, ranks = shape
            layers, limits = teachers.SIZES[size].layers, teachers.SIZES[size].widths
            assert layers[0] <= len(ranks) <= layers[1]
            assert limits[0] <= min(widths) <= max(widths) <= limits[1]
            rank, full = min(ranks), [min(pair) for pair in itertools.pairwise(widths)]
            value, multiplicity = truth.learning_coefficient(widths, rank)
            regular = rank * (widths[0] + widths[-1] - rank)
            table = truth.generic_rank_table(*shape)
            assert truth.table_bounds(table) == (value, value)
            if kind == "A":
                assert set(ranks) == {rank}
                assert 1 <= rank < min(widths)
                continue
            assert multiplicity == 1
            assert truth.table_jacobian_rank(table) == 2 * value
            if kind == "B":
                assert list(ranks) == full
                assert 2 * value == regular
            else:
                (k,) = [k for k in range(len(ranks)) if ranks[k] < full[k]]
                others = [h for i, h in enumerate(widths) if i not in (k, k + 1)]
                assert min(others) >= widths[k] + widths[k + 1] - rank
                assert min(others) >= max(widths[k], widths[k + 1])
                assert 2 * value == regular + (widths[k] - rank) * (widths[k + 1] - rank)


def test_the_theorem_is_not_the_truth_of_many_published_teachers():
    """By the Jacobian alone it is off by more than 1 % for 21 % of them (an independent count of 2000 nets); by all
    that is known it is off for 36 % (12,000 other seeds). Tolerance: 4 binomial standard errors.
    """
    shapes = [teachers.draw_shape("published", "1K", seed) for seed in range(2000)]
    tables = [truth.generic_rank_table(*shape) for shape in shapes]
    theorem = [truth.learning_coefficient(s.widths, min(s.layer_ranks))[0] for s in shapes]
    bounds = [truth.table_bounds(table) for table in tables]
    jacobian = np.mean([truth.table_jacobian_rank(t) / 2 > 1.01 * v for t, v in zip(tables, theorem, strict=True)])
    doubtful = np.mean([b[0] > v for b, v in zip(bounds, theorem, strict=True)])
    known = np.mean([lower == upper for lower, upper in bounds])
    assert abs(jacobian - 0.21) < 4 * math.sqrt(2 * 0.21 * 0.79 / 2000)
    assert abs(doubtful - 0.36) < 4 * math.sqrt(0.36 * 0.64 / 2000)
    assert known > 0.8
    assert teachers.make_teacher("published", "1K", 0).doubtful == (bounds[0][0] > theorem[0])


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "size", "message"), [("D", "1K", "one of A, B, C"), ("A", "1k", "one of 1K, 10K")])
def test_unknown_teachers_are_refused(kind, size, message):
    with pytest.raises(ValueError, match=message):
        teachers.make_teacher(kind, size, 0)


# --- data


@pytest.fixture(scope="module")
def teacher():
    return teachers.make_teacher("A", "1K", 0)


def total_gradient(teacher, data):
    """Norm of the gradient of the mean loss at the teacher."""
    gradient = jax.grad(lambda w: teachers.loss_fn(w, data).mean())(teacher.weights)
    return math.sqrt(sum(float((g**2).sum()) for g in gradient))


@pytest.mark.quick
def test_the_teacher_is_the_exact_minimum_of_projected_data(teacher):
    end_to_end = teachers.end_to_end(teacher.weights)
    gradients, crosses = {}, {}
    for project in (True, False):
        x, y = teachers.make_data(teacher, 3000, label_noise=2.0, project=project)
        noise = y - x.astype(np.float64) @ end_to_end
        assert noise.std() == pytest.approx(2, abs=8 / math.sqrt(2 * noise.size) + 2 * len(end_to_end) / 3000)
        crosses[project] = np.abs(x.astype(np.float64).T @ noise).max()
        gradients[project] = total_gradient(teacher, (x, y))
    assert crosses[True] < 1e-4 * crosses[False]
    assert gradients[True] < 1e-3 * gradients[False]


@pytest.mark.quick
def test_projected_noise_adds_one_constant_to_every_loss(teacher):
    clean, noisy = (teachers.make_data(teacher, 2000, label_noise=noise) for noise in (0.0, 1.0))
    np.testing.assert_array_equal(clean[0], noisy[0])
    assert -10 <= clean[0].min() < -9.9
    assert 9.9 < clean[0].max() <= 10
    assert abs(clean[0].mean()) < 4 * math.sqrt(100 / 3 / clean[0].size)
    rng = np.random.default_rng(1)
    offsets = []
    for _ in range(4):
        shift = 0.1 * rng.standard_normal((teacher.widths[0], teacher.widths[-1]))
        parameter = teachers.end_to_end(teacher.weights) + shift
        losses = [np.mean((x.astype(np.float64) @ parameter - y) ** 2) for x, y in (clean, noisy)]
        offsets.append(losses[1] - losses[0])
    np.testing.assert_allclose(offsets, np.mean((noisy[1] - clean[1]) ** 2), rtol=1e-6)


def test_noise_as_it_comes_lowers_the_estimate_as_derived():
    """nbeta (L_n(W*) - min L_n) against (d / 2) 2 s^2 / (H_L log n), d = H_0 H_L: a chi-square with d degrees."""
    teacher = teachers.make_teacher("B", "1K", 1)
    num, scale = 4000, 1.5
    x, y = teachers.make_data(teacher, num, label_noise=scale, project=False)
    noise = y - x.astype(np.float64) @ teachers.end_to_end(teacher.weights)
    fitted = x @ np.linalg.lstsq(x.astype(np.float64), noise, rcond=None)[0]
    measured = num / math.log(num) * ((noise**2).mean() - ((noise - fitted) ** 2).mean())
    d, outputs = teacher.widths[0] * teacher.widths[-1], teacher.widths[-1]
    derived = d / 2 * 2 * scale**2 / (outputs * math.log(num))
    assert abs(measured / derived - 1) < 4 * math.sqrt(2 / d)


@pytest.mark.quick
def test_the_loss_is_the_mean_over_outputs(teacher):
    x, y = teachers.make_data(teacher, 50, label_noise=1.0)
    expected = ((x.astype(np.float64) @ teachers.end_to_end(teacher.weights) - y) ** 2).mean(axis=1)
    np.testing.assert_allclose(teachers.loss_fn(teacher.weights, (x, y)), expected, rtol=1e-4)
    exact = teachers.make_data(teacher, 50)
    np.testing.assert_allclose(teachers.loss_fn(teacher.weights, exact), 0, atol=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("num_data", [3000, 10])
def test_sufficient_data_give_the_losses_of_all_data(teacher, num_data):
    """Also with fewer examples than inputs, where X'X is singular."""
    x, _ = teachers.make_data(teacher, num_data)
    pseudo = teachers.sufficient_data(x)
    assert pseudo.shape == (teacher.widths[0],) * 2
    assert pseudo.dtype == np.float32
    rng = np.random.default_rng(2)
    for _ in range(3):
        shift = rng.standard_normal((teacher.widths[0], teacher.widths[-1]))
        losses = [np.mean((inputs.astype(np.float64) @ shift) ** 2) for inputs in (x, pseudo)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.quick
def test_bad_noise_is_refused(teacher):
    with pytest.raises(ValueError, match="standard deviation, >= 0, got -1"):
        teachers.make_data(teacher, 100, label_noise=-1)
    with pytest.raises(ValueError, match="more examples than inputs"):
        teachers.make_data(teacher, teacher.widths[0], label_noise=1.0)
