"""An exact sampler of a deep linear network's local posterior at any nbeta: each layer drawn from its conditional.

With all layers but one held, the output is linear in that layer, X A W C with A = W_1 ... W_{k-1}, C = W_{k+1} ... W_L:
the loss is quadratic, and the conditional posterior Gaussian with the precision

    (2 nbeta / H_L) (A' (X'X / n) A) (x) (C C') + localization.

In the singular bases of the two factors it is diagonal and drawn from directly: no step size, no curvature that is too
large, no bias. One move draws all layers in turn. What a single layer cannot do is trade with its neighbours, but the
others' products leave it free wherever they vanish: sizes move by factors and not by lengths, and some tens of moves
suffice at any nbeta. In float64, as singular values down to sqrt(localization / nbeta) count.

No other model has such conditionals. This is the reference that tells a posterior's own value where HMC would need too
many gradients: at a teacher of type A the curvatures of one posterior span as many decades as nbeta.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.calibration.localization import REACH


class GibbsState(NamedTuple):
    position: tuple[jax.Array, ...]


class Factors(NamedTuple):
    """A matrix as left diag(values) right, with as many values as its shorter side has rows."""

    left: jax.Array
    values: jax.Array
    right: jax.Array


def factors(x: jax.Array) -> Factors:
    return Factors(*jnp.linalg.svd(x, full_matrices=False))


def draw_layer(
    key: jax.Array,
    before: Factors,
    center: jax.Array,
    after: Factors,
    target: jax.Array,
    stiffness: float,
    localization: float,
) -> jax.Array:
    """One layer W from exp(-(stiffness / 2) |A W C - target|^2 - (localization / 2) |W - center|^2).

    With A = U s V' and C = P t Q', the precision is stiffness (s_i t_j)^2 + localization in the coordinates V' W P, and
    the localization alone outside of these: there a draw is noise, which is made everywhere and then corrected.

    Args:
        before: of A, ``(a, h)``. after: of C, ``(h', b)``. target: U' target Q, one entry for each s_i and t_j.
        center: ``(h, h')``.
    """
    vt, p = before.right, after.left
    gain = before.values[:, None] * after.values
    precision = stiffness * gain**2 + localization
    noise = jax.random.normal(key, center.shape, center.dtype) / jnp.sqrt(localization)
    mean = stiffness * gain * (target - gain * (vt @ center @ p)) / precision
    inner = (jnp.sqrt(localization / precision) - 1) * (vt @ noise @ p)
    return center + noise + vt.T @ (mean + inner) @ p.T


def gibbs(center: Sequence[jax.Array], root: jax.Array, nbeta: float, localization: float) -> Any:
    """A ``blackjax.SamplingAlgorithm`` for ``slt_jax.estimate_llc``, on the loss of ``teachers.loss_fn``.

    What is outside the image of the layers before (or of those after, transposed) no later layer brings back, so that
    the products are carried in their own singular coordinates: no longer than the narrowest width passed.

    Args:
        center: the teacher's layers. root: R with R'R = X'X / n, ``(H_0, H_0)``.
    """
    from blackjax.base import SamplingAlgorithm  # its import runs JAX, which fixes the number of devices

    layers = tuple(jnp.asarray(w) for w in center)
    root = jnp.asarray(root, layers[0].dtype)
    whole = root
    for layer in layers:
        whole = whole @ layer
    stiffness = 2 * nbeta / layers[-1].shape[1]

    def init(position, rng_key=None) -> GibbsState:
        return GibbsState(tuple(position))

    def step(key: jax.Array, state: GibbsState) -> tuple[GibbsState, None]:
        after = [factors(jnp.eye(layers[-1].shape[1], dtype=root.dtype))]
        targets = [whole @ after[0].right.T]
        for layer in state.position[:0:-1]:
            after.append(factors(layer @ (after[-1].left * after[-1].values)))
            targets.append(targets[-1] @ after[-1].right.T)
        after, targets = after[::-1], targets[::-1]
        before, moved = factors(root), []
        seen = before.left.T
        for k, own in enumerate(layers):
            fresh = jax.random.fold_in(key, k)
            moved.append(draw_layer(fresh, before, own, after[k], seen @ targets[k], stiffness, localization))
            if k + 1 < len(layers):
                before = factors((before.values[:, None] * before.right) @ moved[-1])
                seen = before.left.T @ seen
        return GibbsState(tuple(moved)), None

    return SamplingAlgorithm(init, step)


def localization_of(weights: Sequence[np.ndarray]) -> float:
    """The calibration's rule where no step size limits it: a flat direction moves a weight by REACH typical weights."""
    mean_square = sum(float(np.sum(w.astype(np.float64) ** 2)) for w in weights) / sum(w.size for w in weights)
    return REACH**-2 / mean_square
