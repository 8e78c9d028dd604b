"""What is sampled: a trained point, the loss around it, and the weights that may move."""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from slt_jax._checks import check_count, check_not_traced, check_positive
from slt_jax.posterior.center import check_kind, check_state, check_ties
from slt_jax.posterior.fingerprint import loss_digest
from slt_jax.posterior.program import (
    LossProgram,
    Mask,
    Position,
    brief,
    check_forward,
    check_leaf,
    leaf_masks,
    names_of,
)
from slt_jax.posterior.tree import check_pytree, path_of, tree_digest, without_torch

_DEFAULT_NBETA: Any = None  # num_data / log(num_data)
if TYPE_CHECKING:
    _Nbeta = float  # what it is once the posterior is made
else:
    _Nbeta = float | None  # what may be given


@dataclass(frozen=True, eq=False, repr=False)
class LocalPosterior:
    """The posterior around trained weights w* that is sampled: loss function, w*, temperature and localization.

    It is tempered (nbeta may differ from n) and local (it is concentrated around w*). Its density, as a function of the
    weights that ``mask`` selects::

        p(w) proportional to exp( -nbeta L_n(w) - (localization / 2) |w - center|^2 )

    with ``L_n(w)`` the mean of ``loss_fn`` over the data set (nats per example).

    Args:
        loss_fn: ``loss_fn(params, batch)`` returns one loss per example, shape ``(m,)``, or their mean, shape ``()``.
        center: w*, the trained parameters: a pytree of floating-point arrays, each under one name. Of a Flax model
            take ``from_nnx`` or ``from_linen``. For ``plan`` alone: their shapes, as ``jax.ShapeDtypeStruct``.
        num_data: n, the number of examples in the data set (not in a minibatch).
        nbeta: n times the inverse temperature. Default: ``num_data / log(num_data)``. 0 is a control, with a
            localization: the draws are those of the localization's Gaussian around w*, and the LLC is 0.
        localization: gamma, the strength of the pull towards ``center``, in units of 1 / weight^2. Default: chosen by
            the calibration of ``estimate_llc``, so strong that in a flat direction a weight moves by at most 2.5 times
            the typical size of a weight, and at least a millionth of the largest curvature of nbeta L.
        mask: selects the weights that are sampled; all others stay at w*. A pytree like ``center`` with a boolean for
            each array, or a boolean array of its shape; or a function that returns either, given the path of an array
            (a tuple of strings). Default: all weights.
        forward_dtype: type to which the weights are converted before they are passed to ``loss_fn``, e.g.
            ``jnp.bfloat16``. The chains themselves keep at least float32. Default: the type of each array in
            ``center``.
        chance_loss: the loss of a model that has learned nothing, in nats per example: log(number of classes) for a
            cross-entropy. Draws around it say nothing of the model, and the verdict then says so. Default: not known.

    Raises:
        TypeError, ValueError: a number, an array or the mask cannot be used. The message names it.

    Source: Lau, Furman, Wang, Murfet, Wei, arXiv:2308.12108.
    """

    loss_fn: Callable[[PyTree, PyTree], Array]
    center: PyTree
    num_data: int
    nbeta: _Nbeta = _DEFAULT_NBETA
    localization: float | None = None
    mask: Mask = None
    forward_dtype: Any = None
    chance_loss: float | None = None

    def __post_init__(self):
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn must be a function loss_fn(params, batch), got {brief(self.loss_fn)}. It comes before center."
            )
        check_not_traced("LocalPosterior", self.center)
        check_pytree("center", self.center)
        check_pytree("mask", self.mask)
        try:
            hash(self.loss_fn)
        except TypeError as error:
            raise TypeError(f"loss_fn must be hashable ({error}). Wrap it: lambda p, batch: f(p, batch).") from None
        check_count("num_data", self.num_data, 2, "It is the size of the data set, not of the batch.", 2**63 - 1)
        if self.nbeta is None:
            object.__setattr__(self, "nbeta", self.num_data / math.log(self.num_data))
        self._check_numbers()
        object.__setattr__(self, "center", without_torch(self.center))
        self.program  # noqa: B018  (checks the center and the mask now, not at the first step)

    def with_numbers(self, *, nbeta: float, localization: float | None) -> "LocalPosterior":
        """The same posterior with another ``nbeta`` and ``localization``; weights and mask are not checked again.

        Raises:
            TypeError, ValueError: a number that cannot be used.
        """
        changed = copy.copy(self)
        object.__setattr__(changed, "nbeta", nbeta)
        object.__setattr__(changed, "localization", localization)
        changed._check_numbers()
        return changed

    def _check_numbers(self) -> None:
        usual = "The usual choice is num_data / log(num_data), with num_data the size of the data set."
        check_positive("nbeta", self.nbeta, usual, zero=True)
        if self.nbeta == 0 and self.localization is None:
            raise ValueError(
                "nbeta = 0 leaves the localization alone to hold the draws, so it must be given: localization=100.0. "
                f"{usual}"
            )
        if self.localization is not None:
            check_positive(
                "localization", self.localization, "It is gamma in (gamma/2)|w - w*|^2; 1 to 300 are common values."
            )
        if self.chance_loss is not None:
            check_positive("chance_loss", self.chance_loss, "It is log(number of classes) for a cross-entropy.")
        kinds = {"num_data": int, "nbeta": float, "localization": float, "chance_loss": float}
        for name, kind in kinds.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    @cached_property
    def program(self) -> LossProgram:
        """The loss as a function of the free weights, without the arrays themselves."""
        check_kind(self.center)
        flat, treedef = jax.tree_util.tree_flatten_with_path(self.center)
        if not flat:
            raise ValueError("center has no arrays. Pass the trained parameters as a pytree of floating-point arrays.")
        masks = leaf_masks(self.mask, flat, treedef)
        leaves = [check_leaf("/".join(path_of(path)), leaf, m) for (path, leaf), m in zip(flat, masks, strict=True)]
        if not any(math.prod(leaf.shape) for leaf in leaves):
            raise ValueError(f"center has no weights: {names_of(leaves)} have no entries. Pass the trained parameters.")
        if not any(leaf.free for leaf in leaves):
            raise ValueError(
                f"the mask leaves no weight free: all {len(leaves)} leaves are frozen. "
                f"Check the mask against {names_of(leaves)}."
            )
        if self.mask is not None and all(leaf.free and not leaf.partial for leaf in leaves):
            raise ValueError(
                f"the mask restricts nothing: it is true for all of {names_of(leaves)}. "
                "Leave it out, or check the path it tests."
            )
        free = [leaf.free for leaf in leaves]
        check_state(self.center, free)
        check_ties([leaf.name for leaf in leaves], [value for _, value in flat], free)
        return LossProgram(self.loss_fn, treedef, tuple(leaves), check_forward(self.forward_dtype))

    def __repr__(self) -> str:
        try:
            free, total = self.num_free, sum(math.prod(leaf.shape) for leaf in self.program.leaves)
            weights = f"{free:,} weights" if free == total else f"{free:,} of {total:,} weights"
        except (TypeError, ValueError):  # a center or a mask that an estimate will refuse
            weights = "weights that cannot be sampled"
        gamma = "localization open" if self.localization is None else f"localization {self.localization:.4g}"
        name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        return f"<LocalPosterior: {weights}, loss {name}, num_data {self.num_data:,}, nbeta {self.nbeta:.4g}, {gamma}>"

    @property
    def is_described(self) -> bool:
        """Whether ``center`` has shapes (``jax.ShapeDtypeStruct``) in the place of arrays; only ``plan`` takes such."""
        return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.center))

    @property
    def free_names(self) -> list[str]:
        """Path of each leaf that moves, in the order of a position, the first result of ``program.split``."""
        return [leaf.name for leaf in self.program.leaves if leaf.free]

    @property
    def num_free(self) -> int:
        """d, the number of weights that move."""
        return sum(
            leaf.indices.size if leaf.partial else math.prod(leaf.shape) for leaf in self.program.leaves if leaf.free
        )

    def log_density(self, data: PyTree) -> Callable[[Position], Float[Array, ""]]:
        """The function ``position -> -nbeta L_n(w) - (localization / 2) |w - w*|^2``, for BlackJAX's algorithms.

        Args:
            data: the complete data set, one row per example in every leaf.

        Returns:
            A function of a position, the tuple of the free weights, as in ``program.split(center)[0]``.

        Raises:
            ValueError: the posterior has no localization.
        """
        if self.localization is None:
            raise ValueError("log_density needs a localization: give one to LocalPosterior, e.g. localization=1.0.")
        center, frozen = self.program.split(self.center)
        nbeta, localization = self.nbeta, self.localization

        def log_density(position: Position) -> Float[Array, ""]:
            distance_sq = sum(jnp.sum((w - c) ** 2) for w, c in zip(position, center, strict=True))
            return -nbeta * self.program.mean_loss(position, frozen, data) - 0.5 * localization * distance_sq

        return log_density

    def fingerprint(self, batch: PyTree) -> dict[str, Any]:
        """Everything in the posterior that a result depends on. Of ``batch`` only shapes and types matter."""
        forward = self.program.forward_dtype
        return {
            "num_data": self.num_data,
            "nbeta": self.nbeta,
            "localization": self.localization,
            "forward_dtype": None if forward is None else forward.name,
            "mask": hashlib.sha256(repr([leaf.entries for leaf in self.program.leaves]).encode()).hexdigest(),
            "center": tree_digest(self.center),
            "loss_fn": loss_digest(self.program, self.center, batch),
        }
