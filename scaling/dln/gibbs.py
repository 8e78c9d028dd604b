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

from slt_jax.calibrate import REACH


class GibbsState(NamedTuple):
    position: tuple[jax.Array, ...]


def draw_layer(
    key: jax.Array,
    before: jax.Array,
    center: jax.Array,
    after: jax.Array,
    target: jax.Array,
    stiffness: float,
    localization: float,
) -> jax.Array:
    """One layer W from exp(-(stiffness / 2) |before W after - target|^2 - (localization / 2) |W - center|^2).

    Args:
        before: ``(a, h)``. after: ``(h', b)``. target: ``(a, b)``. center: ``(h, h')``.
    """
    u, s, vt = jnp.linalg.svd(before, full_matrices=before.shape[0] < before.shape[1])
    p, t, qt = jnp.linalg.svd(after, full_matrices=after.shape[0] > after.shape[1])
    missing = ((0, center.shape[0] - len(s)), (0, center.shape[1] - len(t)))
    gain = jnp.pad(s[:, None] * t, missing)
    image = jnp.pad(u.T @ target @ qt.T, missing)
    precision = stiffness * gain**2 + localization
    mean = (stiffness * gain * image + localization * (vt @ center @ p)) / precision
    drawn = mean + jax.random.normal(key, mean.shape, mean.dtype) / jnp.sqrt(precision)
    return vt.T @ drawn @ p.T


def gibbs(center: Sequence[jax.Array], root: jax.Array, nbeta: float, localization: float) -> Any:
    """A ``blackjax.SamplingAlgorithm`` for ``slt_jax.estimate_llc``, on the loss of ``teachers.loss_fn``.

    Args:
        center: the teacher's layers. root: R with R'R = X'X / n, ``(H_0, H_0)``.
    """
    from blackjax.base import SamplingAlgorithm  # its import runs JAX, which fixes the number of devices

    layers = tuple(jnp.asarray(w) for w in center)
    root = jnp.asarray(root, layers[0].dtype)
    target = root
    for layer in layers:
        target = target @ layer
    stiffness = 2 * nbeta / layers[-1].shape[1]

    def init(position, rng_key=None) -> GibbsState:
        return GibbsState(tuple(position))

    def step(key: jax.Array, state: GibbsState) -> tuple[GibbsState, None]:
        after = [jnp.eye(layers[-1].shape[1], dtype=root.dtype)]
        for layer in state.position[:0:-1]:
            after.insert(0, layer @ after[0])
        before, moved = root, []
        for k, own in enumerate(layers):
            fresh = jax.random.fold_in(key, k)
            moved.append(draw_layer(fresh, before, own, after[k], target, stiffness, localization))
            before = before @ moved[-1]
        return GibbsState(tuple(moved)), None

    return SamplingAlgorithm(init, step)


def localization_of(weights: Sequence[np.ndarray]) -> float:
    """The calibration's rule where no step size limits it: a flat direction moves a weight by REACH typical weights."""
    mean_square = sum(float(np.sum(w.astype(np.float64) ** 2)) for w in weights) / sum(w.size for w in weights)
    return REACH**-2 / mean_square
