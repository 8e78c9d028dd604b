"""A loss in two parts: the outputs of the model, and the loss as a function of them, for the Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from slt_jax.posterior.program import brief

OUTPUTS = "outputs_and_loss"  # attribute of a loss function: its two parts


class OutputLoss(NamedTuple):
    """``outputs(params, batch)``: the model's outputs, arrays. ``loss(outputs, batch)``: the losses ``(m,)`` or their
    mean.

    Of a ``loss(forward, batch)``, ``outputs`` takes ``forward`` in place of ``params``.
    """

    outputs: Callable[[Any, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree], Array]


def loss_of_outputs(
    outputs: Callable[[PyTree, PyTree], PyTree], loss: Callable[[PyTree, PyTree], Array]
) -> Callable[[PyTree, PyTree], Array]:
    """The loss function ``loss(outputs(params, batch), batch)``, which also has a Gauss-Newton matrix.

    Args:
        outputs: ``outputs(params, batch)``, what the model computes: logits or predictions, an array or a pytree of
            them. It should be the last function before a convex one, so that the matrix has no negative eigenvalues.
        loss: ``loss(outputs, batch)`` returns one loss per example, shape ``(m,)``, or their mean. It knows no weights.

    Raises:
        TypeError: not two functions.
    """
    for name, value in (("outputs", outputs), ("loss", loss)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {brief(value)}. Write loss_of_outputs(outputs, loss).")

    def loss_fn(params: PyTree, batch: PyTree) -> Array:
        return loss(outputs(params, batch), batch)

    setattr(loss_fn, OUTPUTS, OutputLoss(outputs, loss))
    return loss_fn


def parts_of(loss: Any) -> OutputLoss | None:
    """The two parts of a loss function, if it has them."""
    return getattr(loss, OUTPUTS, None)


def recorded(loss: Callable[[Callable[..., Any], PyTree], Array]) -> OutputLoss:
    """The parts of a ``loss(forward, batch)``: what ``forward`` returned at each call, and the loss with that in place
    of ``forward``.

    A loss that does more with a model than call it raises AttributeError, and one that calls it inside of ``jax.vmap``
    an error of JAX, both when they are traced.
    """

    def outputs(forward: Callable[..., Any], batch: PyTree) -> tuple[Any, ...]:
        returned: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            returned.append(forward(*args, **kwargs))
            return returned[-1]

        loss(call, batch)
        return tuple(returned)

    def of(returned: tuple[Any, ...], batch: PyTree) -> Array:
        rest = iter(returned)
        return loss(lambda *args, **kwargs: next(rest), batch)

    return OutputLoss(outputs, of)


def parts_through(
    loss: Callable[..., Array], evaluate: Callable[[Callable[..., Any], PyTree, PyTree], Any]
) -> OutputLoss:
    """The parts of ``lambda params, batch: evaluate(loss, params, batch)``, of a ``loss(forward, batch)``.

    Its own ones if it has any, else as ``recorded``.
    """
    parts = parts_of(loss) or recorded(loss)
    return OutputLoss(lambda params, batch: evaluate(parts.outputs, params, batch), parts.loss)
