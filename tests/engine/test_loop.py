"""The engine: how steps fall into chunks, chains onto devices, and weights into parts, changes no number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import slt_jax as slt
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.posterior.data import as_source, draw_indices
from slt_jax.samplers.base import Info, Sampler
from tests.engines import engine_of, numbers_of
from tests.small import traces_of
from tests.sources import Rows

NAMES = ("loss_trace", "baseline_trace", "drift_sq", "virial", "warmup_loss")
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\b")


def one_device(num_chains):
    return chain_mesh(num_chains, jax.devices()[:1])


def estimate(posterior, data, **changed):
    options = {
        "sampler": slt.sgld(1e-3), "num_chains": 4, "num_draws": 20, "num_warmup": 10, "batch_size": 16, "key": 3,
    }  # fmt: skip
    return slt.estimate_llc(posterior, data, **{**options, **changed})


def assert_same(a, b, exact=True):
    for name in NAMES:
        x, y = traces_of(a)[name], traces_of(b)[name]
        if exact:
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("source", [lambda x: x, Rows], ids=["memory", "host"])
def test_chunk_size_changes_no_bit(regression, source):
    posterior, data = regression
    runs = [estimate(posterior, source(data), chunk_size=size) for size in (1, 7, 50)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.quick
def test_host_data_and_memory_give_the_same_numbers(regression):
    posterior, data = regression
    assert_same(estimate(posterior, data), estimate(posterior, Rows(data)), exact=False)


@pytest.mark.quick
def test_one_trace_for_a_grid(regression):
    """Kills: a hyperparameter that became a constant of the program."""
    _, data = regression
    traces = []

    def loss_fn(p, x):
        traces.append(1)
        return 0.5 * (x @ p["w"]) ** 2

    values = []
    for nbeta in (10.0, 20.0, 40.0):
        for localization in (1.0, 3.0):
            for step_size in (1e-4, 1e-3):
                posterior = slt.LocalPosterior(loss_fn, {"w": jnp.zeros(10)}, 400, nbeta, localization)
                values.append(estimate(posterior, data, sampler=slt.sgld(step_size)).llc)
                if len(values) == 1:
                    first = len(traces)
    assert len(traces) == first
    assert len(set(values)) == 12  # and each cell had its own effect


@pytest.mark.quick
def test_eight_devices_equal_one(regression):
    posterior, data = regression
    whole = estimate(posterior, data, num_chains=8, mesh=one_device(8))
    spread = estimate(posterior, data, num_chains=8, mesh=chain_mesh(8))
    assert len(jax.devices()) == 8
    assert "8 x" in spread.settings.devices
    assert_same(whole, spread, exact=False)


def compiled(posterior, data, mesh, num_chains=8, chain_batch=1, baseline="paired"):
    plan = Schedule(num_chains, 4, 2, 1, 16, 1, baseline, chain_batch, 50)
    sampler = slt.sgld(1e-3)
    engine = engine_of(posterior, data, sampler, plan, jax.random.key(0), mesh)
    return engine, engine.start(engine.inputs(numbers_of(posterior, sampler)))


@pytest.mark.parametrize("baseline", ["paired", "full"])
def test_chains_never_talk(regression, baseline):
    engine, run = compiled(*regression, chain_mesh(8), baseline=baseline)
    assert not COLLECTIVE.findall(engine.lower(run).compile().as_text())


def test_the_search_for_collectives_finds_one():
    sharding = NamedSharding(chain_mesh(8), PartitionSpec("chain"))
    total = jax.jit(lambda x: x.sum()).lower(jax.device_put(jnp.ones(8), sharding)).compile()
    assert COLLECTIVE.findall(total.as_text())


def test_weights_on_a_model_axis(regression):
    """Weights over two devices and chains over four give what one device gives, and are where they should be."""
    _, data = regression
    mesh = jax.make_mesh((4, 2), ("chain", "model"), axis_types=(AxisType.Auto,) * 2)
    center = {"w": jnp.zeros(10), "v": jnp.ones((10, 4))}

    def loss_fn(p, x):
        return 0.5 * (x @ p["w"]) ** 2 + 0.5 * jnp.sum((x @ (p["v"] - 1)) ** 2, axis=-1)

    where = {"w": PartitionSpec("model"), "v": PartitionSpec(None, "model")}
    placed = {k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in center.items()}
    plain = estimate(slt.LocalPosterior(loss_fn, center, 400), data, mesh=one_device(4))
    posterior = slt.LocalPosterior(loss_fn, placed, 400)
    assert_same(plain, estimate(posterior, data, mesh=mesh), exact=False)
    _, run = compiled(posterior, data, mesh)
    shards = {x.shape: x.addressable_shards[0].data.shape for x in jax.tree.leaves(run.state)}
    assert shards == {(8, 10, 4): (2, 10, 2), (8, 10): (2, 5)}


@pytest.mark.parametrize("chain_batch", [2, 4])
def test_chains_together_equal_one_at_a_time(regression, chain_batch):
    posterior, data = regression
    alone = estimate(posterior, data, mesh=one_device(4), chain_batch=1)
    together = estimate(posterior, data, mesh=one_device(4), chain_batch=chain_batch)
    assert_same(alone, together, exact=False)


def test_a_chain_does_not_depend_on_how_many_there_are(regression):
    few, many = (estimate(*regression, num_chains=n, mesh=one_device(n)) for n in (3, 6))
    np.testing.assert_array_equal(few.loss_trace, many.loss_trace[:3])


def test_micro_batches_equal_the_whole_batch(regression):
    assert_same(estimate(*regression), estimate(*regression, micro_batches=4), exact=False)


def cliff(p, x):
    """Quadratic inside |w| < 0.3, NaN outside."""
    inside = jnp.all(jnp.abs(p["w"]) < 0.3)
    return jnp.where(inside, 0.5 * (x @ p["w"]) ** 2, jnp.nan)


@pytest.mark.parametrize("chain_batch", [1, 8])
def test_a_chain_that_leaves_is_stopped_and_named(regression, chain_batch):
    """Kills: a NaN in the mean; a stopped chain that takes its neighbours along; the wrong step in its name."""
    posterior, data = regression
    walled = slt.LocalPosterior(cliff, posterior.center, 400, localization=posterior.localization)
    options = {"num_chains": 8, "mesh": one_device(8), "chain_batch": chain_batch, "num_draws": 40}
    free, held = estimate(posterior, data, **options), estimate(walled, data, **options)
    assert 0 < len(held.stopped) < 8
    assert held.verdict == "diverged"
    assert sorted([*held.stopped, *held.kept_chains]) == list(range(8))
    np.testing.assert_allclose(held.loss_trace[held.kept_chains], free.loss_trace[held.kept_chains], rtol=1e-5)
    whole = np.concatenate([held.warmup_loss, held.loss_trace], axis=1)
    for chain, step in held.stopped.items():
        assert np.isfinite(whole[chain, :step]).all()
        assert np.isnan(whole[chain, step:]).all()
        assert f"chain {chain} at step {step}" in str(held)
    gap = (free.loss_trace - free.baseline_trace)[held.kept_chains]
    assert held.llc_raw == pytest.approx(posterior.nbeta * gap.mean(dtype=np.float64), rel=1e-5)


def test_a_gradient_that_is_not_finite_at_the_center_is_an_error(regression):
    _, data = regression
    posterior = slt.LocalPosterior(lambda p, x: jnp.sqrt(jnp.sum(p["w"] ** 2)) + 0 * x[:, 0], {"w": jnp.zeros(10)}, 400)
    with pytest.raises(FloatingPointError, match="gradient of the loss at w"):
        estimate(posterior, data)


def test_batches_are_the_documented_ones_and_each_chains_own():
    """The loss is the batch's mean row number: it shows which rows were drawn."""
    rows = jnp.arange(400.0)[:, None]
    posterior = slt.LocalPosterior(lambda p, x: x[:, 0] + 0 * p["w"][0], {"w": jnp.zeros(1)}, 400)
    result = estimate(posterior, rows, num_warmup=0)
    for chain in range(4):
        for step in range(20):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), chain), step)
            drawn = draw_indices(jax.random.fold_in(key, 0), 400, 16)
            assert result.loss_trace[chain, step] == pytest.approx(float(jnp.mean(drawn.astype(float))), rel=1e-6)
    assert len(np.unique(result.loss_trace)) > 70


def test_batches_are_drawn_with_replacement():
    """With a batch of all rows but one, a permutation would give nearly the same mean each time."""
    rows = jnp.arange(16.0)[:, None]
    posterior = slt.LocalPosterior(lambda p, x: x[:, 0] + 0 * p["w"][0], {"w": jnp.zeros(1)}, 16)
    means = estimate(posterior, rows, num_draws=500, batch_size=15).loss_trace
    # the mean of 15 draws, each uniform on 0..15 with variance (16^2 - 1) / 12
    variance, count = (16**2 - 1) / 12 / 15, means.size
    assert abs(means.var() / variance - 1) < 4 * np.sqrt(2 / count)
    assert abs(means.mean() - 7.5) < 4 * np.sqrt(variance / count)


@pytest.mark.parametrize("source", [lambda x: x, Rows], ids=["memory", "host"])
def test_a_batch_as_large_as_the_data_is_the_data(source):
    """Two hundred examples of a noisy regression: with replacement, noise would add 1.1 to the 2.5 of five weights."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(200, 5)), rng.normal(size=200)
    noise -= x @ np.linalg.lstsq(x, noise, rcond=None)[0]
    data = np.c_[x, noise].astype(np.float32)
    loss_fn = lambda w, xy: 0.5 * (xy[:, :5] @ w - xy[:, 5]) ** 2  # noqa: E731
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(5), 200, localization=1e-3)
    result = slt.estimate_llc(posterior, source(data), sampler=slt.underdamped(1e-2, 0.1), num_draws=2000, key=0)
    assert result.settings.batch_size == 200
    assert result.settings.probe["noise"] == 0
    assert result.bias.why == "no minibatch noise"
    assert not result.traces.gap_var.any()
    np.testing.assert_allclose(result.baseline_trace, 0.5 * np.mean(noise**2), rtol=1e-5)
    assert result.llc_stderr < 0.1
    assert abs(result.llc_raw - 2.5) < 4 * result.llc_stderr


def test_paired_baseline_has_less_variance():
    """Label noise moves L_m(w) and L_m(w*) together: their difference is far quieter than L_m(w) - L_n(w*)."""
    keys = jax.random.split(jax.random.key(5), 2)
    x = jax.random.normal(keys[0], (2000, 10))
    noise = jax.random.normal(keys[1], (2000,))
    noise = noise - x @ jnp.linalg.lstsq(x, noise)[0]  # w* = 0 is the minimum on the data
    posterior = slt.LocalPosterior(
        lambda p, batch: 0.5 * (batch[0] @ p["w"] - batch[1]) ** 2, {"w": jnp.zeros(10)}, 2000, localization=10.0
    )
    runs = {
        name: estimate(posterior, (x, noise), baseline=name, num_draws=500, num_warmup=200, batch_size=100, thinning=5)
        for name in ("paired", "full")
    }
    variance = {name: run.llc_draws.var() for name, run in runs.items()}
    assert variance["paired"] < variance["full"] / 4
    assert runs["paired"].llc_stderr < runs["full"].llc_stderr / 2
    difference = runs["paired"].llc - runs["full"].llc
    assert abs(difference) < 4 * np.hypot(runs["paired"].llc_stderr, runs["full"].llc_stderr)


def test_full_baseline_is_the_mean_over_all_data():
    rows = jnp.arange(50.0)[:, None]  # 50 is no multiple of the batch of 16
    posterior = slt.LocalPosterior(lambda p, x: x[:, 0] + 0 * p["w"][0], {"w": jnp.zeros(1)}, 50)
    assert estimate(posterior, rows, baseline="full").init_loss == pytest.approx(24.5, rel=1e-6)


def test_bfloat16_forward_over_float32_masters():
    """Kills: masters in bfloat16, which stand still when a step is smaller than their spacing."""
    seen = []

    def loss_fn(p, x):
        seen.append(p["w"].dtype)
        return 0.5 * jnp.sum((p["w"] - 1) ** 2) + 0 * x[:, 0]

    center = {"w": jnp.ones(1000)}
    posterior = slt.LocalPosterior(loss_fn, center, 400, nbeta=1.0, localization=1.0, forward_dtype=jnp.bfloat16)
    plan = Schedule(1, 4, 0, 1, 16, 1, "full", 1, 50)
    data = as_source(jnp.zeros((400, 1)))
    sampler = slt.sgld(1e-10)
    engine = engine_of(posterior, data, sampler, plan, jax.random.key(0), one_device(1))
    inputs = engine.inputs(numbers_of(posterior, sampler))
    run = engine.start(inputs)
    engine.advance(run, inputs, 4)
    (moved,) = jax.tree.leaves(run.state)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert moved.dtype == jnp.float32
    assert np.count_nonzero(np.asarray(moved) != 1) > 900


SIZES = np.array([1.0, 2.0, 3.0, 4.0])
MASKS = {
    "predicate": (lambda path: path[0] == "a", {"a"}, 4),
    "tree": ({"a": True, "b": False}, {"a"}, 4),
    "entries": ({"a": np.array([True, False, True, False]), "b": np.array(False)}, {"a"}, 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_freezes_the_rest(name):
    """What is frozen costs no state, and the estimate is that of the free weights alone."""
    mask, _, free = MASKS[name]

    def loss_fn(p, x):
        return 0.5 * jnp.sum(SIZES * p["a"] ** 2) + 0.5 * jnp.sum(p["b"] ** 2) + 0 * x[:, 0]

    center = {"a": jnp.zeros(4), "b": jnp.zeros(7)}
    posterior = slt.LocalPosterior(loss_fn, center, 400, nbeta=100.0, localization=1.0, mask=mask)
    data = jnp.zeros((400, 1))
    _, run = compiled(posterior, data, chain_mesh(8))
    assert [x.shape for x in jax.tree.leaves(run.state)] == [(8, free)]
    result = estimate(posterior, data, num_chains=8, num_draws=1000, num_warmup=100, thinning=10)
    sizes = SIZES[[0, 2]] if name == "entries" else SIZES
    a = 100 * sizes + 1
    exact = np.sum(100 * sizes / (a * (1 - 1e-3 * a / 4))) / 2
    assert abs(result.llc_raw - exact) < 4 * result.llc_stderr


def test_thinning_keeps_every_so_manyth_draw(regression):
    """Kills: a draw kept one step early or late, or a warm-up averaged in."""
    whole = estimate(*regression, num_draws=60, thinning=1)
    thin = estimate(*regression, num_draws=20, thinning=3)
    np.testing.assert_array_equal(thin.loss_trace, whole.loss_trace[:, 2::3])
    np.testing.assert_array_equal(thin.baseline_trace, whole.baseline_trace[:, 2::3])
    np.testing.assert_array_equal(thin.warmup_loss, whole.warmup_loss)
    assert whole.warmup_loss.shape == (4, 10)


def test_scalar_losses_equal_per_example_ones(regression):
    posterior, data = regression
    scalar = slt.LocalPosterior(
        lambda p, x: posterior.loss_fn(p, x).mean(), posterior.center, 400, localization=posterior.localization
    )
    assert_same(estimate(posterior, data), estimate(scalar, data))


def test_another_sampler_on_the_same_contract(regression):
    """A sampler with state of its own: gradient descent with momentum, which needs no noise and must go to w*."""
    from typing import NamedTuple

    class State(NamedTuple):
        position: tuple
        velocity: tuple

    def step(key, state, loss_and_grad, center, hyper):
        loss, grad = loss_and_grad(state.position)
        velocity = tuple(0.5 * v - hyper.step_size * g for v, g in zip(state.velocity, grad, strict=True))
        position = tuple(w + v for w, v in zip(state.position, velocity, strict=True))
        return State(position, velocity), Info(loss, jnp.float32(0), jnp.float32(0))

    def init(position):
        return State(tuple(w + 1 for w in position), tuple(jnp.zeros_like(w) for w in position))

    result = estimate(*regression, sampler=Sampler("descent", 0.1, init, step), num_draws=100)
    assert (result.loss_trace[:, -1] < 1e-6 * result.warmup_loss[:, 0]).all()
    assert result.settings.sampler == "descent"


def test_odd_chains_cool_over_half_of_the_warm_up():
    """nbeta rises from a fiftieth on a geometric schedule, the step shrinks by its root; statistics adapt meanwhile.

    A sampler that shows its numbers in the trace. Kills: chains that stay hot, a step that does not follow.
    """

    def step(key, state, loss_and_grad, center, hyper):
        return state, Info(jnp.float32(0), hyper.nbeta, hyper.step_size, 1.0 * hyper.adapt)

    shown = Sampler("shown", 1e-3, slt.sgld(1e-3).init, step)
    posterior = slt.LocalPosterior(lambda p, x: p["w"] * x[:, 0], {"w": jnp.zeros(())}, 10, nbeta=7.0, localization=1.0)
    plan = Schedule(2, 5, 20, 1, 4, 1, "full", 1, 8, hot=50.0)
    engine = engine_of(posterior, jnp.ones((10, 1)), shown, plan, jax.random.key(0), one_device(2))
    inputs = engine.inputs(numbers_of(posterior, shown))
    run = engine.start(inputs)
    for _ in engine.steps(run, inputs):
        pass
    heat = 50.0 ** np.maximum(0, 1 - np.arange(25) / 10)
    np.testing.assert_allclose(run.trace.drift_sq, [7.0 * np.ones(25), 7.0 / heat], rtol=1e-5)
    np.testing.assert_allclose(run.trace.virial, [1e-3 * np.ones(25), 1e-3 * np.sqrt(heat)], rtol=1e-5)
    np.testing.assert_array_equal(run.trace.distance_sq, 2 * [np.arange(25) < 10])
