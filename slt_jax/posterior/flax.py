"""Flax models as (params, loss_fn). Random streams and running statistics are frozen or refused.

``LocalPosterior`` takes any pair (params, loss_fn): a model that is written as such a pair needs nothing from here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jaxtyping import Array, Float32, Integer, PyTree

Forward = Callable[..., Any]
Loss = Callable[[Forward, PyTree], Array]
Model = TypeVar("Model", bound=nnx.Module)
LossFn = Callable[[PyTree, PyTree], Array]
Variables = dict[tuple[Any, ...], Any]

_STILL_RANDOM = (
    "the model is still random: {why}. Sampling needs a loss that depends only on the weights and the batch. "
    "Turn dropout off (model.eval(), or deterministic=True in the module's own configuration)."
)


def next_token_loss(forward: Forward, tokens: Integer[Array, "batch length"]) -> Float32[Array, " batch"]:
    """Mean next-token cross-entropy of each sequence, nats per token. One example is one sequence.

    Args:
        forward: tokens ``(batch, length)`` -> logits ``(batch, length, vocabulary)``.
        tokens: token ids. An id outside the vocabulary makes the loss of its sequence NaN.

    Returns:
        The mean over the ``length - 1`` predicted tokens.

    Raises:
        ValueError: ``tokens`` are not integers of shape ``(batch, length)`` with ``length >= 2``.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be whole numbers of shape (m, T) with T >= 2, got shape {tokens.shape} of {tokens.dtype}. "
            f"One row is one sequence."
        )
    logits = forward(tokens)[:, :-1].astype(jnp.float32)
    targets = tokens[:, 1:, None].astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, jnp.where(targets < 0, logits.shape[-1], targets), axis=-1, mode="fill")
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0], axis=-1)


def from_nnx(model: Model, loss: Callable[[Model, PyTree], Array]) -> tuple[PyTree, LossFn]:
    """A Flax NNX model as (params, loss_fn).

    Args:
        model: is not changed; a copy is put in evaluation mode.
        loss: ``loss(forward, batch)``, e.g. ``next_token_loss``; ``forward`` calls the model.

    Returns:
        ``params``: a nested dict of arrays, the model's ``nnx.Param`` variables. ``loss_fn(params, batch)``.

    Raises (when ``loss_fn`` is first traced):
        ValueError: the forward pass draws random numbers, or changes a variable such as a batch statistic.
    """
    copy = nnx.clone(model)
    copy.eval()
    graphdef, params, rest = nnx.split(copy, nnx.Param, ...)
    other_values = nnx.to_pure_dict(rest)

    def run(weights: PyTree, others: PyTree, batch: PyTree) -> tuple[Array, Variables, Variables]:
        """The loss, and every other variable by path, before and after it."""
        merged = nnx.merge(graphdef, _with_values(params, weights), _with_values(rest, others), copy=True)
        before = _other_variables(merged)
        return loss(merged, batch), before, _other_variables(merged)

    def loss_fn(weights: PyTree, batch: PyTree) -> Array:
        value, before, after = run(weights, other_values, batch)
        changed = [i for i, (path, x) in enumerate(after.items()) if x is not before.get(path)]
        if changed:  # nnx.jit and nnx.remat write every variable back, changed or not
            jaxpr = jax.make_jaxpr(lambda others: tuple(run(weights, others, batch)[2].values()))(other_values).jaxpr
            changed = [i for i in changed if _copied_from(jaxpr, jaxpr.outvars[i]) is None]
        if changed:
            path = list(after)[changed[0]]
            kind = dict(nnx.to_flat_state(rest)).get(path)
            raise ValueError(_why("/".join(map(str, path)), None if kind is None else kind.type))
        return value

    return nnx.to_pure_dict(params), loss_fn


def _with_values(like: PyTree, values: PyTree) -> PyTree:
    state = jax.tree.map(lambda x: x, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def _other_variables(model: nnx.Module) -> Variables:
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
    return {path: variable.get_value() for path, variable in state}


def _copied_from(jaxpr: Any, var: Any) -> int | None:
    """The index of the input of ``jaxpr`` that the output ``var`` is a copy of, also through jit and remat.

    None if it is computed.
    """
    while var not in (inputs := list(jaxpr.invars)):
        eqn = next((e for e in jaxpr.eqns if var in list(e.outvars)), None)
        if eqn is None or eqn.primitive.name not in ("jit", "pjit", "remat2", "checkpoint"):
            return None
        inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
        position = _copied_from(inner, inner.outvars[list(eqn.outvars).index(var)])
        if position is None:
            return None
        var = eqn.invars[position]
    return inputs.index(var)


def _why(name: str, kind: type | None) -> str:
    if kind is not None and issubclass(kind, nnx.RngState):
        return _STILL_RANDOM.format(why=f"the forward pass used the random stream '{name}'")
    label = "new" if kind is None else kind.__name__
    return f"the forward pass changes '{name}' ({label}). Freeze it: model.eval(), or use_running_average=True."


def from_linen(module: nn.Module, variables: PyTree, loss: Loss) -> tuple[PyTree, LossFn]:
    """A Flax Linen module and its variables as (params, loss_fn).

    Args:
        module: configured so that dropout is off and running averages are used.
        variables: from ``module.init`` or training; ``variables["params"]`` is sampled, the rest is frozen.
        loss: ``loss(forward, batch)``; ``forward(*args, **kwargs)`` is ``module.apply`` without random streams.

    Raises:
        ValueError: ``variables`` has no ``params``; or, when ``loss_fn`` is traced, the module is still random or
            changes a frozen collection.
    """
    if "params" not in variables:
        raise ValueError(f"variables must hold the collection 'params', got {sorted(variables)}.")
    frozen = {name: value for name, value in variables.items() if name != "params"}

    def loss_fn(weights: PyTree, batch: PyTree) -> Array:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return module.apply({"params": weights, **frozen}, *args, mutable=False, **kwargs)

        try:
            return loss(forward, batch)
        except InvalidRngError as error:
            raise ValueError(_STILL_RANDOM.format(why=str(error).split(" (")[0])) from error
        except ModifyScopeVariableError as error:
            raise ValueError(
                f"the forward pass changes a frozen variable: {error} Use running averages (use_running_average=True)."
            ) from error

    return variables["params"], loss_fn
