"""Stages of an LLC curve: found where they are, with intervals that hold, and not found where there are none."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from slt_jax.results import stages as module
from slt_jax.results.stages import Stage, find_stages

RECORD = Path(__file__).parents[2] / "scaling" / "dln" / "results" / "development.json"
RISING = (
    [4, 9, 20, 43, 94, 205, 448, 980],
    [-3.82, 7.01, 11.56, 9.52, 10.44, 17.19, 23.27, 39.74],
    [0.55, 0.48, 0.41, 0.15, 0.28, 0.19, 0.19, 0.23],
)


def cuts(found, steps):
    """Indices of the first checkpoints of the later stages."""
    return [list(steps).index(b.between[1]) for b in found.boundaries]


def fit(llc, errors, **options):
    steps = np.geomspace(10, 10_000, len(llc))
    found = find_stages(steps, llc, errors, **{"resamples": 1, **options})
    return found, cuts(found, steps)


@pytest.mark.quick
@pytest.mark.parametrize("drift", [0.0, 0.7])
def test_the_cost_is_the_marginal_likelihood_of_a_stage(drift):
    """Against the normal density written out. Kills a filter with gain, start or order wrong."""
    rng = np.random.default_rng(0)
    llc, errors = rng.normal(size=7), rng.uniform(0.3, 1.0, 7)
    costs = module.stage_costs(llc, errors, np.array([[0.0, 0.0], [0.4, drift]]))[1]
    prior = llc.var() + np.mean(errors**2)
    for i, j in itertools.combinations(range(8), 2):
        walk = drift**2 * np.minimum.outer(np.arange(j - i), np.arange(j - i))
        covariance = prior + walk + np.diag(errors[i:j] ** 2 + 0.16)
        expected = -2 * multivariate_normal(np.full(j - i, llc.mean()), covariance).logpdf(llc[i:j])
        assert costs[i, j] + (j - i) * math.log(2 * math.pi) == pytest.approx(expected, rel=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_cuts_are_the_best_of_all(most):
    """Against every way to cut nine checkpoints into stages of two or more."""
    ways = [
        (0, *inner, 9)
        for k in range(most)
        for inner in itertools.combinations(range(1, 9), k)
        if min(np.diff((0, *inner, 9))) >= 2
    ]
    for seed in range(20):
        table = np.random.default_rng(seed).gamma(1.0, 3.0, size=(9, 10))
        value = {way: sum(table[i, j] for i, j in itertools.pairwise(way)) for way in ways}
        value = {way: x + 2 * math.log(math.comb(8, len(way) - 2)) for way, x in value.items()}
        assert module.best_cuts(table, most) == min(value, key=value.get)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 8, 4, 4, 4), (3, 2, 11)])
def test_a_clean_staircase_is_found_exactly(sizes):
    truth = np.repeat(3.0 * np.arange(len(sizes)) + 5, sizes)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        errors = rng.uniform(0.1, 0.3, len(truth))
        found, places = fit(truth + errors * rng.normal(size=len(truth)), errors)
        assert places == list(np.cumsum(sizes)[:-1])
        assert [s.num_checkpoints for s in found.stages] == list(sizes)


def test_means_and_jumps_have_their_errors():
    """z-scores of levels and jumps against the truth, unequal errors. Kills unweighted means."""
    truth, z, jumps = np.repeat([4.0, 12.0], 6), [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        errors = np.where(rng.random(12) < 0.5, 0.1, 1.0)
        found, places = fit(truth + errors * rng.normal(size=12), errors)
        assert places == [6]
        z += [(s.llc - t) / s.llc_stderr for s, t in zip(found.stages, (4, 12), strict=True)]
        jumps.append((found.boundaries[0].jump - 8) / found.boundaries[0].jump_stderr)
        weights = 1 / (errors[:6] ** 2 + found.scatter**2)
        assert found.stages[0].llc_stderr == pytest.approx(weights.sum() ** -0.5)
    for values in (np.array(z), np.array(jumps)):
        assert np.sum(values**2) == pytest.approx(len(values), abs=4 * math.sqrt(2 * len(values)))


def test_a_noisy_step_is_found_near_its_place():
    """2.5 standard errors, eight checkpoints on either side: its place within one in nine of ten that are found."""
    truth, near = 2.5 * (np.arange(16) > 7), []
    for seed in range(100):
        places = fit(truth + np.random.default_rng(seed).normal(size=16), np.ones(16))[1]
        near += [min(abs(place - 8) for place in places) <= 1] if places else []
    assert len(near) >= 80
    assert np.mean(near) > 0.9 - 3 * math.sqrt(0.9 * 0.1 / len(near))


def test_intervals_hold_the_truth_as_often_as_they_say():
    level, inside, widths = 0.8, [], []
    for seed in range(100):
        llc = 2.0 * (np.arange(16) > 7) + np.random.default_rng(seed).normal(size=16)
        options = {"level": level, "resamples": 40, "max_stages": 2}
        boundaries = find_stages(np.arange(16), llc, np.ones(16), **options).boundaries
        inside += [b.low <= 7 and b.high >= 8 for b in boundaries]
        widths += [b.high - b.low for b in boundaries]
    assert len(inside) > 50
    assert abs(np.mean(inside) - level) < 3 * math.sqrt(level * (1 - level) / len(inside))
    assert 2 < np.mean(widths) < 5


@pytest.mark.parametrize("count", [8, 20])
def test_a_constant_curve_has_no_boundary(count):
    false = [len(fit(np.random.default_rng(s).normal(size=count), np.ones(count))[1]) > 0 for s in range(100)]
    assert np.mean(false) <= 0.1


@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_a_drift_is_one_stage_and_a_jump_in_it_is_found(noise):
    """Kills a model of constant levels, which cuts a ramp into pieces."""
    ramp, errors, alone, jumps = 0.3 * np.arange(20), np.full(20, noise), [], []
    for seed in range(50):
        curve = ramp + noise * np.random.default_rng(seed).normal(size=20)
        alone.append(fit(curve, errors, max_stages=4)[1])
        jumps.append(fit(curve + 6.0 * (np.arange(20) > 11), errors, max_stages=4)[1])
    assert sum(places == [] for places in alone) >= 45
    assert sum(places == [12] for places in jumps) >= 45
    assert len(fit(ramp, errors, drift=0.0)[1]) > 1


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_smooth_rise_is_one_stage(power):
    curves = [
        10 * np.linspace(0, 1, 20) ** power + 0.2 * np.random.default_rng(seed).normal(size=20) for seed in range(40)
    ]
    assert sum(fit(curve, np.full(20, 0.2), max_stages=4)[1] == [] for curve in curves) >= 36


def test_errors_that_are_too_small_become_scatter():
    """Standard errors of 0.2 for a noise of 1."""
    truth = 6.0 * (np.arange(20) > 9)
    runs = [fit(truth + np.random.default_rng(s).normal(size=20), np.full(20, 0.2), max_stages=4) for s in range(60)]
    right = [found.scatter**2 + 0.2**2 for found, places in runs if places == [10]]
    assert len(right) >= 51
    # the likelihood divides by 20 where 18 degrees of freedom are left
    assert np.mean(right) == pytest.approx(18 / 20, abs=4 * 0.9 * math.sqrt(2 / 18 / len(right)))


def test_units_do_not_matter_and_a_boundary_is_a_place_in_steps():
    rng = np.random.default_rng(3)
    llc, errors = np.repeat([1.0, 4.0, 2.0], 5) + 0.5 * rng.normal(size=15), np.full(15, 0.5)
    found, places = fit(llc, errors, resamples=40)
    scaled, same = fit(1000 * llc + 7, 1000 * errors, resamples=40)
    assert places == same == [5, 10]
    for b, c in zip(found.boundaries, scaled.boundaries, strict=True):
        assert (b.between, b.low, b.high, b.support) == (c.between, c.low, c.high, c.support)
        assert c.jump == pytest.approx(1000 * b.jump)
        assert b.step == pytest.approx(math.sqrt(b.between[0] * b.between[1]))
        assert b.low <= b.between[0] < b.step < b.between[1] <= b.high
    assert find_stages([-10, 0, 20, 30], [1.0, 1.1, 9.0, 9.1], [0.1] * 4).boundaries[0].step == 10


def test_resamples_have_the_law_of_the_fitted_stages(monkeypatch):
    """Mean and covariance of the bootstrap's curves. Kills noise on top of the curve, and a forgotten drift."""
    llc, errors, drawn, most = np.array([0.0, 1, 0, 1, 9, 11, 10, 10]), np.linspace(0.5, 1.2, 8), [], []
    made = tuple(Stage(0.0, 0.0, x, 0.1, 4) for x in (0.5, 10.0))
    monkeypatch.setattr(module, "stage_costs", lambda curve, *_: drawn.append(curve) or [None])
    monkeypatch.setattr(module, "best_cuts", lambda _, limit: most.append(limit) or ())
    noise, count = np.array([0.6, 0.8]), 20_000
    module.bootstrap(np.random.default_rng(0), count, llc, errors, made, (0, 4, 8), noise, 5)
    assert set(most) == {4}
    center = np.kron(np.eye(2), np.eye(4) - 0.25)
    walk = np.kron(np.eye(2), 0.64 * (1.0 + np.minimum.outer(np.arange(4), np.arange(4))))
    expected = center @ walk @ center.T + np.diag(errors**2 + 0.36)
    deviations = np.sqrt(np.diag(expected))
    away = np.abs(np.mean(drawn, axis=0) - np.repeat([0.5, 10], 4))
    np.testing.assert_array_less(away, 4.5 * deviations / math.sqrt(count))
    spread = np.sqrt((np.outer(deviations, deviations) ** 2 + expected**2) / count)
    np.testing.assert_array_less(np.abs(np.cov(np.array(drawn).T) - expected), 4.5 * spread)


@pytest.mark.quick
def test_an_interval_holds_its_level_of_the_resamples_that_have_the_boundary():
    """By hand: steps 0..11, cuts at 4 and 8."""
    made = (Stage(0.0, 3.0, 1.0, 0.3, 4), Stage(4.0, 7.0, 5.0, 0.4, 4), Stage(8.0, 11.0, 6.0, 0.3, 4))
    drawn = [(0, 4, 8, 12)] * 8 + [(0, 5, 8, 12)] * 7 + [(0, 2, 5, 8, 12)] + [(0, 2, 8, 12)] * 2 + [(0, 8, 12), (0, 12)]
    first, second = module.boundaries_of(np.arange(12.0), (0, 4, 8, 12), made, drawn, 0.7)
    assert (first.between, first.low, first.high) == ((3, 4), 3, 5)
    assert first.support == 16 / 20
    assert (second.low, second.high, second.support) == (7, 8, 19 / 20)
    assert (first.jump, first.jump_stderr) == (4.0, 0.5)
    wide = module.boundaries_of(np.arange(12.0), (0, 4, 8, 12), made, drawn, 0.95)[0]
    assert (wide.low, wide.high, wide.support) == (1, 5, 18 / 20)
    narrow = module.boundaries_of(np.arange(12.0), (0, 4, 8, 12), made, drawn, 0.02)[0]
    assert (narrow.low, narrow.high, narrow.support) == (3, 4, 16 / 20)  # 5 is within one checkpoint
    lost = module.boundaries_of(np.arange(12.0), (0, 4, 12), made[:2], [(0, 12)] * 5, 0.9)[0]
    assert (lost.low, lost.high, lost.support) == (0, 11, 0)


@pytest.mark.quick
def test_a_missing_checkpoint_is_left_out():
    llc, errors = np.repeat([1.0, 9.0], 5), np.full(10, 0.2)
    steps = np.arange(1, 11)
    for bad in (np.nan, np.inf):
        holes, wide = llc.copy(), errors.copy()
        holes[2], wide[7] = bad, bad
        kept = [i for i in range(10) if i not in (2, 7)]
        expected = find_stages(steps[kept], llc[kept], errors[kept])
        assert find_stages(steps, holes, wide) == expected
        assert [s.num_checkpoints for s in expected.stages] == [4, 4]


def test_a_rising_curve_is_drift_and_cut_only_when_told():
    """A small language model's curve: no level is held, and without drift the place of the cut is uncertain."""
    whole = find_stages(*RISING)
    assert whole.boundaries == ()
    assert whole.drift > 3
    found = find_stages(*RISING, drift=0.0)
    assert found.drift == 0
    assert len(found.boundaries) >= 1
    steps = RISING[0]
    for b in found.boundaries:
        assert steps.index(b.high) - steps.index(b.low) >= 2
        assert b.support < 1
    assert find_stages(*RISING, drift=0.0, max_stages=1).boundaries == ()


def test_a_deep_linear_networks_ranks_are_its_stages():
    """Boundaries where the rank of its weights changes, within one checkpoint; levels near the exact coefficients."""
    record = json.loads(RECORD.read_text())
    rows = record["checkpoints"]
    steps = [row["step"] for row in rows]
    found = find_stages(steps, *([row["own"][name] for row in rows] for name in ("llc", "llc_stderr")))
    ranks = np.array([row["effective_rank"] for row in rows])
    changes = np.flatnonzero(np.diff(ranks)) + 1
    assert len(changes) == len(found.boundaries) == 4
    for place, change, b in zip(cuts(found, steps), changes, found.boundaries, strict=True):
        assert abs(place - change) <= 1
        assert b.low <= steps[change - 1] < steps[change] <= b.high
        assert b.support > 0.95
    for stage, known in zip(found.stages, record["plateaus"], strict=True):
        assert stage.llc == pytest.approx(known["exact"], rel=0.05)


def test_it_says_what_it_found():
    found = find_stages([1, 2, 3, 4, 5, 6], [1.0, 1.1, 1.0, 9.0, 9.1, 9.0], [0.1] * 6)
    for part in ("2 stages", "Steps 1 to 3 (3 checkpoints): LLC 1.033", "jump +8 +/- 0.082 between 3 and 4", "90%"):
        assert part in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["boundaries"][0]["between"] == [3, 4]
    assert str(find_stages(*RISING)).startswith("1 stage;")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"llc": [1.0] * 5}, r"of one length, got shapes \(6,\), \(5,\)"),
        ({"steps": [1, 2, 4, 3, 5, 6]}, "steps must increase"),
        ({"steps": [1, 2, 2, 3, 4, 5]}, "steps must increase"),
        ({"llc_stderr": [0.1] * 5 + [0.0]}, "llc_stderr must be > 0, got 0.0 at step 6"),
        ({"llc": [1.0, 2, 3, math.nan, math.nan, math.nan]}, "4 checkpoints with an LLC and its error, got 3 of 6"),
        ({"level": 1.0}, "level must be between 0 and 1"),
        ({"resamples": 0}, "resamples must be >= 1"),
        ({"max_stages": 0}, "max_stages must be >= 1"),
        ({"drift": -1.0}, "drift must be >= 0"),
    ],
)
def test_what_is_no_curve_is_refused(change, text):
    given = {"steps": [1, 2, 3, 4, 5, 6], "llc": [1.0] * 6, "llc_stderr": [0.1] * 6}
    with pytest.raises(ValueError, match=text):
        find_stages(**{**given, **change})
