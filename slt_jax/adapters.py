"""Flax models as (params, loss_fn), with everything random or running frozen. A bare pair needs none of this."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any
Forward = Callable[..., Any]
Loss = Callable[[Forward, PyTree], jax.Array]

_STILL_RANDOM = (
    "the model is still random: {why}. Sampling needs a loss that depends on the weights and the batch alone. "
    "Turn dropout off (model.eval(), or deterministic=True in the module's own configuration)."
)


def next_token_loss(forward: Forward, tokens: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of each sequence, nats per token.

    Args:
        forward: tokens ``(m, T)`` -> logits ``(m, T, vocabulary)``.
        tokens: whole numbers ``(m, T)``; an id outside the vocabulary makes its sequence's loss NaN.

    Returns:
        float32 ``(m,)``, the mean over the ``T - 1`` predicted tokens. One example is one sequence.
    """
    logits = forward(tokens)[:, :-1].astype(jnp.float32)
    targets = tokens[:, 1:, None]
    chosen = jnp.take_along_axis(logits, jnp.where(targets < 0, logits.shape[-1], targets), axis=-1, mode="fill")
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0], axis=-1)


def from_nnx(model: nnx.Module, loss: Loss) -> tuple[PyTree, Callable[[PyTree, PyTree], jax.Array]]:
    """A Flax NNX model as (params, loss_fn).

    Args:
        model: left as it is; a copy is put in evaluation mode.
        loss: ``loss(forward, batch)``, e.g. ``next_token_loss``; ``forward`` calls the model.

    Returns:
        ``params``: a nested dict of arrays, the model's ``nnx.Param`` variables. ``loss_fn(params, batch)``.

    Raises (when ``loss_fn`` is first traced):
        ValueError: the forward pass draws random numbers, or changes a variable such as a batch statistic.
    """
    copy = nnx.clone(model)
    copy.eval()
    graphdef, params, rest = nnx.split(copy, nnx.Param, ...)

    def loss_fn(weights: PyTree, batch: PyTree) -> jax.Array:
        state = nnx.State(jax.tree.map(lambda x: x, params))
        nnx.replace_by_pure_dict(state, weights)
        merged = nnx.merge(graphdef, state, rest, copy=True)
        before = dict(nnx.to_flat_state(nnx.state(merged, nnx.Not(nnx.Param))))
        identity = {path: variable.get_value() for path, variable in before.items()}
        value = loss(merged, batch)
        for path, variable in nnx.to_flat_state(nnx.state(merged, nnx.Not(nnx.Param))):
            if path not in identity or variable.get_value() is not identity[path]:
                name = "/".join(map(str, path))
                if issubclass(variable.type, nnx.RngState):
                    raise ValueError(_STILL_RANDOM.format(why=f"the forward pass used the random stream '{name}'"))
                raise ValueError(f"the forward pass changes '{name}' ({variable.type.__name__}). Freeze it: model.eval(), or use_running_average=True.")
        return value

    return nnx.to_pure_dict(params), loss_fn


def from_linen(module: nn.Module, variables: PyTree, loss: Loss) -> tuple[PyTree, Callable[[PyTree, PyTree], jax.Array]]:
    """A Flax Linen module and its variables as (params, loss_fn).

    Args:
        module: configured so that dropout is off and running averages are used.
        variables: what ``module.init`` or training gave; ``variables["params"]`` is sampled, the rest is frozen.
        loss: ``loss(forward, batch)``; ``forward(*args, **kwargs)`` is ``module.apply`` without random streams.

    Raises:
        ValueError: ``variables`` has no ``params``; or, when ``loss_fn`` is traced, the module is still random or wants
            to change a frozen collection.
    """
    if "params" not in variables:
        raise ValueError(f"variables must hold the collection 'params', got {sorted(variables)}.")
    frozen = {name: value for name, value in variables.items() if name != "params"}

    def loss_fn(weights: PyTree, batch: PyTree) -> jax.Array:
        def forward(*args, **kwargs):
            return module.apply({"params": weights, **frozen}, *args, mutable=False, **kwargs)

        from flax.errors import InvalidRngError, ModifyScopeVariableError

        try:
            return loss(forward, batch)
        except InvalidRngError as error:
            raise ValueError(_STILL_RANDOM.format(why=str(error).split(" (")[0])) from error
        except ModifyScopeVariableError as error:
            raise ValueError(f"the forward pass changes a frozen variable: {error}. Use running averages (use_running_average=True).") from error

    return variables["params"], loss_fn
