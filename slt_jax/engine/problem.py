"""A posterior and its data on the devices of a mesh: losses and gradients there, outside of any chain."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slt_jax.engine.mesh import check_split, place, shared_sharding, split_notes, weight_sharding
from slt_jax.engine.observe import Watch, in_blocks, mask_at, values_at
from slt_jax.posterior.data import ArrayData, Source
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.packing import Packing, packing_of
from slt_jax.posterior.program import LossProgram, PyTree
from slt_jax.posterior.tree import to_host
from slt_jax.samplers.base import Position


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(program: LossProgram, center, frozen, batch):
    return program.mean_loss(center, frozen, batch)


@functools.partial(jax.jit, static_argnums=0)
def batch_grad(program: LossProgram, position, frozen, batch):
    return jax.grad(program.mean_loss)(position, frozen, batch)


@jax.jit
def _scaled(tree: PyTree, share: jax.Array | float) -> PyTree:
    return jax.tree.map(lambda x: x * share, tree)


@jax.jit
def added(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, one, other)


@functools.partial(jax.jit, static_argnums=0)
def _values(watch: Watch, position, frozen, data):
    return values_at(watch, position, frozen, data), mask_at(watch, position, frozen, data)


def _is_there(x: Any, device: Any) -> bool:
    return not isinstance(x, jax.Array) or x.devices() == {device}


@functools.partial(jax.jit, static_argnums=0)
def _packed(packing: Packing, position: Position) -> Position:
    return packing.pack(position)


class Problem:
    """The loss, the weights and the data of a posterior, placed once for all chains; nothing of it changes.

    Args:
        posterior: of which the loss, the center and the mask are taken; its numbers travel in ``plan.Numbers``.
        source: its data. also: further data sets, in memory, whose losses are recorded at every draw.
        batch_size, micro_batches: examples of a step, and in how many parts they go through the model.
        observed: observables, each with its examples. packs: whether many small arrays of weights are to lie side by
            side in one, as ``Sampler.entrywise`` allows.
    """

    def __init__(
        self, posterior: LocalPosterior, source: Source, mesh: Mesh, batch_size: int, micro_batches: int = 1,
        also: tuple[ArrayData, ...] = (), observed: tuple[tuple[Watch, ArrayData], ...] = (),
        packs: bool = False,
    ):  # fmt: skip
        self.source, self.mesh, self.num_free = source, mesh, posterior.num_free
        self.batch_size, self.micro_batches = batch_size, micro_batches
        program = posterior.program.on_mesh(mesh.abstract_mesh if "model" in mesh.axis_names else None)
        center, frozen = map(self.put_weights, self._split(posterior))
        check_split(mesh, (*center, *frozen))
        named = dict(zip(posterior.free_names, center, strict=True))
        self.notes = split_notes(mesh, named, batch_size // micro_batches)
        packing = packing_of(center) if packs else None
        self.program = dataclasses.replace(program, packing=packing)
        self.center: Position = center if packing is None else self._pack(packing, center)
        self.frozen = frozen
        self._specs = {x.shape: getattr(x.sharding, "spec", ()) for x in self.center}
        self.arrays, self.also = self.put(source.arrays), self.put(tuple(data.arrays for data in also))
        self.also_data = tuple(data.num_data for data in also)
        self.watches = tuple(
            watch._replace(evaluate=dataclasses.replace(watch.evaluate, program=self.program)) for watch, _ in observed
        )
        self.observed = self.put(tuple(in_blocks(data.arrays, watch.blocks) for watch, data in observed))
        self.per_chain = NamedSharding(mesh, PartitionSpec("chain"))

    def _pack(self, packing: Packing, center: Position) -> Position:
        *_, vector = _packed(packing, center)
        return *(center[i] for i in packing.kept), self.put(vector)

    def _split(self, posterior: LocalPosterior) -> tuple[PyTree, PyTree]:
        return posterior.program.split(posterior.center)

    @property
    def takes_all(self) -> bool:
        """Whether every batch is the whole data set."""
        return self.batch_size == self.source.num_data

    @property
    def passes(self) -> int:
        """Minibatches of a pass over the data."""
        return -(-self.source.num_data // self.batch_size)

    def put(self, tree: PyTree) -> PyTree:
        """``tree``, which every process holds whole, on the mesh, once for all chains."""
        return jax.tree.map(lambda x: place(x, shared_sharding(self.mesh, x)), tree)

    def put_weights(self, tree: PyTree) -> PyTree:
        """As ``put``, for arrays of w*: large ones are split over the mesh's axis ``model``."""
        return jax.tree.map(lambda x: place(x, weight_sharding(self.mesh, x)), tree)

    def stacked(self, x: Any) -> NamedSharding:
        """Sharding of an array of a chain's state, stacked over chains: over ``model`` as the weights of its shape."""
        return NamedSharding(self.mesh, PartitionSpec("chain", *self._specs.get(x.shape, ())))

    def fetch(self, indices: np.ndarray, source: Source | None = None) -> PyTree:
        """The examples ``indices``, of the run's own data or another's, where programs with ``center`` can use them."""
        batch = (self.source if source is None else source).fetch(indices)
        if not self.per_chain.is_fully_addressable:
            return self.put(batch)
        if not self.has_first_device:
            return batch
        first = self.mesh.devices.flat[0]
        return jax.tree.map(lambda x: x if _is_there(x, first) else jax.device_put(x, first), batch)

    @property
    def has_first_device(self) -> bool:
        """Whether what is done once is done by one device: not on a mesh that spans processes or splits the weights."""
        return self.per_chain.is_fully_addressable and self.mesh.axis_names == ("chain",)

    def on_first_device(self, tree: PyTree) -> PyTree:
        """``tree``, stored once for all chains, as the first device has it: what is done once need not be done on each.

        As it is where ``has_first_device`` is false.
        """
        return jax.tree.map(lambda x: x.addressable_data(0), tree) if self.has_first_device else tree

    def full_loss(self) -> float:
        """L_n(w*): the mean over the whole data set, in blocks of ``batch_size``."""
        total, num, size = 0.0, self.source.num_data, self.batch_size
        center = self.on_first_device(self.center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            total += self.loss_at(center, self.fetch(indices)) * len(indices)
        return total / num

    def loss_at(self, position: Position, batch: PyTree) -> float:
        """L_m at a position, as ``on_first_device`` leaves one, on a batch, as ``fetch`` gives it."""
        return float(_batch_loss(self.program, position, self.on_first_device(self.frozen), batch))

    def first_loss(self, data: Source | None = None, position: Position | None = None) -> float:
        """Mean loss at w*, or at another position, over the first examples, or those of another data set.

        ``batch_size`` of them at most.
        """
        data = self.source if data is None else data
        batch = self.fetch(np.arange(min(self.batch_size, data.num_data)), data)
        return self.loss_at(self.on_first_device(self.center) if position is None else position, batch)

    def values_at_center(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(values of one observable at w*, which of them count or None if all do), on every process."""
        given = (self.center, self.frozen, self.observed[number])
        return to_host(_values(self.watches[number], *map(self.on_first_device, given)))

    @property
    def draw_passes(self) -> float:
        """Minibatches that observing takes through the model at a draw, forward."""
        return sum(watch.shape[0] for watch in self.watches) / self.batch_size

    @functools.cached_property
    def center_grad(self) -> Position:
        """grad L_n(w*) over the whole data set, in blocks that go through the model at once in a step, too."""
        num, size = self.source.num_data, self.batch_size // self.micro_batches
        center, frozen = self.on_first_device(self.center), self.on_first_device(self.frozen)
        total: Position = jax.tree.map(jnp.zeros_like, center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            part = batch_grad(self.program, center, frozen, self.fetch(indices))
            share = len(indices) / num
            total = added(total, _scaled(part, share))  # two programs: in one they would be rounded once
        return jax.tree.map(lambda g, w: place(g, w.sharding), total, self.center)


class DescribedProblem(Problem):
    """The same on devices that are not there: shapes in the place of arrays, for ``Engine.lower`` and nothing else.

    The weights may be shapes, too (``LocalPosterior.is_described``).
    """

    def _split(self, posterior: LocalPosterior) -> tuple[PyTree, PyTree]:
        return posterior.program.split_shapes(posterior.center)

    def _pack(self, packing: Packing, center: Position) -> Position:
        *_, vector = jax.eval_shape(packing.pack, center)
        return *(center[i] for i in packing.kept), self.put(vector)

    def put(self, tree: PyTree) -> PyTree:
        """Shapes on the mesh, once for all chains."""
        mesh = self.mesh
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared_sharding(mesh, x)), tree)

    def put_weights(self, tree: PyTree) -> PyTree:
        """Likewise, split as the arrays would be."""
        mesh = self.mesh
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight_sharding(mesh, x)), tree)
