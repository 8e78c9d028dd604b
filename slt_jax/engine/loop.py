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
from slt_jax.engine.mesh import allgather, own_rows, place, place_keys, place_rows, shared_sharding
from slt_jax.engine.observe import Seen, Sums, blank_sums, first_parts, lengthened_sums
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.problem import Problem
from slt_jax.engine.trace import SCALARS, Rows, Trace, blank
from slt_jax.engine.values import append, longer_values
from slt_jax.kernels.langevin import words_on_host
from slt_jax.posterior.data import Prefetcher, draw_indices, gather
from slt_jax.posterior.program import PyTree
from slt_jax.posterior.tree import to_host
from slt_jax.samplers.base import Hyper, Metric, Position, Sampler
from slt_jax.samplers.kronecker import blank_factor

_HOST_BATCH_BYTES = 2**28
_CHUNK_VALUES_BYTES = 2**26  # of what a device observes in a chunk


@dataclass
class Run:
    """What the host holds: device state, and the traces so far. ``causes``: chain -> why it went non-finite.

    ``cost``: speed and peak memory. ``interrupted``: whether it was ended before its last step. ``drawn``: draws of a
    chain so far. ``values``: of observables, see ``engine.values``; () of a run that keeps none. ``sums``, ``parts``:
    moments of the others, and their blocks, see ``engine.observe``.
    """

    state: PyTree
    alive: Any
    trace: Trace
    step: int = 0
    cost: Any = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    causes: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False
    drawn: int = 0
    values: tuple[Any, ...] = ()
    sums: tuple[Sums, ...] = ()
    parts: tuple[int, int] | tuple[()] = ()


class Inputs(NamedTuple):
    """What the chains of a run are moved with, on the devices. ``hot``: see ``plan.Lengths``."""

    keys: jax.Array
    rows: Row
    metric: Metric
    hot: float


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
        length = self._chunk_length()
        self.static = Static(
            program=problem.program,
            sampler_step=sampler.step,
            num_data=problem.source.num_data,
            batch_size=plan.batch_size,
            micro_batches=plan.micro_batches,
            group=plan.chain_batch,
            length=length,
            paired=plan.baseline == "paired",
            gather=None if problem.source.on_host else gather,
            mesh=problem.mesh,
            control_variate=plan.control_variate,
            full_batch=sampler.theory.full_batch,
            also_data=problem.also_data,
            slope_method=self.slope.method,
            watches=problem.watches,
            slots=-(-length // plan.thinning) if any(not watch.parts for watch in problem.watches) else 0,
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
        words = words_on_host(self.key if key is None else key, range(self.plan.num_chains))
        keys = place_keys(words, self.problem.per_chain)
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
        """Most steps in one chunk: bounded for host data by the memory of the batches, and by what is observed."""
        source, plan = self.problem.source, self.plan
        of_draw = sum(watch.num_bytes for watch in self.problem.watches if not watch.parts) * plan.num_chains
        draws = _CHUNK_VALUES_BYTES * self.problem.mesh.shape["chain"] // max(1, of_draw)
        size = min(plan.chunk_size, max(1, draws) * plan.thinning) if of_draw else plan.chunk_size
        if not source.on_host:  # a short run then has the program of its calibration's pilot
            return min(size, max(plan.total_steps, 512))
        one = sum(x.nbytes for x in jax.tree.leaves(source.fetch(np.zeros(1, np.int64))))
        most = _HOST_BATCH_BYTES // (one * plan.batch_size * plan.num_chains)
        return max(1, min(size, plan.total_steps, most))

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
            state = _repeated(num, tuple(map(problem.stacked, jax.tree.leaves(first))), first)
        alive = place(np.ones(num, bool), problem.per_chain)
        parts = first_parts(problem.watches, self.plan.num_draws)
        trace, notes = blank(shape, len(problem.also)), list(problem.notes)
        return Run(state, alive, trace, notes=notes, sums=self._blank_sums(), parts=parts)

    def _blank_sums(self) -> tuple[Sums, ...]:
        summed, num = [watch for watch in self.problem.watches if watch.parts], self.plan.num_chains
        if not summed:
            return ()
        return jax.jit(
            lambda: tuple(blank_sums(watch, (num,)) for watch in summed), out_shardings=self.problem.per_chain
        )()

    def lengthened(self, run: Run) -> Run:
        """A run of fewer steps with room for those of this engine's schedule, at the step where it is."""
        problem = self.problem
        trace = blank((self.plan.num_chains, self.plan.total_steps), len(problem.also))
        for new, old in zip(jax.tree.leaves(trace), jax.tree.leaves(run.trace), strict=True):
            new[:, : run.step] = old[:, : run.step]
        sums, parts = lengthened_sums(run.sums, run.parts, self.plan.num_draws)
        return Run(
            run.state, run.alive, trace, run.step, notes=list(run.notes), drawn=run.drawn,
            values=longer_values(run.values, self.plan.num_draws), sums=sums, parts=parts,
        )  # fmt: skip

    def _first_of_full_batch(self, center: Position, frozen: PyTree, arrays: PyTree, row: Row) -> PyTree:
        hyper = Hyper(row.nbeta, row.localization, row.step_size, row.friction)
        return self.sampler.init(center, loss_and_grad_on(self.static, frozen, arrays), hyper)

    def position(self, run: Run, chain: int) -> Position:
        """Where one chain is: on the first device, or on all where ``Problem.on_first_device`` leaves things there."""
        state, mesh = run.state.position, self.problem.mesh
        if self.problem.has_first_device:
            device, row = divmod(chain, self.plan.num_chains // mesh.devices.size)
            here, local = mesh.devices.flat[0], tuple(x.addressable_data(device) for x in state)
            if here.platform == "cpu":  # copies: the next steps overwrite the state
                return tuple(jax.device_put(np.asarray(x)[row].copy(), here) for x in local)
            return tuple(jax.device_put(x, here) for x in _row(local, row))
        laid = tuple(w.sharding for w in self.problem.center)
        return jax.jit(lambda p: tuple(x[chain] for x in p), out_shardings=laid)(state)

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
        alike = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
        grad = jax.tree.map(alike, problem.center) if self.needs_center_grad else ()
        shared = self._shared(metric, grad)
        state, alive, batches = self.described()
        if run is not None:
            state, alive = run.state, run.alive
        given = (state, alive, *self.described_inputs(), batches)
        window = self._window(self.plan.hot, 0, 1, parts=first_parts(problem.watches, self.plan.num_draws))
        return run_chunk.lower(self.static, *given, shared, window, self.described_sums())

    def described_inputs(self) -> tuple[jax.ShapeDtypeStruct, Row]:
        """The keys of the chains and what they are moved with: shapes on the mesh."""
        number = lambda dtype: jax.ShapeDtypeStruct((self.plan.num_chains,), dtype, sharding=self.problem.per_chain)  # noqa: E731
        rows = Row(*(number(jnp.int32 if name == "number" else jnp.float32) for name in Row._fields))
        return number(self.key.dtype), rows

    def described_sums(self) -> tuple[Sums, ...]:
        """The moments that a run keeps of its observables: shapes on the mesh."""
        summed, num = [watch for watch in self.problem.watches if watch.parts], self.plan.num_chains
        shapes = jax.eval_shape(lambda: tuple(blank_sums(watch, (num,)) for watch in summed))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.problem.per_chain), shapes)

    def described(self) -> tuple[PyTree, jax.ShapeDtypeStruct, PyTree]:
        """A run's state, its chains' marks of being alive, a chunk's batches from the host: shapes on the mesh."""
        num, problem = self.plan.num_chains, self.problem
        if self.static.full_batch:
            one = Row(*(jax.ShapeDtypeStruct((), jnp.int32 if x == "number" else jnp.float32) for x in Row._fields))
            first = jax.eval_shape(self._first_of_full_batch, problem.center, problem.frozen, problem.arrays, one)
        else:
            first = jax.eval_shape(self.sampler.init, problem.center)

        def stacked(x):
            return jax.ShapeDtypeStruct((num, *x.shape), x.dtype, sharding=problem.stacked(x))

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
        window = self._window(inputs.hot, run.step, steps, offset, run.parts)
        run.state, run.alive, rows, seen = run_chunk(
            self.static, run.state, run.alive, inputs.keys, inputs.rows, batches, shared, window, run.sums
        )
        self._record(run, to_host(rows), steps)
        run.step += steps
        self._keep(run, seen)

    def _record(self, run: Run, rows: Rows, steps: int) -> None:
        """Append what a chunk recorded of so many steps, as NumPy arrays, to the traces."""
        here = slice(run.step, run.step + steps)
        for column, name in enumerate(SCALARS):
            getattr(run.trace, name)[:, here] = rows.scalars[:, :steps, column]
        if self.problem.also:
            run.trace.also[:, here] = np.asarray(rows.also)[:, :steps]

    def _keep(self, run: Run, seen: Seen) -> None:
        first, run.drawn = run.drawn, max(0, run.step - self.plan.num_warmup) // self.plan.thinning
        run.sums = seen.sums
        if run.values:
            rows = seen.values if self.problem.per_chain.is_fully_addressable else to_host(seen.values)
            append(run.values, first, run.drawn, rows)

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
        return Shared(p.center, p.frozen, p.arrays, metric, center_grad, p.also, p.observed)

    def _window(
        self, hot: float, start: int, count: int, offset: int = 0, parts: tuple[int, int] | tuple[()] = ()
    ) -> Window:
        return Window(  # of NumPy: an array of JAX for each is a third of what a chunk costs the host
            start=np.int32(start), count=np.int32(count), offset=np.int32(offset),
            num_warmup=np.int32(self.plan.num_warmup), thinning=np.int32(self.plan.thinning),
            tilt_every=np.int32(self.slope.every), hot=np.float32(hot), parts=tuple(map(np.int32, parts)),
        )  # fmt: skip
