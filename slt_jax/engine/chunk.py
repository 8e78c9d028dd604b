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
from slt_jax.engine.observe import Seen, Sums, Watch, blank_values, recorded, values_of_all
from slt_jax.engine.trace import Rows, Trace, blank_rows, columns
from slt_jax.posterior.data import draw_indices, gather
from slt_jax.posterior.program import LossProgram
from slt_jax.samplers.base import Blocks, Hyper, Metric, Position, displacement, inner

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
    watches: tuple[Watch, ...] = ()
    slots: int = 0  # draws of a chunk, at most, whose observed values are kept


class Window(NamedTuple):
    """Which steps a chunk takes, and what depends on their numbers. ``offset``: of the first one in ``batches``.

    ``tilt_every``: draws from one measurement of the slope at w* to the next. ``parts``: (a, b) where moments are kept,
    draw t being in their block (a (t + 1) - 1) // b; else (). Scalars of int32, ``hot`` of float32.
    """

    start: Any
    count: Any
    offset: Any
    num_warmup: Any
    thinning: Any
    tilt_every: Any
    hot: Any
    parts: Any = ()

    def draws_before(self, step: Any) -> Any:
        """Draws of a chain before this step."""
        return jax.lax.div(jnp.maximum(0, step - self.num_warmup), self.thinning)


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
    ``also``: the arrays of further data sets. ``observed``: those of observables, in blocks.
    """

    center: Position
    frozen: tuple[jax.Array, ...]
    arrays: PyTree
    metric: Metric
    center_grad: Position | tuple[()]
    also: tuple[PyTree, ...]
    observed: tuple[PyTree, ...] = ()


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


def _at_step(window: Window, step: jax.Array, row: Row, metric: Metric, blocks: Blocks) -> Hyper:
    """The step's own numbers: statistics adapt, and the odd chains cool, over the first half of the warm-up.

    A chain hotter by F moves with a step longer by its root: right for a quartic, on the safe side for a quadratic.
    """
    half = jax.lax.div(window.num_warmup, jnp.int32(2))
    cooling = jnp.maximum(1, half)
    heat = jnp.where(
        jax.lax.rem(row.number, jnp.int32(2)) == 1, window.hot ** jnp.maximum(0.0, 1.0 - step / cooling), 1.0
    )
    step_size, adapt = row.step_size * jnp.sqrt(heat), step < half
    return Hyper(row.nbeta / heat, row.localization, step_size, row.friction, adapt, metric, row.limit, blocks)


def _batch_at(static: Static, shared: Shared, window: Window, i: jax.Array, key: jax.Array, batches: PyTree):
    """The examples of the chunk's step ``i``: from the host, all there are, or drawn here."""
    if static.gather is None:
        return jax.tree.map(lambda b: b[window.offset + i], batches)
    if takes_all(static, static.num_data):
        return shared.arrays
    drawn = draw_indices(key, static.num_data, static.batch_size)
    return static.gather(shared.arrays, drawn)


def _one_step(
    static: Static, shared: Shared, window: Window, key: jax.Array, row: Row, batches: PyTree, i: jax.Array, state: Any
) -> tuple[Any, Trace, tuple[jax.Array, ...]]:
    """Step ``i`` of the chunk of one chain: (the moved state, what is recorded at the position before the move, what is
    observed there).
    """
    center, frozen = shared.center, shared.frozen
    step = window.start + i
    step_key = jax.random.fold_in(key, step)
    # One key after the other: made together, XLA (of jax 0.12) holds a second copy of ``center_grad`` in the loop.
    batch_key, noise_key = (jax.random.fold_in(step_key, tag) for tag in (KeyTag.BATCH, KeyTag.NOISE))
    batch = _batch_at(static, shared, window, i, batch_key, batches)
    plain = loss_and_grad = loss_and_grad_on(static, frozen, batch)
    if static.control_variate:
        losses_at_center, noise = plain(center)

        def loss_and_grad(position):
            losses, grad = plain(position)
            return losses, jax.tree.map(lambda g, n, full: g - n + full, grad, noise, shared.center_grad)

    past = step - window.num_warmup  # `rem` and `div` round towards 0; `%` and `//` are more code, for past < 0
    kept = (past >= 0) & (jax.lax.rem(past, window.thinning) == window.thinning - 1)
    draw, before = jax.lax.div(past, window.thinning), state.position
    slope_too = kept & (jax.lax.rem(draw, window.tilt_every) == 0) if static.slope_method else jnp.bool(False)
    if static.control_variate:
        baseline, tilt = losses_at_center, jnp.float32(jnp.nan)
    else:
        baseline, tilt = _losses_at_center(static, kept, slope_too, before, center, frozen, batch)
    if static.slope_method == "gradient":
        downhill = lambda: inner(shared.center_grad, displacement(before, center)).astype(jnp.float32)  # noqa: E731
        tilt = jax.lax.cond(slope_too, downhill, lambda: jnp.float32(jnp.nan))
    seen = values_of_all(static.watches, before, frozen, shared.observed, kept) if static.watches else ()
    hyper = _at_step(window, step, row, shared.metric, static.program.blocks)
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
    return (
        state,
        Trace(
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
        ),
        seen,
    )


def _observed(static: Static, window: Window, i: jax.Array, seen: Seen, values: tuple, now: Trace, still) -> Seen:
    """``seen`` with what step ``i`` of the chunk observed; NaN of a chain that is no longer finite."""
    step, gap = window.start + i, now.loss - now.baseline if static.paired else now.loss
    draw = window.draws_before(step)
    part = jnp.int32(0)
    if window.parts:
        per, draws = window.parts
        part = (per * (draw + 1) - 1) // draws
    return recorded(
        static.watches, seen, jax.tree.map(lambda x: jnp.where(still, x, jnp.nan), values),
        slot=draw - window.draws_before(window.start), part=part, kept=window.draws_before(step + 1) > draw,
        weight=jnp.asarray(now.time, jnp.float32), gap=jnp.asarray(gap, jnp.float32),
    )  # fmt: skip


def _one_chain(static: Static, shared: Shared, window: Window, state, key, row: Row, alive, batches, sums):
    """All steps of the chunk for one chain; stops when the chain (with vmap: its whole group) is no longer finite."""

    def go_on(carry):
        i, _, still, _, _ = carry
        any_alive = jax.lax.pmax(still.astype(jnp.int32), "group") > 0 if static.group > 1 else still
        return (i < window.count) & any_alive

    def body(carry):
        i, state, still, trace, seen = carry
        state, now, values = _one_step(static, shared, window, key, row, batches, i, state)
        new = jax.tree.map(lambda x: jnp.where(still, x, jnp.nan), Rows(columns(now), now.also))
        trace = jax.tree.map(lambda t, x: jax.lax.dynamic_update_index_in_dim(t, x, i, 0), trace, new)
        seen = _observed(static, window, i, seen, values, now, still) if static.watches else seen
        return i + 1, state, still & jnp.isfinite(now.loss) & jnp.isfinite(now.drift_sq), trace, seen

    empty = blank_rows((static.length,), len(shared.also)), Seen(blank_values(static.watches, static.slots), sums)
    _, state, alive, trace, seen = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, alive, *empty))
    return state, alive, trace, seen


def _device_chunk(static: Static, state, alive, keys, rows, batches, shared, window, sums):
    """One device's chains, ``group`` at a time; the stacked state is updated in place."""
    chain = functools.partial(_one_chain, static, shared, window)
    size = static.group
    if size > 1:
        run_group = jax.vmap(chain, axis_name="group")
    else:
        run_group = lambda *a: jax.tree.map(lambda x: x[None], chain(*jax.tree.map(lambda x: x[0], a)))  # noqa: E731
    num = keys.shape[0]
    trace = blank_rows((num, static.length), len(static.also_data))
    seen = Seen(blank_values(static.watches, static.slots, (num,)), sums)
    if num == size:
        return run_group(state, keys, rows, alive, batches, sums)

    def one_group(g, carry):
        def take(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, g * size, size), tree)

        old = take(carry[3].sums)
        moved = run_group(take(carry[0]), take(keys), take(rows), take(carry[1]), take(batches), old)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, g * size, 0), carry, moved)

    return jax.lax.fori_loop(0, num // size, one_group, (state, alive, trace, seen))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 8))
def run_chunk(
    static: Static, state: PyTree, alive: Bool[Array, " chain"], keys: Key[Array, " chain"], rows: Row, batches: PyTree,
    shared: Shared, window: Window, sums: tuple[Sums, ...],
) -> tuple[PyTree, Bool[Array, " chain"], Rows, Seen]:  # fmt: skip
    """``window.count`` steps of every chain: (state, alive, what was recorded, ``(num_chains, length, ...)``, seen)."""
    per, whole = PartitionSpec("chain"), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(_device_chunk, static),
        mesh=static.mesh,
        in_specs=(per, per, per, per, per, whole, whole, per),
        out_specs=(per, per, per, per),
        axis_names={"chain"},
        check_vma=False,
    )
    return mapped(state, alive, keys, rows, batches, shared, window, sums)
