"""The compiled program: some steps of every chain, on every device.

Inside a chunk each device runs its chains in groups of ``chain_batch`` (vmap within a group, one group after another),
each through all the chunk's steps. Chains never talk to each other: the program has no collectives on the chain axis.
Every random number comes from ``fold_in(chain key, global step)``: results do not depend on how steps fall into chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Key

from slt_jax.engine.keys import KeyTag
from slt_jax.engine.trace import Trace, blank
from slt_jax.posterior.data import draw_indices, gather
from slt_jax.posterior.program import LossProgram
from slt_jax.samplers.base import Hyper, Metric, Position, displacement, inner

PyTree = Any


class Static(NamedTuple):
    program: LossProgram
    sampler_step: Callable
    num_data: int
    batch_size: int
    micro_batches: int
    group: int
    length: int
    paired: bool
    gather: Callable | None
    mesh: Mesh
    control_variate: bool = False
    full_batch: bool = False
    also_data: tuple[int, ...] = ()  # examples of each further data set
    slope_method: str = ""  # how the slope at w* is measured, see ``SlopeSchedule``


class Window(NamedTuple):
    """Which steps a chunk takes, and what depends on their numbers. ``offset``: of the first one in ``batches``.

    ``tilt_every``: draws from one measurement of the slope at w* to the next. Scalars of int32, ``hot`` of float32.
    """

    start: Any
    count: Any
    offset: Any
    num_warmup: Any
    thinning: Any
    tilt_every: Any
    hot: Any


class Row(NamedTuple):
    """What differs from chain to chain, ``(num_chains,)`` each; the names are those of ``Hyper``.

    ``number``: of the chain in its own estimate, of which the odd ones may start hot.
    """

    number: Any
    nbeta: Any
    localization: Any
    step_size: Any
    friction: Any
    limit: Any


class Shared(NamedTuple):
    """What all chains use, held once on each device.

    ``arrays``: the data, () where the host gives batches. ``center_grad``: grad L_n(w*), () where it is not needed.
    ``also``: the arrays of further data sets.
    """

    center: Position
    frozen: tuple[jax.Array, ...]
    arrays: PyTree
    metric: Metric
    center_grad: Position | tuple[()]
    also: tuple[PyTree, ...]


def loss_and_grad_on(static: Static, frozen: PyTree, batch: PyTree) -> Callable:
    """position -> (losses, gradient of their mean) on the batch, over micro-batches when there are several."""
    parts = static.micro_batches

    def on(part):
        def mean(position):
            losses = static.program.losses(position, frozen, part)
            return jnp.mean(losses), losses

        def evaluate(position):
            (_, losses), grad = jax.value_and_grad(mean, has_aux=True)(position)
            return losses, grad

        return evaluate

    if parts == 1:
        return on(batch)

    def accumulated(position):
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

        def add(total, part):
            losses, grad = on(part)(position)
            return jax.tree.map(jnp.add, total, grad), losses

        total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, position), split)
        return losses.reshape(-1), jax.tree.map(lambda g: g / parts, total)

    return accumulated


def _losses_at(static: Static, position: PyTree, frozen: PyTree, batch: PyTree) -> jax.Array:
    parts = static.micro_batches
    if parts == 1:
        return static.program.losses(position, frozen, batch)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return jax.lax.map(lambda part: static.program.losses(position, frozen, part), split).reshape(-1)


def takes_all(static: Static, num_data: int) -> bool:
    """Whether a step's batch is the whole data set of ``num_data`` examples, and so without noise."""
    return static.full_batch or static.batch_size == num_data


def _spread(static: Static, gap: jax.Array, num_data: int) -> jax.Array:
    """Variance of the mean of a batch's per-example values; NaN where they do not determine it.

    Over the whole data set the mean has no sampling noise, however much its examples differ.
    """
    size = static.batch_size
    if takes_all(static, num_data) or num_data == 1:
        return jnp.float32(0)
    if gap.size != size or size == 1:
        return jnp.float32(jnp.nan)
    return jnp.var(gap, ddof=1) / size


def _losses_on_other_data(
    static: Static, frozen: PyTree, also: tuple, key: jax.Array, position: PyTree, center: PyTree
):
    """(loss, loss at w*, variance of their difference) on a batch of each further data set: float32 ``(K, 3)``."""
    rows = []
    for k, (arrays, size) in enumerate(zip(also, static.also_data, strict=True)):
        batch = arrays
        if not takes_all(static, size):
            drawn = draw_indices(jax.random.fold_in(key, KeyTag.OTHER_DATA + k), size, static.batch_size)
            batch = gather(arrays, drawn)
        here, there = (_losses_at(static, at, frozen, batch) for at in (position, center))
        spread = _spread(static, here - there, size)
        rows.append(jnp.stack([jnp.mean(here), jnp.mean(there), spread]).astype(jnp.float32))
    return jnp.stack(rows)


def _losses_at_center(static: Static, kept, slope_too, position: PyTree, center: PyTree, frozen: PyTree, batch: PyTree):
    """(L_m(w*) of each example, <grad L_m(w*), w - w*>), NaN where they are not asked for.

    The product is taken by forward differentiation, together with the losses, so no gradient is stored. With another
    ``slope_method`` it is always NaN.
    """

    def losses_at(at):
        return _losses_at(static, at, frozen, batch)

    def both():
        losses, slopes = jax.jvp(losses_at, (center,), (displacement(position, center),))
        return losses, jnp.mean(slopes).astype(jnp.float32)

    unknown = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(losses_at, center))
    nothing = lambda: (unknown, jnp.float32(jnp.nan))  # noqa: E731
    losses_alone = (lambda: (losses_at(center), jnp.float32(jnp.nan))) if static.paired else nothing
    if static.slope_method == "forward":
        return jax.lax.switch(kept.astype(jnp.int32) + slope_too.astype(jnp.int32), [nothing, losses_alone, both])
    return jax.lax.cond(kept, losses_alone, nothing)


def _at_step(window: Window, step: jax.Array, row: Row, metric: Metric) -> Hyper:
    """The step's own numbers: statistics adapt, and the odd chains cool, over the first half of the warm-up.

    A chain hotter by F moves with a step longer by its root: right for a quartic, on the safe side for a quadratic.
    """
    cooling = jnp.maximum(1, window.num_warmup // 2)
    heat = jnp.where(row.number % 2 == 1, window.hot ** jnp.maximum(0.0, 1.0 - step / cooling), 1.0)
    step_size, adapt = row.step_size * jnp.sqrt(heat), step < window.num_warmup // 2
    return Hyper(row.nbeta / heat, row.localization, step_size, row.friction, adapt, metric, row.limit)


def _batch_at(static: Static, shared: Shared, window: Window, i: jax.Array, step_key: jax.Array, batches: PyTree):
    """The examples of the chunk's step ``i``: from the host, all there are, or drawn here."""
    if static.gather is None:
        return jax.tree.map(lambda b: b[window.offset + i], batches)
    if takes_all(static, static.num_data):
        return shared.arrays
    drawn = draw_indices(jax.random.fold_in(step_key, KeyTag.BATCH), static.num_data, static.batch_size)
    return static.gather(shared.arrays, drawn)


def _one_step(
    static: Static, shared: Shared, window: Window, key: jax.Array, row: Row, batches: PyTree, i: jax.Array, state: Any
) -> tuple[Any, Trace]:
    """Step ``i`` of the chunk of one chain: (the moved state, what is recorded at the position before the move)."""
    center, frozen = shared.center, shared.frozen
    step = window.start + i
    step_key = jax.random.fold_in(key, step)
    batch = _batch_at(static, shared, window, i, step_key, batches)
    plain = loss_and_grad = loss_and_grad_on(static, frozen, batch)
    if static.control_variate:
        losses_at_center, noise = plain(center)

        def loss_and_grad(position):
            losses, grad = plain(position)
            return losses, jax.tree.map(lambda g, n, full: g - n + full, grad, noise, shared.center_grad)

    kept = (step >= window.num_warmup) & ((step - window.num_warmup) % window.thinning == window.thinning - 1)
    draw, before = (step - window.num_warmup) // window.thinning, state.position
    slope_too = kept & (draw % window.tilt_every == 0) if static.slope_method else jnp.bool(False)
    if static.control_variate:
        baseline, tilt = losses_at_center, jnp.float32(jnp.nan)
    else:
        baseline, tilt = _losses_at_center(static, kept, slope_too, before, center, frozen, batch)
    if static.slope_method == "gradient":
        downhill = lambda: inner(shared.center_grad, displacement(before, center)).astype(jnp.float32)  # noqa: E731
        tilt = jax.lax.cond(slope_too, downhill, lambda: jnp.float32(jnp.nan))
    hyper = _at_step(window, step, row, shared.metric)
    noise_key = jax.random.fold_in(step_key, KeyTag.NOISE)
    state, info = static.sampler_step(noise_key, state, loss_and_grad, center, hyper)
    gap = info.loss - baseline if static.paired else info.loss
    spread = _spread(static, gap, static.num_data)
    also: Any = ()
    if shared.also:
        also = jax.lax.cond(
            kept,
            lambda: _losses_on_other_data(static, frozen, shared.also, step_key, before, center),
            lambda: jnp.full((len(shared.also), 3), jnp.nan, jnp.float32),
        )
    at_draw = lambda x: jnp.where(kept, x, jnp.nan)  # noqa: E731
    return state, Trace(
        loss=jnp.mean(info.loss),
        baseline=at_draw(jnp.mean(baseline) if static.paired else jnp.nan),
        gap_var=at_draw(spread),
        tilt=tilt,
        drift_sq=info.drift_sq,
        virial=info.virial,
        distance_sq=info.distance_sq,
        kinetic=info.kinetic,
        acceptance=info.acceptance,
        pull=info.pull,
        time=info.time,
        also=also,
    )


def _one_chain(static: Static, shared: Shared, window: Window, state, key, row: Row, alive, batches):
    """All steps of the chunk for one chain; stops when the chain (with vmap: its whole group) is no longer finite."""

    def go_on(carry):
        i, _, still, _ = carry
        any_alive = jax.lax.pmax(still.astype(jnp.int32), "group") > 0 if static.group > 1 else still
        return (i < window.count) & any_alive

    def body(carry):
        i, state, still, trace = carry
        state, now = _one_step(static, shared, window, key, row, batches, i, state)
        trace = jax.tree.map(lambda t, x: t.at[i].set(jnp.where(still, x, jnp.nan).astype(t.dtype)), trace, now)
        return i + 1, state, still & jnp.isfinite(now.loss) & jnp.isfinite(now.drift_sq), trace

    empty = blank(jnp, (static.length,), len(shared.also))
    _, state, alive, trace = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, alive, empty))
    return state, alive, trace


def _device_chunk(static: Static, state, alive, keys, rows, batches, shared, window):
    """One device's chains, ``group`` at a time; the stacked state is updated in place."""
    chain = functools.partial(_one_chain, static, shared, window)
    size = static.group
    if size > 1:
        run_group = jax.vmap(chain, axis_name="group")
    else:
        run_group = lambda *a: jax.tree.map(lambda x: x[None], chain(*jax.tree.map(lambda x: x[0], a)))  # noqa: E731
    num = keys.shape[0]
    trace = blank(jnp, (num, static.length), len(static.also_data))
    if num == size:
        return run_group(state, keys, rows, alive, batches)

    def one_group(g, carry):
        def take(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, g * size, size), tree)

        moved = run_group(take(carry[0]), take(keys), take(rows), take(carry[1]), take(batches))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, g * size, 0), carry, moved)

    return jax.lax.fori_loop(0, num // size, one_group, (state, alive, trace))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1,))
def run_chunk(
    static: Static, state: PyTree, alive: Bool[Array, " chain"], keys: Key[Array, " chain"], rows: Row, batches: PyTree,
    shared: Shared, window: Window,
) -> tuple[PyTree, Bool[Array, " chain"], Trace]:  # fmt: skip
    """``window.count`` steps of every chain: (state, alive, trace, whose names are ``(num_chains, length)``)."""
    per, whole = PartitionSpec("chain"), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(_device_chunk, static),
        mesh=static.mesh,
        in_specs=(per, per, per, per, per, whole, whole),
        out_specs=(per, per, per),
        axis_names={"chain"},
        check_vma=False,
    )
    return mapped(state, alive, keys, rows, batches, shared, window)
