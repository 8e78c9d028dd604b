"""The only loop: a host loop over compiled chunks of steps, with all chains on the device.

Inside a chunk each device runs its chains in groups of ``chain_batch`` (vmap within a group, one group after another),
each through all the chunk's steps. Chains never talk to each other: the program has no collectives on the chain axis.
Every random number comes from ``fold_in(chain key, global step)``: results do not depend on how steps fall into chunks.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slt_jax.batches import Prefetcher, Source, draw_indices
from slt_jax.mesh import chain_sharding, shared_sharding
from slt_jax.posterior import LocalPosterior, LossProgram
from slt_jax.samplers.base import Hyper, Sampler

PyTree = Any
_BATCH, _NOISE = 0, 1  # what a step's key is folded with
_HOST_BATCH_BYTES = 2**28


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how they are laid out. ``baseline`` is ``"paired"`` or ``"full"``."""

    num_chains: int
    num_draws: int
    num_warmup: int
    thinning: int
    batch_size: int
    micro_batches: int
    baseline: str
    chain_batch: int
    chunk_size: int

    @property
    def total_steps(self) -> int:
        return self.num_warmup + self.num_draws * self.thinning


class Trace(NamedTuple):
    """Per chain and step, float32 ``(num_chains, total_steps)``; NaN where nothing was recorded."""

    loss: Any
    baseline: Any
    drift_sq: Any
    virial: Any


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


def _gather(arrays: PyTree, indices: jax.Array) -> PyTree:
    return jax.tree.map(lambda a: a.at[indices].get(mode="promise_in_bounds"), arrays)


def _loss_and_grad(static: _Static, frozen: PyTree, batch: PyTree) -> Callable:
    """position -> (mean loss, gradient) on the batch, accumulated over micro-batches when there are several."""
    parts = static.micro_batches

    def on(part):
        return jax.value_and_grad(lambda position: static.program.mean_loss(position, frozen, part))

    if parts == 1:
        return on(batch)

    def accumulated(position):
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, position))
        total, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, on(part)(position)), None), zero, split)
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def _center_loss(static: _Static, center: PyTree, frozen: PyTree, batch: PyTree) -> jax.Array:
    parts = static.micro_batches
    if parts == 1:
        return static.program.mean_loss(center, frozen, batch)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return jnp.mean(jax.lax.map(lambda part: static.program.mean_loss(center, frozen, part), split))


def _one_chain(static: _Static, shared: tuple, window: tuple, state, key, alive, batches):
    """All steps of the chunk for one chain; stops when the chain (with vmap: its whole group) is no longer finite."""
    center, frozen, arrays, hyper = shared
    start, count, num_warmup, thinning = window

    def go_on(carry):
        i, _, still, _ = carry
        any_alive = jax.lax.pmax(still.astype(jnp.int32), "group") > 0 if static.group > 1 else still
        return (i < count) & any_alive

    def body(carry):
        i, state, still, trace = carry
        step = start + i
        step_key = jax.random.fold_in(key, step)
        if static.gather is None:
            batch = jax.tree.map(lambda b: b[i], batches)
        else:
            drawn = draw_indices(jax.random.fold_in(step_key, _BATCH), static.num_data, static.batch_size)
            batch = static.gather(arrays, drawn)
        at = _loss_and_grad(static, frozen, batch)
        state, info = static.sampler_step(jax.random.fold_in(step_key, _NOISE), state, at, center, hyper)
        baseline = jnp.float32(jnp.nan)
        if static.paired:
            kept = (step >= num_warmup) & ((step - num_warmup) % thinning == thinning - 1)
            baseline = jax.lax.cond(
                kept, lambda: _center_loss(static, center, frozen, batch).astype(jnp.float32), lambda: baseline
            )
        row = Trace(info.loss, baseline, info.drift_sq, info.virial)
        trace = jax.tree.map(lambda t, x: t.at[i].set(jnp.where(still, x, jnp.nan).astype(t.dtype)), trace, row)
        return i + 1, state, still & jnp.isfinite(info.loss) & jnp.isfinite(info.drift_sq), trace

    empty = Trace(*(jnp.full(static.length, jnp.nan, jnp.float32) for _ in Trace._fields))
    _, state, alive, trace = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, alive, empty))
    return state, alive, trace


def _device_chunk(static: _Static, state, alive, keys, batches, shared, window):
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
        return run_group(state, keys, alive, batches)

    def one_group(g, carry):
        def take(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, g * size, size), tree)

        moved = run_group(take(carry[0]), take(keys), take(carry[1]), take(batches))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, g * size, 0), carry, moved)

    return jax.lax.fori_loop(0, num // size, one_group, (state, alive, trace))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1,))
def _chunk(static: _Static, state, alive, keys, batches, shared, window):
    """``window[1]`` steps of every chain: (state, alive, trace of shape (num_chains, length))."""
    per, whole = PartitionSpec("chain"), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(_device_chunk, static),
        mesh=static.mesh,
        in_specs=(per, per, per, per, whole, whole),
        out_specs=(per, per, per),
        axis_names={"chain"},
        check_vma=False,
    )
    return mapped(state, alive, keys, batches, shared, window)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _chain_keys(key, num, sharding):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    return jax.lax.with_sharding_constraint(keys, sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _spread(init, num, shardings, center):
    """The sampler's first state at ``center``, once for each chain."""
    leaves, treedef = jax.tree.flatten(init(center))
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


def to_host(tree: PyTree) -> PyTree:
    """NumPy copies, whole on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.array, tree)


class Engine:
    """A posterior, a data source and a sampler, compiled for a mesh; ``advance`` moves a ``Run`` by some steps."""

    def __init__(self, posterior: LocalPosterior, source: Source, sampler: Sampler, plan: Schedule, key, mesh: Mesh):
        self.posterior, self.source, self.sampler, self.plan, self.mesh = posterior, source, sampler, plan, mesh
        center, frozen = posterior.program.split(posterior.center)
        put = lambda tree: jax.device_put(tree, jax.tree.map(lambda x: shared_sharding(mesh, x), tree))  # noqa: E731
        self.center, self.frozen, self.arrays = put(center), put(frozen), put(source.arrays)
        self.per_chain = NamedSharding(mesh, PartitionSpec("chain"))
        self.keys = _chain_keys(jax.device_put(key, shared_sharding(mesh, key)), plan.num_chains, self.per_chain)
        self.hyper = Hyper(*(jnp.float32(x) for x in (posterior.nbeta, posterior.localization, sampler.step_size)))
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
        )

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

        shardings = jax.tree.map(lambda x: chain_sharding(self.mesh, x), self.sampler.init(self.center))
        state = _spread(self.sampler.init, num, tuple(jax.tree.leaves(shardings)), self.center)
        alive = jax.device_put(jnp.ones(num, bool), self.per_chain)
        return Run(state, alive, Trace(*(np.full(shape, np.nan, np.float32) for _ in Trace._fields)))

    def full_loss(self) -> float:
        """L_n(w*): the mean over the whole data set, in blocks of ``batch_size``."""
        total, num, size = 0.0, self.source.num_data, self.plan.batch_size
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            batch = self.source.fetch(indices)
            total += float(_batch_loss(self.posterior.program, self.center, self.frozen, batch)) * len(indices)
        return total / num

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
            yield run

    def _host_steps(self, run: Run):
        length = self.static.length
        with Prefetcher(self.source) as ahead:
            ahead.submit(self._indices(run.step))
            while run.step < self.plan.total_steps:
                batches = jax.device_put(ahead.result(), self.per_chain)
                steps = min(length, self.plan.total_steps - run.step)
                if run.step + steps < self.plan.total_steps:
                    ahead.submit(self._indices(run.step + steps))
                self.advance(run, steps, batches)
                yield run

    def _indices(self, start: int) -> np.ndarray:
        drawn = _chunk_indices(self.keys, start, self.static.length, self.source.num_data, self.plan.batch_size)
        return np.asarray(to_host(drawn))

    def _shared(self) -> tuple:
        return self.center, self.frozen, self.arrays, self.hyper

    def _window(self, start: int, count: int) -> tuple:
        return tuple(jnp.int32(x) for x in (start, count, self.plan.num_warmup, self.plan.thinning))
