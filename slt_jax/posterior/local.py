"""What is sampled: a trained point, the loss around it, and the weights that may move."""

import copy
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from slt_jax._checks import check_count, check_positive
from slt_jax.posterior.program import LossProgram, Mask, brief, check_forward, check_leaf, leaf_masks, names_of
from slt_jax.posterior.tree import path_of, tree_digest

PyTree = Any


@dataclass(frozen=True, eq=False)
class LocalPosterior:
    """The local tempered posterior around trained weights.

    Target density, over the weights that the mask leaves free::

        p(w) proportional to exp( -nbeta L_n(w) - (localization / 2) |w - center|^2 )

    with ``L_n(w)`` the mean of ``loss_fn`` over the data set (nats per example).

    Args:
        loss_fn: ``loss_fn(params, batch)`` gives one loss per example, shape ``(m,)``, or their mean, shape ``()``.
        center: w*, the trained parameters: a pytree of floating-point arrays.
        num_data: n, the size of the data set (not of a batch).
        nbeta: n times the inverse temperature; default ``num_data / log(num_data)``.
        localization: gamma, the strength of the pull to ``center``, per squared unit of weight. Without one the
            calibration of ``estimate_llc`` chooses: so that a flat direction moves a weight by at most a few typical
            weights, and a millionth of the largest curvature of nbeta L at least.
        mask: which weights move. A pytree of booleans shaped like ``center`` (one per leaf, or a boolean array of the
            leaf's shape), or a function of a leaf's path (a tuple of strings) that returns either. Default: all.
        forward_dtype: type in which ``loss_fn`` sees the weights, e.g. ``jnp.bfloat16``. The chains' own copy (the
            master) is float32 at least. Default: each leaf's own type.

    Raises:
        TypeError, ValueError: for a hyperparameter, a leaf or a mask that cannot be sampled; the text says which.

    Source: Lau, Furman, Wang, Murfet, Wei, arXiv:2308.12108.
    """

    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    center: PyTree
    num_data: int
    nbeta: float | None = None
    localization: float | None = None
    mask: Mask = None
    forward_dtype: Any = None

    def __post_init__(self):
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn must be a function loss_fn(params, batch), got {brief(self.loss_fn)}. It comes before center."
            )
        try:
            hash(self.loss_fn)
        except TypeError as error:
            raise TypeError(f"loss_fn must be hashable ({error}). Wrap it: lambda p, batch: f(p, batch).") from None
        check_count("num_data", self.num_data, 2, "It is the size of the data set, not of the batch.")
        if self.nbeta is None:
            object.__setattr__(self, "nbeta", self.num_data / math.log(self.num_data))
        self._check_numbers()
        self.program  # noqa: B018  (checks the center and the mask now, not at the first step)

    def with_numbers(self, *, nbeta: float, localization: float | None) -> "LocalPosterior":
        """The same with other numbers. Weights and mask are not looked at again. Raises TypeError, ValueError."""
        found = copy.copy(self)
        object.__setattr__(found, "nbeta", nbeta)
        object.__setattr__(found, "localization", localization)
        found._check_numbers()
        return found

    def _check_numbers(self) -> None:
        check_positive(
            "nbeta", self.nbeta, "The usual choice is num_data / log(num_data), with num_data the size of the data set."
        )
        if self.localization is not None:
            check_positive(
                "localization", self.localization, "It is gamma in (gamma/2)|w - w*|^2; 1 to 300 are common values."
            )
        for name, kind in {"num_data": int, "nbeta": float, "localization": float}.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    @cached_property
    def program(self) -> LossProgram:
        """The loss as a function of the free weights, without the weights."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(self.center)
        if not flat:
            raise ValueError("center has no arrays. Pass the trained parameters as a pytree of floating-point arrays.")
        masks = leaf_masks(self.mask, flat, treedef)
        leaves = [check_leaf("/".join(path_of(path)), leaf, m) for (path, leaf), m in zip(flat, masks, strict=True)]
        if not any(leaf.free for leaf in leaves):
            raise ValueError(
                f"the mask leaves no weight free: all {len(leaves)} leaves are frozen. "
                f"Check the mask against {names_of(leaves)}."
            )
        if self.mask is not None and all(leaf.free and not leaf.cut for leaf in leaves):
            raise ValueError(
                f"the mask restricts nothing: it is true for all of {names_of(leaves)}. "
                "Leave it out, or check the path it tests."
            )
        return LossProgram(self.loss_fn, treedef, tuple(leaves), check_forward(self.forward_dtype))

    @property
    def free_names(self) -> list[str]:
        """Path of each leaf that moves, in the order of ``program.split``'s first result."""
        return [leaf.name for leaf in self.program.leaves if leaf.free]

    @property
    def num_free(self) -> int:
        """d, the number of weights that move."""
        return sum(
            leaf.indices.size if leaf.cut else math.prod(leaf.shape) for leaf in self.program.leaves if leaf.free
        )

    def log_density(self, data: PyTree) -> Callable[[tuple[jax.Array, ...]], jax.Array]:
        """Position -> -nbeta L_n(w) - (localization / 2) |w - w*|^2 over all of ``data``: for BlackJAX's algorithms.

        A position is a tuple of the free weights, as from ``program.split(center)[0]``. Raises ValueError without a
        localization.
        """
        if self.localization is None:
            raise ValueError("log_density needs a localization: give one to LocalPosterior, e.g. localization=1.0.")
        center, frozen = self.program.split(self.center)
        nbeta, localization = float(self.nbeta or 0), self.localization

        def at(position: tuple[jax.Array, ...]) -> jax.Array:
            away = sum(jnp.sum((w - c) ** 2) for w, c in zip(position, center, strict=True))
            return -nbeta * self.program.mean_loss(position, frozen, data) - 0.5 * localization * away

        return at

    def fingerprint(self, batch: PyTree) -> dict[str, Any]:
        """Everything of the posterior that a result depends on; ``batch`` gives shapes only."""
        position, frozen = jax.eval_shape(self.program.split, self.center)
        # With its gradient: a custom derivative is not in the forward program.
        closed = jax.make_jaxpr(jax.value_and_grad(self.program.mean_loss))(position, frozen, batch)
        program = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "0x", str(closed.jaxpr)).encode())
        _digest_constants(program, closed)
        forward = self.program.forward_dtype
        return {
            "num_data": self.num_data,
            "nbeta": self.nbeta,
            "localization": self.localization,
            "forward_dtype": None if forward is None else forward.name,
            "mask": hashlib.sha256(repr([leaf.entries for leaf in self.program.leaves]).encode()).hexdigest(),
            "center": tree_digest(self.center),
            "loss_fn": program.hexdigest(),
        }


def _digest_constants(digest: Any, value: Any) -> None:
    """Bytes of all arrays in a jaxpr, also inside nested jits, whose text abbreviates them."""
    if isinstance(value, ClosedJaxpr | Jaxpr):  # from JAX 0.11 on one type
        _digest_constants(digest, list(getattr(value, "consts", ())))
        for equation in value.eqns:
            _digest_constants(digest, [v.val for v in equation.invars if isinstance(v, Literal)])
            _digest_constants(digest, list(equation.params.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _digest_constants(digest, item)
    elif isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "__array__"):
        digest.update(tree_digest(value).encode())
