"""The Hessian and the Gauss-Newton matrix at w*: products with vectors, all rows, and Lanczos' iteration."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree
from matfree import decomp

from slt_jax.engine.mesh import place, shared_sharding
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.outputs import parts_of
from slt_jax.posterior.program import Frozen, LossProgram, Position
from slt_jax.posterior.tree import to_host

GAUSS_NEWTON, HESSIAN = "gauss-newton", "hessian"
_SIDE_BY_SIDE = 16  # rows of a dense matrix
Blocks = tuple[PyTree, ...]  # of examples: equal ones stacked on a first axis, and the rest of them
Static = tuple[str, int, LossProgram, Mesh]  # kind of matrix, length of its vectors, program, mesh


class Curvature:
    """The Hessian or the Gauss-Newton matrix of the mean loss at w*, H, of shape ``(num_free, num_free)``.

    Weights that have a ``model`` axis are split by it, others are on every device. Examples, vectors and the basis of
    Lanczos' iteration are spread over all devices of the mesh.

    ``precision``: the type it is computed in.

    Args:
        kind: ``GAUSS_NEWTON``: the mean of J' (d2 loss / d outputs2) J over examples, J the derivative of the outputs
            by the weights; the loss must have the two parts of ``posterior.outputs``. ``HESSIAN``.
        examples: all that the mean is taken over, in memory, one row each.
        batch_size: rows that go through the model at once.
        double: compute in float64; inside of ``jax.enable_x64`` only.
    """

    def __init__(
        self, kind: str, posterior: LocalPosterior, examples: PyTree, batch_size: int, mesh: Mesh, *, double: bool
    ):
        program = _in_float64(posterior.program) if double else posterior.program
        self.num_free = posterior.num_free
        length = -(-self.num_free // mesh.size) * mesh.size  # zeros at the end, which H turns into zeros
        self._static: Static = (kind, length, program, mesh)
        split = program.split(posterior.center)
        self._weights: tuple[Position, Frozen] = jax.tree.map(lambda x: place(x, shared_sharding(mesh, x)), split)
        self.precision = str(jnp.result_type(*self._weights[0]))
        self._blocks = _placed(_wide(examples) if double else examples, batch_size, mesh)

    def loss(self) -> float:
        """L(w*), the mean over the examples."""
        return float(to_host(_mean_loss(self._static, *self._weights, self._blocks)))

    def matrix(self) -> np.ndarray:
        """H, a row for each free weight, float64.

        Raises:
            ValueError: the loss has no second derivative, or cannot be traced.
        """
        self._lowered(_rows)
        rows = to_host(_rows(self._static, *self._weights, self._blocks))
        return rows[: self.num_free, : self.num_free].astype(np.float64)

    def lanczos(self, key: jax.Array, order: int) -> tuple[np.ndarray, np.ndarray]:
        """(diagonal, off-diagonal and norm of the rest), each ``(order,)``, of the iteration from a random vector.

        By ``matfree``, with full reorthogonalization: ``order`` vectors as long as the weights are kept.
        """
        diagonal, beside, rest = to_host(_lanczos(self._static, order, key, *self._weights, self._blocks))
        return diagonal.astype(np.float64), np.append(beside, rest).astype(np.float64)

    def bytes_of_lanczos(self, order: int) -> int:
        """What ``lanczos`` takes on one device beside weights and examples; compiled here, and not again later.

        Raises as ``matrix``.
        """
        analysis = self._lowered(_lanczos, order, jax.random.key(0)).compile().memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def _lowered(self, program: Any, *arguments: Any) -> Any:
        try:
            return program.lower(self._static, *arguments, *self._weights, self._blocks)
        except Exception as error:
            raise ValueError(
                f"JAX cannot compute the {self._static[0]} matrix of this loss ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). A function with a derivative of its own (jax.custom_vjp) has "
                "no second one."
            ) from error


def _in_float64(program: LossProgram) -> LossProgram:
    """The program with all floating-point leaves in float64, also as the loss sees them."""
    leaves = tuple(
        leaf._replace(dtype=jnp.dtype("float64")) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for leaf in program.leaves
    )
    return _Wide(program.loss_fn, program.treedef, leaves, program.forward_dtype)


class _Wide(LossProgram):
    """A program whose frozen leaves are in the types of ``leaves`` too."""

    def split(self, params: PyTree) -> tuple[Position, Frozen]:
        return super().split(_wide(params))


def _wide(tree: PyTree) -> PyTree:
    """Floating-point leaves in float64, the others as they are."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x), tree
    )


def _placed(examples: PyTree, batch_size: int, mesh: Mesh) -> Blocks:
    """The examples in blocks of ``batch_size``, whose rows are spread over all devices if that divides them."""
    num = jax.tree.leaves(examples)[0].shape[0]
    whole, rest = divmod(num, batch_size)

    def spread(x: Array, axis: int) -> Array:
        devices = mesh.axis_names if x.shape[axis] % mesh.size == 0 else None
        return place(x, NamedSharding(mesh, PartitionSpec(*[None] * axis, devices)))

    blocks = []
    if whole:
        equal = jax.tree.map(lambda x: x[: whole * batch_size].reshape(whole, batch_size, *x.shape[1:]), examples)
        blocks.append(jax.tree.map(lambda x: spread(x, 1), equal))
    if rest:
        blocks.append(jax.tree.map(lambda x: spread(x[whole * batch_size :][None], 1), examples))
    return tuple(blocks)


def _of_block(
    kind: str, program: LossProgram, position: Position, frozen: Frozen, block: PyTree, v: Position
) -> Position:
    """H of one block times v."""
    if kind == HESSIAN:
        return jax.jvp(lambda w: jax.grad(program.mean_loss)(w, frozen, block), (position,), (v,))[1]
    parts = parts_of(program.loss_fn)
    assert parts is not None

    def outputs(w: Position) -> PyTree:
        return parts.outputs(program.merge(w, frozen), block)

    def mean_loss(z: PyTree) -> Array:
        return jnp.mean(parts.loss(z, block))

    z, along = jax.jvp(outputs, (position,), (v,))
    _, bent = jax.jvp(jax.grad(mean_loss), (z,), (along,))
    return jax.vjp(outputs, position)[1](bent)[0]


def _mean_over(function: Any, blocks: Blocks, zero: PyTree) -> PyTree:
    """The mean of a function of a block over all examples, one block at a time."""
    num, total = 0, zero
    for stacked in blocks:
        count, size = jax.tree.leaves(stacked)[0].shape[:2]
        num += count * size

        def add(total: PyTree, block: PyTree, size: int = size) -> tuple[PyTree, None]:
            return jax.tree.map(lambda t, x: t + (size * x).astype(t.dtype), total, function(block)), None

        total, _ = jax.lax.scan(add, total, stacked)
    return jax.tree.map(lambda t: t / num, total)


def _product(static: Static, position: Position, frozen: Frozen, blocks: Blocks, v: Array) -> Array:
    """H v for a vector with zeros behind the free weights."""
    kind, length, program, mesh = static
    flat, unravel = ravel_pytree(position)
    direction = _as_weights(unravel(v[: flat.size]), position, mesh)
    zero = jax.tree.map(jnp.zeros_like, position)
    total = _mean_over(lambda block: _of_block(kind, program, position, frozen, block, direction), blocks, zero)
    return _spread(jnp.pad(ravel_pytree(total)[0], (0, length - flat.size)), mesh)


def _as_weights(tree: Position, like: Position, mesh: Mesh) -> Position:
    """Laid out on the mesh as the weights are."""
    if mesh.size == 1:
        return tree
    shardings = [jax.typeof(w).sharding for w in like]
    return tuple(
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, s.spec)) for x, s in zip(tree, shardings, strict=True)
    )


def _spread(vector: Array, mesh: Mesh) -> Array:
    if mesh.size == 1:
        return vector
    return jax.lax.with_sharding_constraint(vector, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(static: Static, position: Position, frozen: Frozen, blocks: Blocks) -> Array:
    program = static[2]
    zero = jnp.zeros((), jnp.result_type(jnp.float32, *position))
    return _mean_over(lambda block: program.mean_loss(position, frozen, block), blocks, zero)


@functools.partial(jax.jit, static_argnums=0)
def _rows(static: Static, position: Position, frozen: Frozen, blocks: Blocks) -> Float[Array, "row length"]:
    """H row by row, with rows and columns of zeros behind it."""
    rows = -(-static[1] // _SIDE_BY_SIDE) * _SIDE_BY_SIDE  # no rest, which would be compiled for itself
    units = jnp.eye(rows, static[1], dtype=jnp.result_type(*position))
    return jax.lax.map(lambda v: _product(static, position, frozen, blocks, v), units, batch_size=_SIDE_BY_SIDE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lanczos(static: Static, order: int, key: jax.Array, position: Position, frozen: Frozen, blocks: Blocks) -> Any:
    _, length, _, mesh = static
    num_free, dtype = sum(w.size for w in position), jnp.result_type(*position)
    start = jnp.pad(jax.random.normal(key, (num_free,), dtype), (0, length - num_free))
    iterate = decomp.tridiag_sym(order, materialize=False, reortho="full", custom_vjp=False)
    found = iterate(lambda v: _product(static, position, frozen, blocks, v), _spread(start, mesh))
    return *found.J_small, jnp.linalg.norm(found.residual)
