"""The contract of a sampler: how one step moves one chain.

A sampler is a pair of pure functions and the numbers they take. It knows no data and no device: the engine hands it a
function of the position that gives the minibatch losses and the gradient of their mean. What changes the program is
bound when the sampler is built; what changes only numbers travels in ``hyper`` and is traced, so that a sweep compiles
once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from slt_jax.diagnostics.bias import Bias, Moments, bias_of, overdamped_heating
from slt_jax.diagnostics.relaxation import Relaxation
from slt_jax.kernels.langevin import Block, normal, normal_side_by_side

HIGHEST = jax.lax.Precision.HIGHEST  # of a metric's products: in TF32 a flat direction would get the stiff ones' errors
Position = tuple[jax.Array, ...]
LossAndGrad = Callable[[Position], tuple[jax.Array, Position]]


class Factor(NamedTuple):
    """R of one leaf, R R' = P: ``left`` U, ``right`` V (None for the identity), ``scale`` 1 / sqrt(t), as a matrix."""

    left: Float[Array, "rows rows"] | None
    right: Float[Array, "columns columns"] | None
    scale: Float[Array, "rows columns"]


Metric = tuple[Factor, ...]
Blocks = tuple[tuple[Block, ...], ...]  # of each array of a position
_SMALL = 4096  # entries of a leaf whose noise, outside of the steps, is drawn together with that of others


class Hyper(NamedTuple):
    """Scalars of the target and of the step; all may be traced.

    ``step_size``: eps, in squared units of weight. A kinetic sampler's time step is its square root, so that one
    undamped step from rest moves by the same -(eps/2) G as one of SGLD. ``friction``: the share of momentum lost in one
    step, dimensionless. ``adapt``: whether running statistics may still change (the first half of the warm-up).
    ``metric``: R with R R' = P for samplers that take one; () for none. ``limit``: of the mean squared force, above
    which a sampler that can do so shortens its steps; infinite for none. ``blocks``: which weights lie side by side in
    each array of the position, for ``gaussian``; () where none do. Not an array: it is part of the program.
    """

    nbeta: jax.Array | float
    localization: jax.Array | float
    step_size: jax.Array | float
    friction: jax.Array | float = 0.1
    adapt: jax.Array | bool = False
    metric: Metric = ()
    limit: jax.Array | float = float("inf")
    blocks: Blocks = ()


class Info(NamedTuple):
    """What a person needs of one step, taken at the position before the move. Scalars, float32.

    ``loss``: what ``loss_and_grad`` gave: L_m(w), or the batch's losses ``(m,)``. ``drift_sq``: G' P G with G the
    gradient of the negative log density and P the preconditioner (1 without one). ``virial``: <w - w*, G>.
    ``distance_sq``: |w - w*|^2. ``kinetic``: mean squared momentum of a coordinate, 1 at the right temperature.
    ``acceptance``: of a Metropolis test. ``pull``: <w - w*, P G>, for a sampler with a preconditioner; without one it
    is ``virial``. NaN where a sampler has no such thing. ``time``: what the step took, as a share of a full one's: the
    weight of its position in a mean.
    """

    loss: Float[Array, "*examples"]
    drift_sq: Float[Array, ""]
    virial: Float[Array, ""]
    distance_sq: Float[Array, ""] | float = float("nan")
    kinetic: Float[Array, ""] | float = float("nan")
    acceptance: Float[Array, ""] | float = float("nan")
    pull: Float[Array, ""] | float = float("nan")
    time: Float[Array, ""] | float = 1.0


@dataclass(frozen=True)
class Theory:
    """What is known of a sampler's dynamics. Calibration, corrections and the verdict ask this, never its name.

    Formulas take ``step_size`` and ``friction`` as in ``Hyper``; one that is None is not known.

    Attributes:
        family: its name in the record of a run, by which a saved result finds it again (``samplers.theory_of``).
        full_batch: every gradient is one over the whole data set, and ``Sampler.init`` takes
            ``(position, loss_and_grad, hyper)``.
        has_momentum: whether friction means anything to it.
        step_share: step_size times the largest curvature that the calibration aims at; 4 is the limit of stability.
        heating: (step_size, friction) -> what a unit of gradient noise (the trace of the covariance of nbeta grad L_m)
            adds to the LLC, before anything absorbs it.
        step_bias: (step_size, friction, <nbeta grad L, P G>) -> what the step size adds to the LLC on a quadratic, to
            first order. None: no theory, so no correction.
        covariance_corrects: the covariance of the loss with ``|G|^2`` carries ``step_bias`` beyond quadratics.
        second_order: the step adds nothing to first order, so that an excess of the kinetic temperature is noise.
        virial_excess: (step_size, mean G'PG) -> by how much <w - w*, G> exceeds the number of weights in equilibrium.
        relaxation: (curvature, step_size, friction) -> share of its distance from the mean that a chain loses in one
            step.
        can_shorten_steps: whether its steps shorten where the force is above ``Hyper.limit``.
    """

    family: str = ""
    full_batch: bool = False
    has_momentum: bool = True
    step_share: float = 0.25
    heating: Callable[[float, float], float] = overdamped_heating
    step_bias: Callable[[float, float, float], float] | None = None
    covariance_corrects: bool = False
    second_order: bool = False
    virial_excess: Callable[[float, float], float] | None = None
    relaxation: Relaxation | None = None
    can_shorten_steps: bool = False

    def bias(self, moments: Moments) -> Bias:
        """What step size and minibatch noise add to an estimate."""
        if self.full_batch:
            return Bias(0.0, 0.0, 0.0, 0.0, "exact: every move passed a Metropolis test, over the whole data set")
        if self.step_bias is None:
            return Bias(math.nan, math.nan, math.nan, 0.0, "no theory of its bias for this sampler")
        return bias_of(
            moments, self.heating, self.step_bias, covariance_corrects=self.covariance_corrects,
            second_order=self.second_order,
        )  # fmt: skip


class Sampler(NamedTuple):
    """``init(position) -> State`` and ``step(key, state, loss_and_grad, center, hyper) -> (State, Info)``.

    ``State`` is a NamedTuple whose first field is ``position``; it holds what the next step needs and nothing else.
    ``name``, ``step_size`` and ``friction`` go into the record of a run; a ``step_size`` of None is chosen by the
    calibration, and so is a ``friction`` of None. ``theory``: what is known of its dynamics. ``metric``: whether its
    step moves in the coordinates of ``hyper.metric``, which the calibration measures. ``entrywise``: whether its step
    is the same whichever arrays the weights are in, so that many small ones may lie side by side in one vector.
    """

    name: str
    step_size: float | None
    init: Callable[..., Any]
    step: Callable[[jax.Array, Any, LossAndGrad, Position, Hyper], tuple[Any, Info]]
    friction: float | None = 0.1
    theory: Theory = Theory()
    metric: bool = False
    entrywise: bool = False

    def __repr__(self) -> str:
        step = "open" if self.step_size is None else f"{self.step_size:.4g}"
        friction = "open" if self.friction is None else f"{self.friction:.4g}"
        return f"<Sampler {self.name}: step_size {step}{f', friction {friction}' * self.theory.has_momentum}>"


def root(metric: Metric, tree: Position) -> Position:
    """R u = U (u * scale) V', leaf by leaf: from the metric's coordinates to weights. R R' = P; 1 without a metric."""
    return tuple(_out_of(f, x) for f, x in zip(metric, tree, strict=True)) if metric else tree


def pull_back(metric: Metric, tree: Position) -> Position:
    """R' g = (U' g V) * scale, leaf by leaf: the force in the metric's coordinates."""
    return tuple(_into(f, x) for f, x in zip(metric, tree, strict=True)) if metric else tree


def _out_of(factor: Factor, leaf: jax.Array) -> jax.Array:
    x = leaf.reshape(factor.scale.shape) * factor.scale
    x = x if factor.left is None else jnp.matmul(factor.left, x, precision=HIGHEST)
    x = x if factor.right is None else jnp.matmul(x, factor.right.T, precision=HIGHEST)
    return x.reshape(leaf.shape).astype(leaf.dtype)


def _into(factor: Factor, leaf: jax.Array) -> jax.Array:
    x = leaf.reshape(factor.scale.shape)
    x = x if factor.left is None else jnp.matmul(factor.left.T, x, precision=HIGHEST)
    x = (x if factor.right is None else jnp.matmul(x, factor.right, precision=HIGHEST)) * factor.scale
    return x.reshape(leaf.shape).astype(leaf.dtype)


def drift(grad: Position, position: Position, center: Position, hyper: Hyper) -> Position:
    """G = nbeta grad L_m(w) + localization (w - w*), leaf by leaf."""
    return tuple(hyper.nbeta * g + hyper.localization * (w - c) for g, w, c in zip(grad, position, center, strict=True))


def inner(a: Position, b: Position) -> Float[Array, ""]:
    """Sum over all leaves of the products of their entries, in float32 at least.

    A sum that XLA fuses with what makes the entries, which ``optax.tree.vdot``'s dot products are not.
    """
    return sum((jnp.sum(x * y) for x, y in zip(a, b, strict=True)), start=jnp.float32(0))


def dimension(position: Position) -> int:
    """d, the number of weights."""
    return optax.tree.size(position)


def displacement(position: Position, center: Position) -> Position:
    """w - w*, leaf by leaf."""
    return optax.tree.sub(position, center)


def part_of_kicked(keep: Float[Array, ""]) -> Float[Array, ""]:
    """m in the thermometer m |q|^2 / d + (1 - m) |p|^2 / d of a BAOAB step: p before the kick, q after it.

    ``keep``: the share of the momentum that friction leaves. Gradient noise heats q more than p, and the positions in
    between; with these weights the excess over 1 is that of the positions, whatever the step and the friction. Half of
    each would read 1 + ((1 - keep) / (1 + keep))^2 times as much.
    """
    return (1 + 3 * keep) / (4 * (1 + keep))


def gaussian(key: Key[Array, ""], position: Position, blocks: Blocks = ()) -> Position:
    """Standard normal noise shaped like ``position``, independent over leaves; that of leaf i by ``fold_in(key, i)``.

    ``blocks``: of leaves that lie side by side in the position, with their numbers: their noise is the same as apart.
    """
    parts = blocks or tuple((Block((i,), w.size),) for i, w in enumerate(position))
    alone = [of_leaf[0].numbers[0] for of_leaf in parts if _is_one(of_leaf)]
    keys = iter(folded(key, alone))
    return tuple(
        normal(next(keys), w.shape, w.dtype) if _is_one(of_leaf) else normal_side_by_side(key, of_leaf)
        for w, of_leaf in zip(position, parts, strict=True)
    )


def _is_one(parts: tuple[Block, ...]) -> bool:
    return len(parts) == 1 and len(parts[0].numbers) == 1


def folded(key: Key[Array, ""], numbers: Sequence[int]) -> list[Key[Array, ""]]:
    """``fold_in(key, number)`` of each number, by one program for all."""
    if not numbers:
        return []
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers, jnp.uint32))
    return [keys[i] for i in range(len(numbers))]


def _at_once(key: Key[Array, ""], position: Position, blocks: Blocks) -> Position:
    """``gaussian``, by one code for all small leaves: inside a step, what uses the noise would be rounded otherwise."""
    parts = blocks or tuple((Block((i,), w.size),) for i, w in enumerate(position))
    small = [i for i, w in enumerate(position) if w.dtype == jnp.float32 and max(n for _, n in parts[i]) <= _SMALL]
    if not small:
        return gaussian(key, position, blocks)
    vector = normal_side_by_side(key, tuple(block for i in small for block in parts[i]))
    drawn = dict(zip(small, jax.lax.split(vector, [position[i].size for i in small]), strict=True))
    large = [i for i in range(len(position)) if i not in drawn]
    drawn |= dict(
        zip(large, gaussian(key, tuple(position[i] for i in large), tuple(parts[i] for i in large)), strict=True)
    )
    return tuple(drawn[i].reshape(w.shape) for i, w in enumerate(position))


def noise_like(key: Key[Array, ""], position: Position, blocks: Blocks = ()) -> Position:
    """``gaussian`` by a program of its own, laid out as ``position`` is: it takes long to compile."""
    return _laid_out(tuple(w.sharding for w in position), blocks)(key, position)


@functools.lru_cache
def _laid_out(shardings: tuple, blocks: Blocks) -> Callable:
    return jax.jit(functools.partial(_at_once, blocks=blocks), out_shardings=shardings)
