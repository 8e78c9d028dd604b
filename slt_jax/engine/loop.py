"""The only loop: on the host, over compiled chunks of steps (``engine.chunk``), with all chains on the device."""

import functools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slt_jax.engine.center_slope import looks_of
from slt_jax.engine.chunk import BATCH, Row, Static, Trace, Window, blank, loss_and_grad_on, run_chunk, takes_all
from slt_jax.engine.mesh import chain_sharding, gathered, own_rows, place, place_rows, shared_sharding
from slt_jax.engine.plan import Schedule
from slt_jax.posterior.data import ArrayData, Prefetcher, Source, draw_indices, gather
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.program import LossProgram
from slt_jax.posterior.tree import to_host
from slt_jax.samplers.base import Hyper, Metric, Position, Sampler
from slt_jax.samplers.kronecker import blank_factor

PyTree = Any
_HOST_BATCH_BYTES = 2**28


@dataclass
class Run:
    """What the host holds: device state, and the traces so far."""

    state: PyTree
    alive: Any
    trace: Trace
    step: int = 0
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _chain_keys(key, num, sharding):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    return jax.lax.with_sharding_constraint(keys, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cell_keys(keys, num_each, sharding):
    of_cell = jax.vmap(jax.random.fold_in, (None, 0))
    found = jax.vmap(lambda key: of_cell(key, jnp.arange(num_each)))(keys)
    return jax.lax.with_sharding_constraint(found.reshape(-1), sharding)


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
        return draw_indices(jax.random.fold_in(jax.random.fold_in(key, step), BATCH), num_data, batch_size)

    return jax.vmap(lambda key: jax.vmap(lambda i: one(key, start + i))(jnp.arange(length)))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(program: LossProgram, center, frozen, batch):
    return program.mean_loss(center, frozen, batch)


@functools.partial(jax.jit, static_argnums=0)
def _batch_grad(program: LossProgram, position, frozen, batch):
    return jax.grad(program.mean_loss)(position, frozen, batch)


@jax.jit
def _row(stacked, row):
    """One program for all leaves."""
    return tuple(jax.lax.dynamic_index_in_dim(x, row, keepdims=False) for x in stacked)


class Engine:
    """A posterior, a data source and a sampler, compiled for a mesh; ``advance`` moves a ``Run`` by some steps.

    ``also``: further data sets, in memory, whose losses are read at every draw.
    """

    def __init__(
        self, posterior: LocalPosterior, source: Source, sampler: Sampler, plan: Schedule, key, mesh: Mesh,
        also: tuple[ArrayData, ...] = (),
    ):  # fmt: skip
        self.posterior, self.source, self.sampler, self.mesh = posterior, source, sampler, mesh
        center, frozen = posterior.program.split(posterior.center)
        self.key, self.center, self.frozen = self.put(key), self.put(center), self.put(frozen)
        self.arrays, self.also = self.put(source.arrays), self.put(tuple(one.arrays for one in also))
        self._also_data = tuple(one.num_data for one in also)
        self.per_chain = NamedSharding(mesh, PartitionSpec("chain"))
        self.metric: Metric = ()
        self.configure(plan, 1.0 if sampler.step_size is None else sampler.step_size, sampler.friction or 0.1)

    def configure(self, plan: Schedule, step_size: float, friction: float, limit: float = math.inf) -> None:
        """Set lengths and numbers; the program is compiled anew only where its form changes."""
        posterior, source, sampler, mesh = self.posterior, self.source, self.sampler, self.mesh
        self.plan, self.hot = plan, plan.hot
        self.keys = self._keys(self.key)
        self.rows = self.rows_of(step_size, friction, limit)
        self.looks = looks_of(plan, sampler, posterior.program, self.center, self.frozen, source)
        self.static = Static(
            posterior.program,
            sampler.step,
            source.num_data,
            plan.batch_size,
            plan.micro_batches,
            plan.chain_batch,
            self._length(),
            plan.baseline == "paired",
            None if source.on_host else gather,
            mesh,
            plan.control_variate,
            sampler.family == "exact",
            self._also_data,
            self.looks.way,
        )

    @property
    def takes_all(self) -> bool:
        """Whether every batch is the whole data set."""
        return takes_all(self.static, self.source.num_data)

    @property
    def holds_grad(self) -> bool:
        """Whether the steps are given the gradient at w* over all data."""
        return self.static.control_variate or self.static.tilt == "gradient"

    def put(self, tree: PyTree) -> PyTree:
        """``tree``, which every process holds whole, on the mesh, once for all chains."""
        return jax.tree.map(lambda x: place(x, shared_sharding(self.mesh, x)), tree)

    def fetch(self, indices: np.ndarray, source: Source | None = None) -> PyTree:
        """The examples ``indices``, of the run's own data or another's, where programs with ``center`` can use them."""
        batch = (self.source if source is None else source).fetch(indices)
        return batch if self.per_chain.is_fully_addressable else self.put(batch)

    def _keys(self, key: jax.Array) -> jax.Array:
        return _chain_keys(key, self.plan.num_chains, self.per_chain)

    def localize(self, localization: float) -> None:
        """Give a posterior without a localization this one."""
        self.posterior = self.posterior.with_numbers(nbeta=self.posterior.nbeta, localization=localization)
        self.rows = self.rows._replace(localization=self._each(localization))

    def measure_in(self, metric: Metric) -> None:
        """Let samplers that take a metric move in its coordinates from now on."""
        self.metric = self.put(metric)

    def alone(self, tree: PyTree) -> PyTree:
        """``tree``, held once for all chains, as the first device has it: what is done once need not be done on each.

        As it is on a mesh that spans processes or splits the weights.
        """
        return jax.tree.map(lambda x: x.addressable_data(0), tree) if self.alone_is_one else tree

    @property
    def alone_is_one(self) -> bool:
        """Whether what is done ``alone`` is done by one device."""
        return self.per_chain.is_fully_addressable and self.mesh.axis_names == ("chain",)

    def position(self, run: Run, chain: int) -> Position:
        """Where one chain is: on the first device, or on all where ``alone`` leaves things as they are."""
        state = run.state.position
        if self.alone_is_one:
            device, row = divmod(chain, self.plan.num_chains // self.mesh.devices.size)
            here = self.mesh.devices.flat[0]
            return tuple(jax.device_put(x, here) for x in _row(tuple(x.addressable_data(device) for x in state), row))
        return jax.jit(
            lambda p: tuple(x[chain] for x in p), out_shardings=tuple(shared_sharding(self.mesh, x[0]) for x in state)
        )(state)

    def all_alive(self, run: Run) -> bool:
        return bool(np.all(to_host(run.alive)))

    def pilot(self, run: Run, steps: int, step_size: float, friction: float, tag: int) -> None:
        """Move ``run`` by ``steps`` steps with numbers and noise of its own; no chain is hot."""
        keys, rows, hot = self.keys, self.rows, self.hot
        self.keys, self.hot = self._keys(jax.random.fold_in(self.key, tag)), 1.0
        self.rows = self.rows_of(step_size, friction)
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
            self.keys, self.rows, self.hot = keys, rows, hot

    def rows_of(self, step_size: float, friction: float = 0.1, limit: float = math.inf) -> Row:
        """The posterior's numbers and the step's, the same for every chain."""
        posterior = self.posterior
        gamma = 1.0 if posterior.localization is None else posterior.localization
        numbers = (self._each(x) for x in (posterior.nbeta, gamma, step_size, friction, limit))
        return Row(place(np.arange(self.plan.num_chains, dtype=np.int32), self.per_chain), *numbers)

    def _each(self, values: Any) -> jax.Array:
        """One number for each chain, or one for all."""
        return place(np.full(self.plan.num_chains, values, np.float32), self.per_chain)

    def share_out(self, keys: jax.Array, num_each: int, **numbers: np.ndarray) -> None:
        """Give the chains to cells, ``num_each`` to one: to each cell a key, and its own of the numbers of ``Row``.

        A chain then moves as in an estimate of its cell alone, with that key.
        """
        each = np.tile(np.arange(num_each, dtype=np.int32), len(keys))
        self.keys = _cell_keys(self.put(keys), num_each, self.per_chain)
        found = {name: self._each(np.repeat(np.asarray(x, np.float32), num_each)) for name, x in numbers.items()}
        self.rows = self.rows._replace(number=place(each, self.per_chain), **found)

    def _length(self) -> int:
        """Most steps in one chunk: bounded for host data by the memory of the batches."""
        if not self.source.on_host:  # a short run then has the program of its calibration's pilot
            return min(self.plan.chunk_size, max(self.plan.total_steps, 512))
        one = sum(x.nbytes for x in jax.tree.leaves(self.source.fetch(np.zeros(1, np.int64))))
        most = _HOST_BATCH_BYTES // (one * self.plan.batch_size * self.plan.num_chains)
        return max(1, min(self.plan.chunk_size, self.plan.total_steps, most))

    def start(self) -> Run:
        """Every chain at the center."""
        num, shape = self.plan.num_chains, (self.plan.num_chains, self.plan.total_steps)
        if self.static.exact:
            laid = jax.tree.map(lambda x: x.sharding, self.described()[0])
            init = jax.jit(jax.vmap(self._first_exact, (None, None, None, 0)), out_shardings=laid)
            state = init(self.center, self.frozen, self.arrays, self.rows)
        else:
            first = self.sampler.init(self.center)
            state = _spread(num, tuple(chain_sharding(self.mesh, x) for x in jax.tree.leaves(first)), first)
        alive = place(np.ones(num, bool), self.per_chain)
        return Run(state, alive, blank(np, shape, len(self.also)))

    def _first_exact(self, center: Position, frozen: PyTree, arrays: PyTree, row: Row) -> PyTree:
        hyper = Hyper(row.nbeta, row.localization, row.step_size, row.friction)
        return self.sampler.init(center, loss_and_grad_on(self.static, frozen, arrays), hyper)

    def full_loss(self) -> float:
        """L_n(w*): the mean over the whole data set, in blocks of ``batch_size``."""
        total, num, size = 0.0, self.source.num_data, self.plan.batch_size
        center = self.alone(self.center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            total += self.loss_at(center, self.fetch(indices)) * len(indices)
        return total / num

    def loss_at(self, position: Position, batch: PyTree) -> float:
        """L_m at a position, as ``alone`` leaves one, on a batch, as ``fetch`` gives it."""
        return float(_batch_loss(self.posterior.program, position, self.alone(self.frozen), batch))

    def first_loss(self, data: Source | None = None, position: Position | None = None) -> float:
        """Mean loss at w*, or at another position, over the first examples, or those of another data set.

        ``batch_size`` of them at most.
        """
        data = self.source if data is None else data
        batch = self.fetch(np.arange(min(self.plan.batch_size, data.num_data)), data)
        return self.loss_at(self.alone(self.center) if position is None else position, batch)

    @functools.cached_property
    def center_grad(self) -> Position:
        """grad L_n(w*) over the whole data set, in blocks that go through the model at once in a step, too."""
        num, size = self.source.num_data, self.plan.batch_size // self.plan.micro_batches
        center, frozen = self.alone(self.center), self.alone(self.frozen)
        total: Position = jax.tree.map(jnp.zeros_like, center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            part = _batch_grad(self.posterior.program, center, frozen, self.fetch(indices))
            share = len(indices) / num
            part = jax.tree.map(lambda g: g * share, part)  # noqa: B023  (called at once)
            total = jax.tree.map(jnp.add, total, part)
        return self.put(total)

    def lower(self, run: Run | None = None):
        """The chunk program, lowered, for looking at its HLO and its memory: what ``advance`` will run.

        Without a run, one is described, and so are a metric that is still to be measured and the gradient at w*:
        nothing is allocated. The compilation is kept for the run itself.
        """
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared_sharding(self.mesh, x))  # noqa: E731
        metric, grad = self.metric, jax.tree.map(shape, self.center) if self.holds_grad else ()
        if self.sampler.metric and not self.metric:
            metric = jax.tree.map(shape, tuple(map(blank_factor, self.center)))
        shared = self.center, self.frozen, self.arrays, metric, grad, self.also
        state, alive, batches = self.described()
        if run is not None:
            state, alive = run.state, run.alive
        given = (state, alive, self.keys, self.rows, batches)
        return run_chunk.lower(self.static, *given, shared, self._window(0, 1))

    def described(self) -> tuple[PyTree, jax.ShapeDtypeStruct, PyTree]:
        """A run's state, its chains' marks of being alive, a chunk's batches from the host: shapes on the mesh."""
        num, center = self.plan.num_chains, self.center
        if self.static.exact:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), self.rows)
            first = jax.eval_shape(self._first_exact, center, self.frozen, self.arrays, one)
        else:
            first = jax.eval_shape(self.sampler.init, center)

        def stacked(x):
            return jax.ShapeDtypeStruct((num, *x.shape), x.dtype, sharding=chain_sharding(self.mesh, x))

        def batch(x):
            shape = (num, self.static.length, self.plan.batch_size, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=self.per_chain)

        alive = jax.ShapeDtypeStruct((num,), jnp.bool_, sharding=self.per_chain)
        example = self.source.fetch(np.zeros(1, np.int64)) if self.source.on_host else ()
        return jax.tree.map(stacked, first), alive, jax.tree.map(batch, example)

    def advance(self, run: Run, steps: int, batches: PyTree = (), offset: int = 0) -> None:
        """Run ``steps`` steps (at most the chunk length) and append their traces. The old state is donated."""
        window = self._window(run.step, steps, offset)
        run.state, run.alive, rows = run_chunk(
            self.static, run.state, run.alive, self.keys, self.rows, batches, self._shared(), window
        )
        for kept, row in zip(jax.tree.leaves(run.trace), jax.tree.leaves(to_host(rows)), strict=True):
            kept[:, run.step : run.step + steps] = row[:, :steps]
        run.step += steps

    def steps(self, run: Run, *, seconds: float = 1.0):
        """Yield after each chunk until all steps are done; chunks grow until one takes about ``seconds``."""
        size = 1
        for batches, block in self._blocks(run):
            end = run.step + block
            while (left := end - run.step) > 0:
                size = min(size, self.static.length)
                count, began = min(size, left), time.perf_counter()
                self.advance(run, count, batches, block - left)
                took = time.perf_counter() - began
                if count == size:
                    size = max(1, min(size * 4, int(size * seconds / max(took, 1e-9)))) if size > 1 else 4
                    size = gathered(size, self.mesh)[0]  # clocks differ, and all processes must take the same steps
                yield run

    def _blocks(self, run: Run):
        """(batches, steps they are for), to the end: all at once where the device draws them itself."""
        total, length = self.plan.total_steps, self.static.length
        if not self.source.on_host:
            yield (), total - run.step
            return
        with Prefetcher(self.source) as ahead:
            ahead.submit(self._indices(run.step))
            for start in range(run.step, total, length):
                batches = self._on_chains(ahead.result())
                if start + length < total:
                    ahead.submit(self._indices(start + length))
                yield batches, min(length, total - start)

    def _indices(self, start: int) -> np.ndarray:
        """What the chains of this process draw in the chunk from step ``start``."""
        drawn = _chunk_indices(self.keys, start, self.static.length, self.source.num_data, self.plan.batch_size)
        return to_host(drawn)[own_rows(self.plan.num_chains, self.per_chain)]

    def _on_chains(self, batches: PyTree) -> PyTree:
        return jax.tree.map(lambda x: place_rows(x, self.plan.num_chains, self.per_chain), batches)

    def _shared(self) -> tuple:
        grad = self.center_grad if self.holds_grad else ()
        return self.center, self.frozen, self.arrays, self.metric, grad, self.also

    def _window(self, start: int, count: int, offset: int = 0) -> Window:
        numbers = (start, count, offset, self.plan.num_warmup, self.plan.thinning, self.looks.every)
        return Window(*(jnp.int32(x) for x in numbers), jnp.float32(self.hot))
