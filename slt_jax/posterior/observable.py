"""What is read of fixed examples at every draw: their losses, those of their tokens, or another function of them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from slt_jax._checks import shown
from slt_jax.posterior.data import ArrayData, Source, check_same_structure, held_data
from slt_jax.posterior.program import TOKEN_LOSSES, Frozen, LossProgram, Position, brief, say_first, say_where

LEVELS, KEPT = ("example", "token", "custom"), ("auto", "values", "moments")


@dataclass(frozen=True, eq=False, repr=False)
class Observable:
    """A function of the weights and of fixed examples, evaluated at every draw of ``estimate_llc(observe=...)``.

    Args:
        data: the examples, of the same kinds as the data of ``estimate_llc``; held in memory.
        fn: ``fn(params, batch)`` returns an array with one row for each example of the batch, of any shape behind it;
            or a pair of such an array and a boolean one that is true where the values count. ``params`` is the complete
            pytree of parameters, as ``loss_fn`` gets it. Default: the posterior's own loss.
        level: ``"example"``: losses of examples, nats, shape ``(example,)``. ``"token"``: losses of single tokens,
            nats, shape ``(example, token)``; without ``fn`` the posterior's loss must have a per-token version, as
            those of ``next_token_loss`` and ``slt_jax.models`` have. ``"custom"``: anything else. Default:
            ``"example"``, and ``"custom"`` with ``fn``.
        keep: ``"values"``: the values at every draw. ``"moments"``: only mean, variance and covariance with the run's
            own loss, over 8 blocks of each chain's draws. ``"auto"``: values, unless those of all observables take more
            than 1 GiB.
        path: folder of a zarr group into which the values are written during the run, instead of into memory.

    Raises:
        TypeError, ValueError: an argument cannot be used. The message has its name, its value, and what to do.
    """

    data: Any
    fn: Callable[[PyTree, PyTree], Any] | None = None
    level: str | None = None
    keep: str = "auto"
    path: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        if self.fn is not None:
            if not callable(self.fn):
                raise TypeError(f"fn must be a function fn(params, batch), got {brief(self.fn)}.")
            try:
                hash(self.fn)
            except TypeError as error:
                raise TypeError(f"fn must be hashable ({error}). Wrap it: lambda p, batch: f(p, batch).") from None
        if self.level is None:
            object.__setattr__(self, "level", "example" if self.fn is None else "custom")
        for name, value, known in (("level", self.level, LEVELS), ("keep", self.keep, KEPT)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}.")
        if self.level == "custom" and self.fn is None:
            raise ValueError("level='custom' needs a function: give fn(params, batch), or level='example' for losses.")
        if self.path is not None and not isinstance(self.path, str | os.PathLike):
            raise TypeError(f"path must name a folder, got {shown(self.path)}.")
        if self.path is not None and self.keep == "moments":
            raise ValueError("path is where values are written, and keep='moments' keeps none. Leave one of them out.")

    def __repr__(self) -> str:
        what = "loss_fn" if self.fn is None else getattr(self.fn, "__name__", type(self.fn).__name__)
        place = "" if self.path is None else f", in {os.fspath(self.path)}"
        return f"<Observable: {what} at level {self.level!r}, keep {self.keep!r}{place}>"


def checked_observables(observe: Mapping[str, Any] | None, source: Source) -> dict[str, tuple[Observable, ArrayData]]:
    """name -> (observable, its examples in memory), of ``estimate_llc``'s ``observe``.

    Raises TypeError and ValueError that name the observable; ``source``: the run's own data.
    """
    if observe is None:
        return {}
    if not isinstance(observe, Mapping) or not all(isinstance(name, str) and name for name in observe):
        raise TypeError(
            f"observe must be a dict of names and data sets or Observables, got {shown(observe)}. Write "
            "observe={'held-out': data}."
        )
    found = {}
    for name, given in observe.items():
        if "/" in name or name.startswith("."):
            raise ValueError(f"the name {name!r} in observe names a file: leave out '/', and a '.' at its beginning.")
        observable = given if isinstance(given, Observable) else Observable(given)
        data = held_data(f"observe['{name}']", name, observable.data)
        if observable.fn is None:
            check_same_structure(f"observe['{name}']", data, source)
        found[name] = (observable, data)
    return found


@dataclass(frozen=True)
class Evaluation:
    """An observable as a function of the free weights: the part that a compiled program depends on.

    It is hashable and contains no arrays. ``fn``: of the parameters and a batch; None for the loss of each example.
    """

    name: str
    program: LossProgram
    fn: Callable[[PyTree, PyTree], Any] | None

    def __call__(self, position: Position, frozen: Frozen, batch: PyTree) -> Float32[Array, "row ..."]:
        """The values of a batch's rows; 0 where they do not count."""
        values, valid = self.with_mask(position, frozen, batch)
        return values if valid is None else jnp.where(valid, values, 0.0)

    def with_mask(self, position: Position, frozen: Frozen, batch: PyTree) -> tuple[Array, Array | None]:
        """(values, which of them count or None if all do).

        Raises ValueError and TypeError where ``fn`` returns something else than one row for each example.
        """
        if self.fn is None:
            try:
                return self._losses(position, frozen, batch).astype(jnp.float32), None
            except Exception as error:
                say_first(error, f"observe['{self.name}']")
                raise
        rows = jax.tree.leaves(batch)[0].shape[0]
        try:
            returned = self.fn(self.program.merge(position, frozen), batch)
        except Exception as error:
            say_where(error, batch, f"the function of observe['{self.name}']")
            raise
        values: Any = returned
        valid: Any = None
        if isinstance(returned, tuple) and len(returned) == 2:
            values, valid = returned
        shape = getattr(values, "shape", None)
        if not shape or shape[0] != rows:
            text = f"shape {shape}" if shape is not None else f"a {type(values).__name__}"
            raise ValueError(
                f"the function of observe['{self.name}'] must return an array with one row for each of the {rows} "
                f"examples of its batch; it returned {text}."
            )
        if not (jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)):
            raise TypeError(f"the function of observe['{self.name}'] must return real numbers, not {values.dtype}.")
        if valid is not None and (getattr(valid, "shape", None) != shape or valid.dtype != bool):
            raise ValueError(
                f"the function of observe['{self.name}'] must return a mask of booleans of the shape {shape} of its "
                f"values; it returned {getattr(valid, 'shape', type(valid).__name__)}."
            )
        return values.astype(jnp.float32), valid

    def _losses(self, position: Position, frozen: Frozen, batch: PyTree) -> Array:
        """Of each example, also of a loss that returns the mean over its batch."""
        losses = self.program.losses(position, frozen, batch)
        if losses.shape:
            return losses
        rows = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(lambda row: self.program.losses(position, frozen, row))(rows)


def evaluation_of(name: str, observable: Observable, program: LossProgram) -> Evaluation:
    """Raises ValueError where the loss has no per-token version, and one is needed."""
    if observable.fn is not None or observable.level != "token":
        return Evaluation(name, program, observable.fn)
    by_token = getattr(program.loss_fn, TOKEN_LOSSES, None)
    if by_token is None:
        raise ValueError(
            f"observe['{name}'] asks for the losses of tokens, and loss_fn has no per-token version. Give the "
            "Observable a function fn(params, batch) -> (example, token), or make loss_fn by from_nnx with "
            "next_token_loss or slt_jax.models.sequence_loss."
        )
    return Evaluation(name, program, by_token)
