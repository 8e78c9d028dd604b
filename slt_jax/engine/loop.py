"""The only loop: on the host, over compiled chunks of steps (``engine.chunk``), with all chains on the device."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.engine.center_slope import slope_schedule
from slt_jax.engine.chunk import Row, Shared, Static, Window, loss_and_grad_on, run_chunk
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.mesh import allgather, chain_sharding, own_rows, place, place_rows, shared_sharding
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.problem import Problem
from slt_jax.engine.trace import Trace, blank
from slt_jax.posterior.data import Prefetcher, draw_indices, gather
from slt_jax.posterior.program import PyTree
from slt_jax.posterior.tree import to_host
from slt_jax.samplers.base import Hyper, Metric, Position, Sampler
from slt_jax.samplers.kronecker import blank_factor

_HOST_BATCH_BYTES = 2**28


@dataclass
class Run:
    """What the host holds: device state, and the traces so far. ``causes``: chain -> why it went non-finite.

    ``cost``: speed and peak memory. ``interrupted``: whether it was ended before its last step.
    """

    state: PyTree
    alive: Any
    trace: Trace
    step: int = 0
    cost: Any = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    causes: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


class Inputs(NamedTuple):
    """What the chains of a run are moved with, on the devices. ``hot``: see ``plan.Lengths``."""

    keys: jax.Array
    rows: Row
    metric: Metric
    hot: float


@functools.partial(jax.jit, static_argnums=(1, 2))
def _chain_keys(key, num, sharding):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    return jax.lax.with_sharding_constraint(keys, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cell_keys(keys, num_each, sharding):
    of_cell = jax.vmap(jax.random.fold_in, (None, 0))
    by_cell = jax.vmap(lambda key: of_cell(key, jnp.arange(num_each)))(keys)
    return jax.lax.with_sharding_constraint(by_cell.reshape(-1), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _repeated(num, shardings, first):
    """The sampler's first state, once for each chain."""
    leaves, treedef = jax.tree.flatten(first)
    copies = [jnp.broadcast_to(x, (num, *x.shape)) for x in leaves]
    return jax.tree.unflatten(treedef, [*map(jax.lax.with_sharding_constraint, copies, shardings)])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def chunk_indices(keys, start, length, num_data, batch_size):
    """Indices ``(num_chains, length, batch_size)`` that the device would draw for these steps."""

    def one(key, step):
        return draw_indices(jax.random.fold_in(jax.random.fold_in(key, step), KeyTag.BATCH), num_data, batch_size)

    return jax.vmap(lambda key: jax.vmap(lambda i: one(key, start + i))(jnp.arange(length)))(keys)


@jax.jit
def _row(stacked, row):
    """One program for all leaves."""
    return tuple(jax.lax.dynamic_index_in_dim(x, row, keepdims=False) for x in stacked)


class Engine:
    """A problem and a sampler, compiled for a schedule; ``advance`` moves a ``Run`` by some steps.

    Nothing of an engine changes: another schedule is another engine on the same problem (``replanned``), and what
    chains are moved with is a value, ``Inputs``, that is passed.
    """

    def __init__(self, problem: Problem, sampler: Sampler, plan: Schedule, key: jax.Array):
        self.problem, self.sampler, self.plan, self.key = problem, sampler, plan, problem.put(key)
        self.slope = slope_schedule(plan, problem)
        self.static = Static(
            program=problem.program,
            sampler_step=sampler.step,
            num_data=problem.source.num_data,
            batch_size=plan.batch_size,
            micro_batches=plan.micro_batches,
            group=plan.chain_batch,
            length=self._chunk_length(),
            paired=plan.baseline == "paired",
            gather=None if problem.source.on_host else gather,
            mesh=problem.mesh,
            control_variate=plan.control_variate,
            full_batch=sampler.theory.full_batch,
            also_data=problem.also_data,
            slope_method=self.slope.method,
        )

    def replanned(self, plan: Schedule) -> "Engine":
        """For other lengths; a program is compiled anew only where its form changes."""
        return Engine(self.problem, self.sampler, plan, self.key)

    @property
    def needs_center_grad(self) -> bool:
        """Whether the steps are given the gradient at w* over all data."""
        return self.static.control_variate or self.static.slope_method == "gradient"

    def inputs(self, numbers: Numbers, key: jax.Array | None = None, hot: float | None = None) -> Inputs:
        """One estimate's chains. ``key``: default the engine's. ``hot``: default the schedule's."""
        keys = _chain_keys(self.key if key is None else key, self.plan.num_chains, self.problem.per_chain)
        number = place(np.arange(self.plan.num_chains, dtype=np.int32), self.problem.per_chain)
        metric = self.problem.put(numbers.metric)
        return Inputs(keys, self._rows(number, numbers, 1), metric, self.plan.hot if hot is None else hot)

    def cell_inputs(self, numbers: Numbers, keys: jax.Array, num_each: int) -> Inputs:
        """The chains of many estimates, ``num_each`` to one: to each a key, and its own of ``numbers``.

        A chain then moves as in an estimate of its cell by itself, with that key.
        """
        number = np.tile(np.arange(num_each, dtype=np.int32), len(keys))
        cell_keys = _cell_keys(self.problem.put(keys), num_each, self.problem.per_chain)
        rows = self._rows(place(number, self.problem.per_chain), numbers, num_each)
        return Inputs(cell_keys, rows, (), self.plan.hot)

    def _rows(self, number: jax.Array, numbers: Numbers, num_each: int) -> Row:
        def each(value: Any) -> jax.Array:
            values = np.repeat(np.asarray(value, np.float32), num_each) if np.ndim(value) else value
            return place(np.full(self.plan.num_chains, values, np.float32), self.problem.per_chain)

        return Row(
            number=number, nbeta=each(numbers.nbeta), localization=each(numbers.localization),
            step_size=each(numbers.step_size), friction=each(numbers.friction), limit=each(numbers.limit),
        )  # fmt: skip

    def _chunk_length(self) -> int:
        """Most steps in one chunk: bounded for host data by the memory of the batches."""
        source, plan = self.problem.source, self.plan
        if not source.on_host:  # a short run then has the program of its calibration's pilot
            return min(plan.chunk_size, max(plan.total_steps, 512))
        one = sum(x.nbytes for x in jax.tree.leaves(source.fetch(np.zeros(1, np.int64))))
        most = _HOST_BATCH_BYTES // (one * plan.batch_size * plan.num_chains)
        return max(1, min(plan.chunk_size, plan.total_steps, most))

    def start(self, inputs: Inputs) -> Run:
        """Every chain at the center."""
        num, shape = self.plan.num_chains, (self.plan.num_chains, self.plan.total_steps)
        problem = self.problem
        if self.static.full_batch:
            laid = jax.tree.map(lambda x: x.sharding, self.described()[0])
            init = jax.jit(jax.vmap(self._first_of_full_batch, (None, None, None, 0)), out_shardings=laid)
            state = init(problem.center, problem.frozen, problem.arrays, inputs.rows)
        else:
            first = self.sampler.init(problem.center)
            state = _repeated(num, tuple(chain_sharding(problem.mesh, x) for x in jax.tree.leaves(first)), first)
        alive = place(np.ones(num, bool), problem.per_chain)
        return Run(state, alive, blank(np, shape, len(problem.also)))

    def lengthened(self, run: Run) -> Run:
        """A run of fewer steps with room for those of this engine's schedule, at the step where it is."""
        problem = self.problem
        trace = blank(np, (self.plan.num_chains, self.plan.total_steps), len(problem.also))
        for new, old in zip(jax.tree.leaves(trace), jax.tree.leaves(run.trace), strict=True):
            new[:, : run.step] = old[:, : run.step]
        return Run(run.state, run.alive, trace, run.step, notes=list(run.notes))

    def _first_of_full_batch(self, center: Position, frozen: PyTree, arrays: PyTree, row: Row) -> PyTree:
        hyper = Hyper(row.nbeta, row.localization, row.step_size, row.friction)
        return self.sampler.init(center, loss_and_grad_on(self.static, frozen, arrays), hyper)

    def position(self, run: Run, chain: int) -> Position:
        """Where one chain is: on the first device, or on all where ``Problem.on_first_device`` leaves things there."""
        state, mesh = run.state.position, self.problem.mesh
        if self.problem.has_first_device:
            device, row = divmod(chain, self.plan.num_chains // mesh.devices.size)
            here = mesh.devices.flat[0]
            return tuple(jax.device_put(x, here) for x in _row(tuple(x.addressable_data(device) for x in state), row))
        return jax.jit(
            lambda p: tuple(x[chain] for x in p), out_shardings=tuple(shared_sharding(mesh, x[0]) for x in state)
        )(state)

    def all_alive(self, run: Run) -> bool:
        return bool(np.all(to_host(run.alive)))

    def lower(self, run: Run | None = None):
        """The chunk program, lowered, for looking at its HLO and its memory: what ``advance`` will run.

        Without a run, one is described, and so are a metric that is still to be measured and the gradient at w*:
        nothing is allocated. The compilation is kept for the run itself.
        """
        problem = self.problem
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared_sharding(problem.mesh, x))  # noqa: E731
        metric = jax.tree.map(shape, tuple(map(blank_factor, problem.center))) if self.sampler.metric else ()
        grad = jax.tree.map(shape, problem.center) if self.needs_center_grad else ()
        shared = self._shared(metric, grad)
        state, alive, batches = self.described()
        if run is not None:
            state, alive = run.state, run.alive
        inputs = self.inputs(Numbers(1.0, 1.0, 1.0))
        given = (state, alive, inputs.keys, inputs.rows, batches)
        return run_chunk.lower(self.static, *given, shared, self._window(inputs, 0, 1))

    def described(self) -> tuple[PyTree, jax.ShapeDtypeStruct, PyTree]:
        """A run's state, its chains' marks of being alive, a chunk's batches from the host: shapes on the mesh."""
        num, problem = self.plan.num_chains, self.problem
        if self.static.full_batch:
            one = Row(*(jax.ShapeDtypeStruct((), jnp.int32 if x == "number" else jnp.float32) for x in Row._fields))
            first = jax.eval_shape(self._first_of_full_batch, problem.center, problem.frozen, problem.arrays, one)
        else:
            first = jax.eval_shape(self.sampler.init, problem.center)

        def stacked(x):
            return jax.ShapeDtypeStruct((num, *x.shape), x.dtype, sharding=chain_sharding(problem.mesh, x))

        def batch(x):
            shape = (num, self.static.length, self.plan.batch_size, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=problem.per_chain)

        alive = jax.ShapeDtypeStruct((num,), jnp.bool_, sharding=problem.per_chain)
        example = problem.source.fetch(np.zeros(1, np.int64)) if problem.source.on_host else ()
        return jax.tree.map(stacked, first), alive, jax.tree.map(batch, example)

    def advance(self, run: Run, inputs: Inputs, steps: int, batches: PyTree = (), offset: int = 0) -> None:
        """Run ``steps`` steps (at most the chunk length) and append their traces. The old state is donated."""
        problem = self.problem
        grad = problem.center_grad if self.needs_center_grad else ()
        shared = self._shared(inputs.metric, grad)
        window = self._window(inputs, run.step, steps, offset)
        run.state, run.alive, rows = run_chunk(
            self.static, run.state, run.alive, inputs.keys, inputs.rows, batches, shared, window
        )
        for kept, row in zip(jax.tree.leaves(run.trace), jax.tree.leaves(to_host(rows)), strict=True):
            kept[:, run.step : run.step + steps] = row[:, :steps]
        run.step += steps

    def move(self, run: Run, inputs: Inputs, steps: int) -> None:
        """Run ``steps`` steps, or those that are left, at once: for pilot runs."""
        end = min(run.step + steps, self.plan.total_steps)
        while run.step < end:
            batches = ()
            if self.problem.source.on_host:
                with Prefetcher(self.problem.source) as ahead:
                    ahead.submit(self._indices(inputs, run.step))
                    batches = self._on_chains(ahead.result())
            self.advance(run, inputs, min(self.static.length, end - run.step), batches)

    def steps(self, run: Run, inputs: Inputs, *, seconds: float = 1.0) -> Iterator[Run]:
        """Yield after each chunk until all steps are done; chunks grow until one takes about ``seconds``."""
        size = 1
        for batches, block in self._blocks(run, inputs):
            end = run.step + block
            while (left := end - run.step) > 0:
                size = min(size, self.static.length)
                count, began = min(size, left), time.perf_counter()
                self.advance(run, inputs, count, batches, block - left)
                took = time.perf_counter() - began
                if count == size:
                    size = max(1, min(size * 4, int(size * seconds / max(took, 1e-9)))) if size > 1 else 4
                    size = allgather(size, self.problem.mesh)[0]  # clocks differ, and all must take the same steps
                yield run

    def _blocks(self, run: Run, inputs: Inputs) -> Iterator[tuple[PyTree, int]]:
        """(batches, steps they are for), to the end: all at once where the device draws them itself."""
        total, length, source = self.plan.total_steps, self.static.length, self.problem.source
        if not source.on_host:
            yield (), total - run.step
            return
        with Prefetcher(source) as ahead:
            ahead.submit(self._indices(inputs, run.step))
            for start in range(run.step, total, length):
                batches = self._on_chains(ahead.result())
                if start + length < total:
                    ahead.submit(self._indices(inputs, start + length))
                yield batches, min(length, total - start)

    def _indices(self, inputs: Inputs, start: int) -> np.ndarray:
        """What the chains of this process draw in the chunk from step ``start``."""
        num_data = self.problem.source.num_data
        drawn = chunk_indices(inputs.keys, start, self.static.length, num_data, self.plan.batch_size)
        return to_host(drawn)[own_rows(self.plan.num_chains, self.problem.per_chain)]

    def _on_chains(self, batches: PyTree) -> PyTree:
        return jax.tree.map(lambda x: place_rows(x, self.plan.num_chains, self.problem.per_chain), batches)

    def _shared(self, metric: Metric, center_grad: PyTree) -> Shared:
        p = self.problem
        return Shared(p.center, p.frozen, p.arrays, metric, center_grad, p.also)

    def _window(self, inputs: Inputs, start: int, count: int, offset: int = 0) -> Window:
        return Window(  # of NumPy: an array of JAX for each is a third of what a chunk costs the host
            start=np.int32(start), count=np.int32(count), offset=np.int32(offset),
            num_warmup=np.int32(self.plan.num_warmup), thinning=np.int32(self.plan.thinning),
            tilt_every=np.int32(self.slope.every), hot=np.float32(inputs.hot),
        )  # fmt: skip
