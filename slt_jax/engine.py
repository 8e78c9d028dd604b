"""The only loop: a host loop over compiled chunks of steps, with all chains on the device.

Inside a chunk each device runs its chains in groups of ``chain_batch`` (vmap within a group, one group after another),
each through all the chunk's steps. Chains never talk to each other: the program has no collectives on the chain axis.
Every random number comes from ``fold_in(chain key, global step)``: results do not depend on how steps fall into chunks.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slt_jax.batches import Prefetcher, Source, draw_indices
from slt_jax.mesh import chain_sharding, gathered, own_rows, place, place_rows, shared_sharding, to_host
from slt_jax.posterior import LocalPosterior, LossProgram
from slt_jax.samplers.base import Hyper, Metric, Position, Sampler

PyTree = Any
_BATCH, _NOISE = 0, 1  # what a step's key is folded with
_HOST_BATCH_BYTES = 2**28


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how they are laid out.

    ``baseline`` is ``"paired"`` or ``"full"``. With ``control_variate`` the gradient is
    g_m(w) - g_m(w*) + grad L_n(w*). ``hot``: every other chain starts at nbeta / hot, and is cooled over the first half
    of the warm-up; 1 for none.
    """

    num_chains: int
    num_draws: int
    num_warmup: int
    thinning: int
    batch_size: int
    micro_batches: int
    baseline: str
    chain_batch: int
    chunk_size: int
    control_variate: bool = False
    hot: float = 1.0

    @property
    def total_steps(self) -> int:
        return self.num_warmup + self.num_draws * self.thinning


class Trace(NamedTuple):
    """Per chain and step, float32 ``(num_chains, total_steps)``; NaN where nothing was recorded.

    ``gap_var``: variance of the batch mean of the per-example losses less their baseline, by their spread in the batch;
    0 where the batch is the whole data set.
    The other names are those of ``Info``.
    """

    loss: Any
    baseline: Any
    gap_var: Any
    drift_sq: Any
    virial: Any
    distance_sq: Any
    kinetic: Any
    acceptance: Any
    pull: Any


@dataclass
class Run:
    """What the host holds: device state, and the traces so far."""

    state: PyTree
    alive: Any
    trace: Trace
    step: int = 0
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Static(NamedTuple):
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
    whole: bool = False


class _Window(NamedTuple):
    """Which steps a chunk takes, and what depends on their numbers."""

    start: jax.Array
    count: jax.Array
    num_warmup: jax.Array
    thinning: jax.Array
    hot: jax.Array


def _gather(arrays: PyTree, indices: jax.Array) -> PyTree:
    return jax.tree.map(lambda a: a.at[indices].get(mode="promise_in_bounds"), arrays)


def _loss_and_grad(static: _Static, frozen: PyTree, batch: PyTree) -> Callable:
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


def _center_losses(static: _Static, center: PyTree, frozen: PyTree, batch: PyTree) -> jax.Array:
    parts = static.micro_batches
    if parts == 1:
        return static.program.losses(center, frozen, batch)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return jax.lax.map(lambda part: static.program.losses(center, frozen, part), split).reshape(-1)


def _variance_of_mean(gap: jax.Array, size: int) -> jax.Array:
    """Variance of the mean of ``size`` independent per-example values; NaN from a mean alone."""
    if gap.size != size or size == 1:
        return jnp.float32(jnp.nan)
    return jnp.var(gap, ddof=1) / size


def _at_step(window: _Window, step: jax.Array, chain: jax.Array, hyper: Hyper) -> Hyper:
    """The step's own numbers: statistics adapt, and the odd chains cool, over the first half of the warm-up.

    A chain hotter by F moves with a step longer by its root: right for a quartic, on the safe side for a quadratic.
    """
    cooling = jnp.maximum(1, window.num_warmup // 2)
    heat = jnp.where(chain % 2 == 1, window.hot ** jnp.maximum(0.0, 1.0 - step / cooling), 1.0)
    return hyper._replace(
        nbeta=hyper.nbeta / heat, step_size=hyper.step_size * jnp.sqrt(heat), adapt=step < window.num_warmup // 2
    )


def _one_chain(static: _Static, shared: tuple, window: _Window, state, key, chain, alive, batches):
    """All steps of the chunk for one chain; stops when the chain (with vmap: its whole group) is no longer finite."""
    center, frozen, arrays, hyper, center_grad = shared

    def go_on(carry):
        i, _, still, _ = carry
        any_alive = jax.lax.pmax(still.astype(jnp.int32), "group") > 0 if static.group > 1 else still
        return (i < window.count) & any_alive

    def body(carry):
        i, state, still, trace = carry
        step = window.start + i
        step_key = jax.random.fold_in(key, step)
        if static.whole:
            batch = arrays
        elif static.gather is None:
            batch = jax.tree.map(lambda b: b[i], batches)
        else:
            drawn = draw_indices(jax.random.fold_in(step_key, _BATCH), static.num_data, static.batch_size)
            batch = static.gather(arrays, drawn)
        plain = at = _loss_and_grad(static, frozen, batch)
        if static.control_variate:
            at_center, noise = plain(center)

            def at(position):
                losses, grad = plain(position)
                return losses, jax.tree.map(lambda g, n, full: g - n + full, grad, noise, center_grad)

        mine = _at_step(window, step, chain, hyper)
        state, info = static.sampler_step(jax.random.fold_in(step_key, _NOISE), state, at, center, mine)
        kept = (step >= window.num_warmup) & ((step - window.num_warmup) % window.thinning == window.thinning - 1)
        unknown = jnp.full(info.loss.shape, jnp.nan, info.loss.dtype)
        if not static.paired:
            baseline, gap = unknown, info.loss
        else:
            at_center = (
                at_center
                if static.control_variate
                else jax.lax.cond(kept, lambda: _center_losses(static, center, frozen, batch), lambda: unknown)
            )
            baseline, gap = jnp.where(kept, at_center, unknown), info.loss - at_center
        # Over the whole data set the mean has no sampling noise, however much its examples differ.
        spread = jnp.float32(0) if static.whole else _variance_of_mean(gap, static.batch_size)
        row = Trace(jnp.mean(info.loss), jnp.mean(baseline), jnp.where(kept, spread, jnp.nan), *info[1:])
        trace = jax.tree.map(lambda t, x: t.at[i].set(jnp.where(still, x, jnp.nan).astype(t.dtype)), trace, row)
        return i + 1, state, still & jnp.isfinite(row.loss) & jnp.isfinite(info.drift_sq), trace

    empty = Trace(*(jnp.full(static.length, jnp.nan, jnp.float32) for _ in Trace._fields))
    _, state, alive, trace = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, alive, empty))
    return state, alive, trace


def _device_chunk(static: _Static, state, alive, keys, chains, batches, shared, window):
    """One device's chains, ``group`` at a time; the stacked state is updated in place."""
    chain = functools.partial(_one_chain, static, shared, window)
    size = static.group
    if size > 1:
        run_group = jax.vmap(chain, axis_name="group")
    else:
        run_group = lambda *a: jax.tree.map(lambda x: x[None], chain(*jax.tree.map(lambda x: x[0], a)))  # noqa: E731
    num = keys.shape[0]
    trace = Trace(*(jnp.full((num, static.length), jnp.nan, jnp.float32) for _ in Trace._fields))
    if num == size:
        return run_group(state, keys, chains, alive, batches)

    def one_group(g, carry):
        def take(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, g * size, size), tree)

        moved = run_group(take(carry[0]), take(keys), take(chains), take(carry[1]), take(batches))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, g * size, 0), carry, moved)

    return jax.lax.fori_loop(0, num // size, one_group, (state, alive, trace))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1,))
def _chunk(static: _Static, state, alive, keys, batches, shared, window):
    """``window.count`` steps of every chain: (state, alive, trace of shape (num_chains, length))."""
    per, whole = PartitionSpec("chain"), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(_device_chunk, static),
        mesh=static.mesh,
        in_specs=(per, per, per, per, per, whole, whole),
        out_specs=(per, per, per),
        axis_names={"chain"},
        check_vma=False,
    )
    return mapped(state, alive, keys, jnp.arange(keys.shape[0]), batches, shared, window)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _chain_keys(key, num, sharding):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    return jax.lax.with_sharding_constraint(keys, sharding)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _spread(num, shardings, first):
    """The sampler's first state, once for each chain."""
    leaves, treedef = jax.tree.flatten(first)
    copies = [jnp.broadcast_to(x, (num, *x.shape)) for x in leaves]
    return jax.tree.unflatten(treedef, [*map(jax.lax.with_sharding_constraint, copies, shardings)])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _chunk_indices(keys, start, length, num_data, batch_size):
    """Indices ``(num_chains, length, batch_size)`` that the device would draw for these steps."""

    def one(key, step):
        return draw_indices(jax.random.fold_in(jax.random.fold_in(key, step), _BATCH), num_data, batch_size)

    return jax.vmap(lambda key: jax.vmap(lambda i: one(key, start + i))(jnp.arange(length)))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(program: LossProgram, center, frozen, batch):
    return program.mean_loss(center, frozen, batch)


@functools.partial(jax.jit, static_argnums=0)
def _batch_grad(program: LossProgram, position, frozen, batch):
    return jax.grad(program.mean_loss)(position, frozen, batch)


class Engine:
    """A posterior, a data source and a sampler, compiled for a mesh; ``advance`` moves a ``Run`` by some steps."""

    def __init__(self, posterior: LocalPosterior, source: Source, sampler: Sampler, plan: Schedule, key, mesh: Mesh):
        self.posterior, self.source, self.sampler, self.mesh = posterior, source, sampler, mesh
        center, frozen = posterior.program.split(posterior.center)
        self.key, self.center, self.frozen = self.put(key), self.put(center), self.put(frozen)
        self.arrays = self.put(source.arrays)
        self.per_chain = NamedSharding(mesh, PartitionSpec("chain"))
        self.metric: Metric = ()
        self.configure(plan, 1.0 if sampler.step_size is None else sampler.step_size, sampler.friction or 0.1)

    def configure(self, plan: Schedule, step_size: float, friction: float) -> None:
        """Set lengths and numbers; the program is compiled anew only where its form changes."""
        posterior, source, sampler, mesh = self.posterior, self.source, self.sampler, self.mesh
        self.plan, self.hot = plan, plan.hot
        self.keys = self._keys(self.key)
        self.hyper = self.hyper_of(step_size, friction)
        self.center_grad: Position = ()
        self.static = _Static(
            posterior.program,
            sampler.step,
            source.num_data,
            plan.batch_size,
            plan.micro_batches,
            plan.chain_batch,
            self._length(),
            plan.baseline == "paired",
            None if source.on_host else _gather,
            mesh,
            plan.control_variate,
            sampler.family == "exact",
        )
        if plan.control_variate:
            self.center_grad = self.put(self.full_grad())

    def put(self, tree: PyTree) -> PyTree:
        """``tree``, which every process holds whole, on the mesh, once for all chains."""
        return jax.tree.map(lambda x: place(x, shared_sharding(self.mesh, x)), tree)

    def fetch(self, indices: np.ndarray) -> PyTree:
        """The examples ``indices``, where programs together with ``center`` can use them."""
        batch = self.source.fetch(indices)
        return batch if self.per_chain.is_fully_addressable else self.put(batch)

    def _keys(self, key: jax.Array) -> jax.Array:
        return _chain_keys(key, self.plan.num_chains, self.per_chain)

    def localize(self, localization: float) -> None:
        """Give a posterior without a localization this one."""
        self.posterior = dataclasses.replace(self.posterior, localization=localization)
        self.hyper = self.hyper._replace(localization=jnp.float32(localization))

    def measure_in(self, metric: Metric) -> None:
        """Let samplers that take a metric move in its coordinates from now on."""
        self.metric = self.put(metric)
        self.hyper = self.hyper._replace(metric=self.metric)

    def position(self, run: Run, chain: int) -> Position:
        """Where one chain is, on every process."""
        state = run.state.position
        return jax.jit(
            lambda p: tuple(x[chain] for x in p), out_shardings=tuple(shared_sharding(self.mesh, x[0]) for x in state)
        )(state)

    def all_alive(self, run: Run) -> bool:
        return bool(np.all(to_host(run.alive)))

    def pilot(self, run: Run, steps: int, step_size: float, friction: float, tag: int) -> None:
        """Move ``run`` by ``steps`` steps with numbers and noise of its own; no chain is hot."""
        keys, hyper, hot = self.keys, self.hyper, self.hot
        self.keys, self.hot = self._keys(jax.random.fold_in(self.key, tag)), 1.0
        self.hyper = self.hyper_of(step_size, friction)
        try:
            end = min(run.step + steps, self.plan.total_steps)
            while run.step < end:
                batches = ()
                if self.source.on_host:
                    with Prefetcher(self.source) as ahead:
                        ahead.submit(self._indices(run.step))
                        batches = self._on_chains(ahead.result())
                self.advance(run, min(self.static.length, end - run.step), batches)
        finally:
            self.keys, self.hyper, self.hot = keys, hyper, hot

    def hyper_of(self, step_size: float, friction: float = 0.1) -> Hyper:
        """The posterior's numbers and the step's, as arrays."""
        posterior = self.posterior
        numbers = (
            posterior.nbeta,
            1.0 if posterior.localization is None else posterior.localization,
            step_size,
            friction,
        )
        return Hyper(*(jnp.float32(x) for x in numbers), jnp.bool_(False), self.metric)

    def _length(self) -> int:
        """Most steps in one chunk: bounded for host data by the memory of the batches."""
        length = min(self.plan.chunk_size, self.plan.total_steps)
        if not self.source.on_host:
            return length
        one = sum(x.nbytes for x in jax.tree.leaves(self.source.fetch(np.zeros(1, np.int64))))
        return max(1, min(length, _HOST_BATCH_BYTES // (one * self.plan.batch_size * self.plan.num_chains)))

    def start(self) -> Run:
        """Every chain at the center."""
        num, shape = self.plan.num_chains, (self.plan.num_chains, self.plan.total_steps)
        if self.static.whole:
            first = jax.jit(self._first_exact)(self.center, self.frozen, self.arrays, self.hyper)
        else:
            first = self.sampler.init(self.center)
        shardings = tuple(chain_sharding(self.mesh, x) for x in jax.tree.leaves(first))
        state = _spread(num, shardings, first)
        alive = place(np.ones(num, bool), self.per_chain)
        return Run(state, alive, Trace(*(np.full(shape, np.nan, np.float32) for _ in Trace._fields)))

    def _first_exact(self, center: Position, frozen: PyTree, arrays: PyTree, hyper: Hyper) -> PyTree:
        return self.sampler.init(center, _loss_and_grad(self.static, frozen, arrays), hyper)

    def full_loss(self) -> float:
        """L_n(w*): the mean over the whole data set, in blocks of ``batch_size``."""
        total, num, size = 0.0, self.source.num_data, self.plan.batch_size
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            batch = self.fetch(indices)
            total += float(_batch_loss(self.posterior.program, self.center, self.frozen, batch)) * len(indices)
        return total / num

    def full_grad(self) -> Position:
        """grad L_n(w*) over the whole data set, in blocks of ``batch_size``: as many gradients as there are blocks."""
        num, size = self.source.num_data, self.plan.batch_size
        total: Position = jax.tree.map(jnp.zeros_like, self.center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            part = _batch_grad(self.posterior.program, self.center, self.frozen, self.fetch(indices))
            share = len(indices) / num
            part = jax.tree.map(lambda g: g * share, part)  # noqa: B023  (called at once)
            total = jax.tree.map(jnp.add, total, part)
        return total

    def lower(self, run: Run):
        """The chunk program, lowered, for looking at its HLO and its memory. In-memory sources only."""
        return _chunk.lower(self.static, run.state, run.alive, self.keys, (), self._shared(), self._window(0, 1))

    def advance(self, run: Run, steps: int, batches: PyTree = ()) -> None:
        """Run ``steps`` steps (at most the chunk length) and append their traces. The old state is donated."""
        run.state, run.alive, rows = _chunk(
            self.static, run.state, run.alive, self.keys, batches, self._shared(), self._window(run.step, steps)
        )
        for kept, row in zip(run.trace, to_host(rows), strict=True):
            kept[:, run.step : run.step + steps] = row[:, :steps]
        run.step += steps

    def steps(self, run: Run, *, seconds: float = 1.0):
        """Yield after each chunk until all steps are done; chunks grow until one takes about ``seconds``."""
        if self.source.on_host:
            yield from self._host_steps(run)
            return
        size = 1
        while run.step < self.plan.total_steps:
            size = min(size, self.static.length, self.plan.total_steps - run.step)
            began = time.perf_counter()
            self.advance(run, size)
            took = time.perf_counter() - began
            size = max(1, min(size * 4, int(size * seconds / max(took, 1e-9)))) if size > 1 else 4
            size = gathered(size, self.mesh)[0]  # clocks differ, and all processes must take the same steps
            yield run

    def _host_steps(self, run: Run):
        length = self.static.length
        with Prefetcher(self.source) as ahead:
            ahead.submit(self._indices(run.step))
            while run.step < self.plan.total_steps:
                batches = self._on_chains(ahead.result())
                steps = min(length, self.plan.total_steps - run.step)
                if run.step + steps < self.plan.total_steps:
                    ahead.submit(self._indices(run.step + steps))
                self.advance(run, steps, batches)
                yield run

    def _indices(self, start: int) -> np.ndarray:
        """What the chains of this process draw in the chunk from step ``start``."""
        drawn = _chunk_indices(self.keys, start, self.static.length, self.source.num_data, self.plan.batch_size)
        return to_host(drawn)[own_rows(self.plan.num_chains, self.per_chain)]

    def _on_chains(self, batches: PyTree) -> PyTree:
        return jax.tree.map(lambda x: place_rows(x, self.plan.num_chains, self.per_chain), batches)

    def _shared(self) -> tuple:
        return self.center, self.frozen, self.arrays, self.hyper, self.center_grad

    def _window(self, start: int, count: int) -> _Window:
        plan = self.plan
        return _Window(*(jnp.int32(x) for x in (start, count, plan.num_warmup, plan.thinning)), jnp.float32(self.hot))
