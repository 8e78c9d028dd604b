"""The Kronecker metric: its algebra, what it makes of a Kronecker Hessian, and the law of a sampler moving in it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
import slt_jax.calibration.metric_pilot
import slt_jax.samplers.kronecker
from slt_jax.calibration.effort import Effort
from slt_jax.calibration.probe import Probe, acceptance, noise_squares
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.engine.progress import Progress
from slt_jax.kernels.langevin import normal
from slt_jax.samplers.base import Factor, Hyper, pull_back, root
from slt_jax.samplers.kronecker import PROBES, ROUNDS, blank_factor, largest, matrix_shape, measure
from tests.engines import engine_of
from tests.samplers.matrices import spread

ROWS, COLUMNS, PULL = 12, 7, 1.0


A, B = 1e6 * spread(ROWS, 3, 0), spread(COLUMNS, 3, 1)
DENSE = np.kron(A, B) + PULL * np.eye(ROWS * COLUMNS)  # of the flattened matrix, row by row


def curvature(position, direction, reach):
    (x,) = direction
    return (jnp.asarray(A @ np.asarray(x, np.float64) @ B + PULL * np.asarray(x), jnp.float32),)


def dense_root(factor):
    columns = [_root_of(factor, unit) for unit in np.eye(ROWS * COLUMNS, dtype=np.float32)]
    return np.array(columns, np.float64).T


def _root_of(factor, flat):
    return np.asarray(root((factor,), (jnp.asarray(flat.reshape(ROWS, COLUMNS)),))[0]).reshape(-1)


@pytest.fixture(scope="module")
def metric():
    return measure(curvature, [(jnp.zeros((ROWS, COLUMNS)),)], 8, 1.0, PULL, jax.random.key(0))


@pytest.mark.quick
def test_a_force_is_turned_by_the_adjoint_and_nothing_by_no_metric(metric):
    """<R u, g> = <u, R' g>; R has orthogonal columns as long as its scales."""
    rng = np.random.default_rng(1)
    u, g = (jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.float32) for _ in range(2))
    found = float(jnp.sum(root(metric, (u,))[0] * g))
    assert found == pytest.approx(float(jnp.sum(u * pull_back(metric, (g,))[0])), rel=1e-4)
    matrix, scale = dense_root(metric[0]), np.asarray(metric[0].scale, np.float64).reshape(-1)
    np.testing.assert_allclose(matrix.T @ matrix, np.diag(scale**2), atol=1e-5 * scale.max() ** 2)
    tree = (jnp.ones(3),)
    assert root((), tree) is tree
    assert pull_back((), tree) is tree


def test_a_kronecker_hessian_becomes_round(metric):
    """Six decades become little more than one. Kills: a scale that is the curvature, or the fourth root of it."""
    assert np.linalg.cond(DENSE) > 3e5
    matrix = dense_root(metric[0])
    values = np.linalg.eigvalsh(matrix.T @ DENSE @ matrix)
    assert values.max() / values.min() < 20
    assert 0.3 < np.median(values) < 3
    found = largest(curvature, metric, (jnp.zeros((ROWS, COLUMNS)),), 30, jax.random.key(1))
    assert found == pytest.approx(values.max(), rel=0.05)


def measured(hessian, shape, count=8, seed=0, begun=(), reaches=None):
    """The metric of one leaf under this Hessian of its flattened self; the secants' lengths go to ``reaches``."""

    def product(position, direction, reach):
        if reaches is not None:
            reaches.append(reach)
        flat = np.asarray(direction[0], np.float64).reshape(-1)
        return (jnp.asarray((hessian @ flat).reshape(shape), jnp.float32),)

    return measure(product, [(jnp.zeros(shape),)], count, 1.0, 1.0, jax.random.key(seed), begun)


def test_rounding_of_a_secant_is_not_taken_for_curvature(metric):
    """A force of its own in every product, many times any direction's: as float32 leaves it in wide networks."""
    place, calls = (jnp.zeros((ROWS, COLUMNS)),), []
    exact = largest(curvature, metric, place, 8, jax.random.key(1))

    def rounded(position, direction, reach):
        calls.append(reach)
        stir = np.random.default_rng(len(calls)).normal(size=(ROWS, COLUMNS))
        force = 10 * exact * stir / np.sqrt(stir.size)  # R' x has this length where x is R'^-1 of it
        left, right, scale = (np.asarray(x, np.float64) for x in metric[0])
        return (curvature(position, direction, reach)[0] + left @ (force / scale) @ right.T,)

    look = lambda *exact_products: largest(rounded, metric, place, 8, jax.random.key(1), *exact_products)  # noqa: E731
    assert look() > 5 * exact
    assert look(curvature) == pytest.approx(exact, rel=1e-6)
    assert len(calls) == 16
    products = []
    hessian = lambda *where: products.append(where) or curvature(*where)  # noqa: E731
    assert largest(curvature, metric, place, 8, jax.random.key(1), hessian) == exact
    assert not products  # a secant that will do is not replaced: kinks of a loss are in it alone


def test_scales_come_from_other_probes_than_bases(monkeypatch):
    """With a right factor of rank 1, four probes see four of twelve left directions: the others are no less stiff."""
    one = np.outer(np.ones(COLUMNS), np.ones(COLUMNS)) / COLUMNS
    hessian = 1e4 * np.kron(np.eye(ROWS), one)
    largest_of = lambda found: np.linalg.eigvalsh((r := dense_root(found[0])).T @ hessian @ r).max()  # noqa: E731
    monkeypatch.setattr(slt_jax.samplers.kronecker, "ROUNDS", 1)  # a second one sees the others too
    assert largest_of(measured(hessian, (ROWS, COLUMNS))) < 10
    monkeypatch.setattr(slt_jax.samplers.kronecker, "rescaled", lambda factor, *_, **__: factor)
    assert largest_of(measured(hessian, (ROWS, COLUMNS))) > 50


def deep_linear(widths, nbeta):
    """The Jacobian of the product of Gaussian layers times sqrt(nbeta), float64, and the layers' shapes."""
    rng, shapes = np.random.default_rng(0), list(itertools.pairwise(widths))
    layers = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]
    before, after = [np.eye(widths[0])], [np.eye(widths[-1])]
    for left, right in zip(layers, reversed(layers), strict=True):
        before.append(before[-1] @ left)
        after.insert(0, right @ after[0])
    blocks = [np.kron(a, b.T) for a, b in zip(before[:-1], after[1:], strict=True)]
    return np.sqrt(nbeta) * np.concatenate(blocks, axis=1), shapes


def slow_share(rounds):
    """Of the expected loss, the share in modes with a curvature below 0.1; and the largest curvature."""
    jacobian, shapes = deep_linear((6, 7, 5, 6, 4, 6, 5, 7), 1e12)
    hessian = jacobian.T @ jacobian + 1e7 * np.eye(jacobian.shape[1])
    ends = np.cumsum([a * b for a, b in shapes])[:-1]

    def leaves(flat):
        return tuple(x.reshape(shape) for x, shape in zip(jnp.split(flat, ends), shapes, strict=True))

    def product(position, direction, reach):
        flat = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in direction])
        return leaves(jnp.asarray(hessian @ flat, jnp.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slt_jax.samplers.kronecker, "ROUNDS", rounds)
        metric = measure(product, [leaves(jnp.zeros(len(hessian)))], 8, 1.0, 1e7, jax.random.key(0))
    columns = jax.vmap(lambda unit: jnp.concatenate([x.reshape(-1) for x in root(metric, leaves(unit))]))
    turn = np.asarray(columns(jnp.eye(len(hessian))), np.float64).T
    values, modes = np.linalg.eigh(turn.T @ hessian @ turn)
    loss = ((jacobian @ turn @ modes) ** 2).sum(0) / values
    return loss[values < 0.1].sum() / loss.sum(), values.max()


def test_layers_that_push_along_the_same_few_directions_do_not_hide_the_others():
    """Seven layers, eight decades. One round, in the weights' own coordinates, leaves ten times as much crawling."""
    share, most = slow_share(slt_jax.samplers.kronecker.ROUNDS)
    assert share < 0.01
    assert most < 10
    assert slow_share(1)[0] > 5 * share


def test_a_product_that_is_not_finite_gives_no_metric():
    def from_call(number):
        calls = iter(range(1000))
        bad = lambda at, u, reach: tuple(x * (np.nan if next(calls) >= number else 1.0) for x in u)  # noqa: E731
        return measure(bad, [(jnp.zeros((2, 3)),)], 2, 1.0, 1.0, jax.random.key(0))

    last = ROUNDS * PROBES + 2
    assert from_call(0) is None
    assert from_call(PROBES) is None
    assert from_call(last - 1) is None
    assert from_call(last) is not None


def test_leaves_of_any_shape_are_matrices():
    assert [matrix_shape(s) for s in ((), (5,), (3, 4), (2, 3, 4))] == [(1, 1), (5, 1), (3, 4), (6, 4)]
    stiffness = np.array([2.0, 1e2, 1e4, 1e6, 1e8])
    (vector,) = measured(np.diag(stiffness), (5,), count=30)
    assert vector.left is None
    assert vector.right is None
    assert vector.scale.shape == (5, 1)
    np.testing.assert_allclose(np.asarray(vector.scale)[:, 0] ** -2, stiffness, rtol=0.6)


def test_a_metric_is_taken_up_where_another_one_left_off():
    """One round from there, with the curvature a hundred times higher meanwhile; and it is no longer that of before."""
    reaches = []
    begun = measured(DENSE, (ROWS, COLUMNS), reaches=reaches)
    assert reaches == [1.0] * PROBES + [slt_jax.samplers.kronecker.WHITE_REACH] * ((ROUNDS - 1) * PROBES + 8)
    reaches.clear()
    found = measured(100 * DENSE, (ROWS, COLUMNS), seed=1, begun=begun, reaches=reaches)
    assert reaches == [slt_jax.samplers.kronecker.WHITE_REACH] * (PROBES + 8)
    matrix = dense_root(found[0])
    values = np.linalg.eigvalsh(matrix.T @ (100 * DENSE) @ matrix)
    assert values.max() / values.min() < 20
    assert 0.3 < np.median(values) < 3


def test_one_step_against_numpy():
    """q = p - h R' G, w' = w + (h / 2) R (q + p'). Kills: R for R', P, or nothing, in its place."""
    sampler = slt.underdamped(metric="kronecker")
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(2, 2)))[0].astype(np.float32)
    factor = Factor(jnp.asarray(basis), None, jnp.asarray([[0.5, 2.0, 1.0], [3.0, 0.1, 1.0]]))
    key, friction, eps, nbeta, pull = jax.random.key(3), 0.3, 0.02, 7.0, 3.0
    center = (jnp.linspace(-1, 1, 6).reshape(2, 3),)
    state = sampler.init(tuple(c + 0.3 for c in center))._replace(momentum=(0.1 * jnp.ones((2, 3)),))
    loss = lambda p: (jnp.sum(p[0] ** 3) / 3, (p[0] ** 2,))  # noqa: E731
    moved, info = sampler.step(key, state, loss, center, Hyper(nbeta, pull, eps, friction, False, (factor,)))
    turn = lambda x: basis @ (x * np.asarray(factor.scale))  # noqa: E731
    back = lambda x: (basis.T @ x) * np.asarray(factor.scale)  # noqa: E731
    w, p, x = (np.asarray(v, np.float64) for v in (state.position[0], state.momentum[0], noise_of(key)))
    force = nbeta * w**2 + pull * 0.3
    q = p - np.sqrt(eps) * back(force)
    after = np.exp(-friction) * q + np.sqrt(1 - np.exp(-2 * friction)) * x
    np.testing.assert_allclose(moved.position[0], w + np.sqrt(eps) / 2 * turn(q + after), rtol=2e-5)
    np.testing.assert_allclose(moved.momentum[0], after, rtol=2e-5)
    assert float(info.drift_sq) == pytest.approx(np.sum(back(force) ** 2), rel=1e-5)
    assert float(info.virial) == pytest.approx(0.3 * force.sum(), rel=1e-5)
    keep = np.exp(-friction)
    hot = (3 + keep) * np.sum(p**2) + (1 + 3 * keep) * np.sum(q**2)
    assert float(info.kinetic) == pytest.approx(hot / (24 * (1 + keep)), rel=1e-5)


def noise_of(key):
    return normal(jax.random.fold_in(key, 0), (2, 3))


def test_looks_are_taken_in_the_metric_s_coordinates():
    """Linear losses: noise is |nbeta R' (g_1 - g_2)|^2, a leapfrog step goes by R and R'. Kills: R for R'."""
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(2, 2)))[0].astype(np.float32)
    factor = Factor(jnp.asarray(basis), None, jnp.asarray([[0.5, 2.0, 1.0], [3.0, 0.1, 1.0]]))
    x = np.random.default_rng(3).normal(size=(8, 2, 3)).astype(np.float32)
    center = jnp.zeros((2, 3))
    target = slt.LocalPosterior(lambda w, x: jnp.sum(w * x, (1, 2)), center, 8, nbeta=2.0, localization=1.0)
    place, frozen = target.program.split(target.center)
    halves, nbeta = jnp.asarray(x.reshape(2, 4, 2, 3)), 2.0
    plain, controlled = noise_squares(target.program, place, place, frozen, halves, (factor,), jnp.float32(nbeta))
    gap = nbeta * (basis.T @ (x[:4].mean(0) - x[4:].mean(0))) * np.asarray(factor.scale)
    assert float(plain) == pytest.approx(np.sum(gap**2), rel=1e-5)
    assert float(controlled) == pytest.approx(0, abs=1e-9)
    key, size = jax.random.key(3), 0.3
    numbers = (jnp.float32(v) for v in (2.0, 1.0, size))
    moving = (*numbers, (factor,), (noise_of(key),))
    accepted = acceptance(target.program, place, place, frozen, jnp.asarray(x[None]), *moving)
    out, back = (lambda u: basis @ (u * factor.scale)), (lambda g: (basis.T @ g) * factor.scale)
    slope, p = 2 * x.mean(0), np.asarray(noise_of(key))
    half = p - np.sqrt(size) / 2 * back(slope)
    w = np.sqrt(size) * out(half)
    end = half - np.sqrt(size) / 2 * back(slope + w)
    change = np.sum(slope * w) + 0.5 * np.sum(w**2) + 0.5 * (np.sum(end**2) - np.sum(p**2))
    assert float(accepted) == pytest.approx(min(1.0, np.exp(-change)), rel=1e-4)
    assert float(accepted) < 0.99


def test_the_stationary_law_is_the_target_s(metric):
    """From equilibrium, the mean energy is d / 2: on a quadratic BAOAB has no bias, in any metric."""
    sampler, chains, steps = slt.underdamped(metric="kronecker"), 100, 300
    lower = np.linalg.cholesky(np.linalg.inv(DENSE))
    rng = np.random.default_rng(0)
    start = (rng.normal(size=(chains, ROWS * COLUMNS)) @ lower.T).reshape(chains, ROWS, COLUMNS)
    stiff, soft = jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)
    loss = lambda p: (0.5 * jnp.sum(p[0] * (stiff @ p[0] @ soft)), (stiff @ p[0] @ soft,))  # noqa: E731
    hyper = Hyper(*map(jnp.float32, (1.0, PULL, 0.2, 0.3)), jnp.bool_(False), metric)

    @jax.jit
    @jax.vmap
    def energy(key, w):
        state = sampler.init((w,))._replace(momentum=(jax.random.normal(key, w.shape),))

        def body(state, i):
            state, info = sampler.step(jax.random.fold_in(key, i), state, loss, (jnp.zeros_like(w),), hyper)
            return state, info.loss + 0.5 * PULL * info.distance_sq

        return jax.lax.scan(body, state, jnp.arange(steps))[1].mean()

    found = np.asarray(energy(jax.random.split(jax.random.key(1), chains), jnp.asarray(start, jnp.float32)), np.float64)
    z = (found.mean() - ROWS * COLUMNS / 2) / (found.std(ddof=1) / np.sqrt(chains))
    assert abs(z) < 4


DATA = np.random.default_rng(0).choice([0.5, 1.5], size=(2000, 1)).astype(np.float32)


def posterior(nbeta=1.0):
    stiff, soft = jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)

    def loss_fn(params, factor):
        w, bias = params["w"], params["b"]
        return (0.5 * jnp.sum(w * (stiff @ w @ soft)) + 50 * jnp.sum(bias**2)) * factor[:, 0] / DATA.mean()

    center = {"w": jnp.zeros((ROWS, COLUMNS)), "b": jnp.zeros((2, 3, 1))}
    return slt.LocalPosterior(loss_fn, center, len(DATA), nbeta=nbeta, localization=PULL)


@pytest.fixture(scope="module")
def begun():
    """The metrics that each measurement of ``estimate`` set out from."""
    return []


@pytest.fixture(scope="module")
def estimate(begun):
    def noted(*args):
        begun.append(args[-1])
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slt_jax.calibration.metric_pilot, "measure", noted)
        return slt.estimate_llc(posterior(), DATA, sampler=slt.underdamped(metric="kronecker"), budget=6000)


def test_a_pilot_s_metrics_set_out_from_one_another(estimate, begun):
    assert len(begun) > 1
    assert begun[0] == ()
    assert all(len(metric) == 2 for metric in begun[1:])


def test_six_decades_in_six_thousand_gradients(estimate):
    x = np.r_[np.outer(np.linalg.eigvalsh(A), np.linalg.eigvalsh(B)).reshape(-1), np.full(6, 100.0)]
    exact = np.sum(x / (x + PULL)) / 2
    assert estimate.llc_stderr < 0.05 * exact
    assert abs(estimate.llc - exact) < 4 * estimate.llc_stderr
    assert estimate.verdict == "converged"
    assert "Kronecker metric" in estimate.settings.calibration["lines"][0]
    spent = estimate.settings.gradients
    assert spent["calibration"] < 0.2 * 6000
    assert sum(spent.values()) < 1.05 * 6000


def test_a_resumed_run_measures_the_same_metric(tmp_path, estimate, monkeypatch):
    """Stopped in the middle, after a save. Kills: going on without the metric."""
    options = {
        "sampler": slt.underdamped(metric="kronecker"), "budget": 6000, "checkpoint_dir": tmp_path / "run",
        "chunk_size": 100, "checkpoint_seconds": 0,
    }  # fmt: skip
    update, seen = Progress.update, []

    def stop(bar, run):
        seen.append(run.step)
        if run.step > 600:
            raise KeyboardInterrupt
        update(bar, run)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            slt.estimate_llc(posterior(), DATA, **options)
    assert len(seen) > 3
    monkeypatch.setattr(Progress, "update", lambda bar, run: (seen.append(run.step), update(bar, run)))
    count = len(seen)
    again = slt.estimate_llc(posterior(), DATA, **options)
    assert seen[count] > 100  # it went on from a save, and not from the start
    np.testing.assert_array_equal(again.loss_trace, estimate.loss_trace)


@pytest.mark.quick
def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'kronecker' or None, got 'diagonal'"):
        slt.underdamped(metric="diagonal")
    with pytest.raises(ValueError, match="Leave step_size out"):
        slt.underdamped(1e-4, metric="kronecker")


def products_of(closed):
    """The precision of every product of matrices in a program, and in those that it calls."""
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in eqn.params.values():
            if hasattr(inner, "jaxpr"):
                yield from products_of(inner)


@pytest.mark.quick
def test_a_metric_multiplies_in_full_precision(metric):
    """Accelerators take TF32 unless told otherwise, and a flat direction would get the stiff ones' errors."""
    tree, full = (jnp.ones((ROWS, COLUMNS)),), jax.lax.Precision.HIGHEST
    looked = lambda m, t: slt_jax.samplers.kronecker.grams(m, t, 1.0)  # noqa: E731
    for program, count in ((root, 2), (pull_back, 2), (looked, 4)):
        found = list(products_of(jax.make_jaxpr(program)(metric, tree)))
        assert len(found) == count
        assert all(one in (full, (full, full)) for one in found)


def test_what_takes_long_to_compile_is_compiled_once(estimate):
    """A metric's root without a metric and with one; the chunk as it is planned, before there is one."""
    slt_jax.samplers.kronecker.metric_root.clear_cache()
    target, plan = posterior(), Schedule(2, 20, 20, 1, 50, 1, "paired", 1, 20)
    sampler = slt.underdamped(metric="kronecker")
    engine = engine_of(target, DATA, sampler, plan, jax.random.key(0), chain_mesh(2, jax.devices()[:1]))
    planned = engine.lower().as_text()
    probe = Probe(engine.problem, target.nbeta, 2, jax.random.key(1))
    pilot = slt_jax.calibration.metric_pilot.run_metric_pilot(
        engine, probe, Effort(1e4, 2, 12), 1e6, target.nbeta, PULL
    )
    described = jax.tree.map(lambda x: (x.shape, x.dtype), tuple(map(blank_factor, engine.problem.center)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pilot.metric) == described
    assert engine.lower().as_text() == planned
    assert slt_jax.samplers.kronecker.metric_root._cache_size() == 2
