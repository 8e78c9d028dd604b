"""A posterior and its data on the devices of a mesh: losses and gradients there, outside of any chain."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slt_jax.engine.mesh import place, shared_sharding
from slt_jax.posterior.data import ArrayData, Source
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.program import LossProgram, PyTree
from slt_jax.samplers.base import Position


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(program: LossProgram, center, frozen, batch):
    return program.mean_loss(center, frozen, batch)


@functools.partial(jax.jit, static_argnums=0)
def _batch_grad(program: LossProgram, position, frozen, batch):
    return jax.grad(program.mean_loss)(position, frozen, batch)


def _is_there(x: Any, device: Any) -> bool:
    return not isinstance(x, jax.Array) or x.devices() == {device}


class Problem:
    """The loss, the weights and the data of a posterior, placed once for all chains; nothing of it changes.

    Args:
        posterior: of which the loss, the center and the mask are taken; its numbers travel in ``plan.Numbers``.
        source: its data. also: further data sets, in memory, whose losses are recorded at every draw.
        batch_size, micro_batches: examples of a step, and in how many parts they go through the model.
    """

    def __init__(
        self, posterior: LocalPosterior, source: Source, mesh: Mesh, batch_size: int, micro_batches: int = 1,
        also: tuple[ArrayData, ...] = (),
    ):  # fmt: skip
        self.program, self.source, self.mesh, self.num_free = posterior.program, source, mesh, posterior.num_free
        self.batch_size, self.micro_batches = batch_size, micro_batches
        center, frozen = self.program.split(posterior.center)
        self.center, self.frozen = self.put(center), self.put(frozen)
        self.arrays, self.also = self.put(source.arrays), self.put(tuple(data.arrays for data in also))
        self.also_data = tuple(data.num_data for data in also)
        self.per_chain = NamedSharding(mesh, PartitionSpec("chain"))

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

    @functools.cached_property
    def center_grad(self) -> Position:
        """grad L_n(w*) over the whole data set, in blocks that go through the model at once in a step, too."""
        num, size = self.source.num_data, self.batch_size // self.micro_batches
        center, frozen = self.on_first_device(self.center), self.on_first_device(self.frozen)
        total: Position = jax.tree.map(jnp.zeros_like, center)
        for begin in range(0, num, size):
            indices = np.arange(begin, min(begin + size, num))
            part = _batch_grad(self.program, center, frozen, self.fetch(indices))
            share = len(indices) / num
            part = jax.tree.map(lambda g: g * share, part)  # noqa: B023  (called at once)
            total = jax.tree.map(jnp.add, total, part)
        return self.put(total)
