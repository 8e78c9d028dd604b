"""A control of what the form of the loss adds: the Gaussian posterior of the losses' second-order terms."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.program import TOKEN_LOSSES


def gaussian_control(posterior: LocalPosterior) -> LocalPosterior:
    """The posterior with the loss of each example replaced by its second-order expansion around w*::

        l_i(w*) + g_i' (w - w*) + (w - w*)' H_i (w - w*) / 2

    Its density is a Gaussian. What estimates, influences or susceptibilities read the same there as in the posterior
    itself follows from gradients and Hessians at w*, and what differs is from the form of the loss further away. Where
    the mean Hessian has an eigenvalue below -localization / nbeta there is no such Gaussian, and the chains diverge.

    A loss takes some three times as long. It is differentiated forward twice: losses with a derivative of their own
    that has no forward form (``jax.custom_vjp``) cannot be expanded. w* becomes a constant of the compiled program.

    Args:
        posterior: its ``loss_fn`` must be twice differentiable at w*.

    Returns:
        A posterior with the same center, numbers and mask. Its losses, also of single tokens, are the expanded ones.
    """
    return dataclasses.replace(posterior, loss_fn=_Expanded(posterior.loss_fn, posterior.center))


@dataclass(frozen=True, eq=False)
class _Expanded:
    fn: Callable[[PyTree, PyTree], Any]
    center: PyTree

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        return _second_order(lambda p: self.fn(p, batch), self.center, params)

    def __getattr__(self, name: str) -> Any:
        by_token = getattr(self.fn, TOKEN_LOSSES, None) if name == TOKEN_LOSSES else None
        if by_token is None:
            raise AttributeError(name)

        def expanded(params: PyTree, batch: PyTree) -> Any:
            found = jax.eval_shape(by_token, params, batch)
            if not isinstance(found, tuple):
                return _second_order(lambda p: by_token(p, batch), self.center, params)
            _, counts = by_token(self.center, batch)
            return _second_order(lambda p: by_token(p, batch)[0], self.center, params), counts

        return expanded


def _second_order(fn: Callable[[PyTree], jax.Array], center: PyTree, params: PyTree) -> jax.Array:
    """fn(center) and its first two derivatives towards ``params``, added up."""

    def at(t: jax.Array) -> jax.Array:
        return fn(jax.tree.map(lambda start, end: _between(start, end, t), center, params))

    def slope(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(at, (t,), (jnp.ones_like(t),))

    zero = jnp.zeros((), jnp.float32)
    (value, first), (_, second) = jax.jvp(slope, (zero,), (jnp.ones_like(zero),))
    return value + first + second / 2


def _between(start: Any, end: jax.Array, t: jax.Array) -> jax.Array:
    if not jnp.issubdtype(end.dtype, jnp.floating):
        return end
    begin = jnp.asarray(start, end.dtype)
    return begin + t.astype(end.dtype) * (end - begin)
