"""The fresh problems' exact values, against importance sampling of the very losses that are sampled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from scaling.known_answers import TARGETS
from scaling.samplers.fresh_problems import fresh_problems
from scaling.samplers.verdict_settings import PROBLEMS as SETS
from scaling.samplers.verdict_settings import settings
from scaling.samplers.verdicts import PULL, stopped_early

PROBLEMS = fresh_problems()
DRAWS, COST = 1_600_000, 1e8  # at most; of draws times examples that differ


def flat_loss(problem):
    """(mean loss of rows of weights, w*, Hessian at w*), in float64, over the examples that differ."""
    center, unravel = ravel_pytree(jax.tree.map(lambda w: np.asarray(w, np.float64), problem.center))
    rows = jax.tree.map(lambda a: np.asarray(a, np.float64), problem.data)
    columns = np.column_stack([np.reshape(a, (len(a), -1)) for a in jax.tree.leaves(rows)])
    _, first, count = np.unique(columns, axis=0, return_index=True, return_counts=True)
    few = jax.tree.map(lambda a: jnp.asarray(a[first]), rows)
    share = jnp.asarray(count / count.sum())
    mean = jax.jit(lambda w: share @ problem.loss_fn(unravel(w), few))
    return jax.jit(jax.vmap(mean)), np.asarray(center), np.asarray(jax.hessian(mean)(center)), len(first)


def sampled_value(problem, nbeta, localization, seed=0):
    """(nbeta (E[L] - L(w*)), its standard error) by draws from normals around w*, wide and narrow, reweighted."""
    losses, center, hessian, examples = flat_loss(problem)
    size, rng = len(center), np.random.default_rng(seed)
    values, axes = np.linalg.eigh(hessian)
    fitted = nbeta * values.clip(0) + localization
    deviations = [scale / np.sqrt(fitted) for scale in (0.8, 1.0, 1.3)]
    deviations += [np.full(size, scale / math.sqrt(localization)) for scale in (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)]
    count = int(min(DRAWS, COST / examples)) // len(deviations)
    steps = np.concatenate([rng.normal(size=(count, size)) * d for d in deviations])
    log_each = np.stack([-0.5 * ((steps / d) ** 2).sum(1) - np.log(d).sum() for d in deviations])
    log_proposal = np.logaddexp.reduce(log_each, 0)
    start = float(losses(center[None])[0])
    parts = np.array_split(steps @ axes.T, max(1, count * len(deviations) * examples // 10_000_000))
    fall = nbeta * (np.concatenate([losses(center + part) for part in parts]) - start)
    log_weight = -fall - 0.5 * localization * (steps**2).sum(1) - log_proposal
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = weight @ fall
    return float(mean), float(np.sqrt(weight**2 @ (fall - mean) ** 2))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_exact_value_is_that_of_its_posterior(name):
    """Kills: a factor lost where a weight was integrated out; a grid that is too coarse; a w* that is no minimum."""
    problem = PROBLEMS[name]
    default = problem.num_data / math.log(problem.num_data)
    with jax.enable_x64(True):
        for nbeta, localization in ((default, 1.0), (30.0, 0.5)):
            value, error = sampled_value(problem, nbeta, localization)
            exact = problem.exact(nbeta, localization)
            assert error < 0.015 * exact
            assert abs(value - exact) < 4 * error


@pytest.mark.parametrize("name", PROBLEMS)
def test_w_star_is_a_minimum_and_singular_as_told(name):
    problem = PROBLEMS[name]
    with jax.enable_x64(True):
        losses, center, hessian, _ = flat_loss(problem)
        near = center + 1e-2 * np.random.default_rng(0).normal(size=(200, len(center)))
        lower = float(losses(center[None])[0]) - np.asarray(losses(near)).min()
    nbeta = problem.num_data / math.log(problem.num_data)
    assert nbeta * lower < 1e-4  # w* is rounded to float32
    values = np.linalg.eigvalsh(hessian)
    assert (values[0] < 1e-6 * max(values[-1], 1e-3)) == problem.singular


@pytest.mark.parametrize("name", PROBLEMS)
def test_minibatches_differ_in_their_losses(name):
    problem = PROBLEMS[name]
    rows = jax.tree.map(lambda a: a[:400], problem.data)
    moved = jax.tree.map(lambda w: w + 0.1 * np.float32(1 + np.arange(w.size)).reshape(w.shape), problem.center)
    assert np.std(problem.loss_fn(moved, rows)) > 0


@pytest.mark.quick
def test_the_fresh_runs_are_many_singular_and_bad():
    """Announced before the first of them."""
    runs = list(settings("fresh"))
    assert len(runs) == 288
    assert len({run.options["key"] for run in runs}) == len(runs)
    assert sum(PROBLEMS[run.problem].singular for run in runs) >= len(runs) / 3
    assert sum(run.unfinished or run.noisy for run in runs) >= len(runs) / 4
    before = {name for problems, names in SETS.items() if problems != "fresh" for name in names}
    assert not {*before, *(target.name for target in TARGETS)} & set(PROBLEMS)


@pytest.mark.parametrize("excess", [0.5, 5.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_training_that_stopped_early_is_above_the_minimum_by_so_much(name, excess):
    """Kills: the loss of w* not subtracted; a stop at another minimum, or at w* itself."""
    problem = PROBLEMS[name]
    nbeta = problem.num_data / math.log(problem.num_data)
    center = stopped_early(problem, excess)
    with jax.enable_x64(True):
        losses, least, _, _ = flat_loss(problem)
        above = np.asarray(losses(np.stack([np.asarray(ravel_pytree(center)[0], np.float64), least])))
    assert nbeta * (above[0] - above[1]) == pytest.approx(excess * problem.exact(nbeta, PULL), rel=0.02)
