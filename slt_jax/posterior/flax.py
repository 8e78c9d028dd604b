"""Flax models as (params, loss_fn), with everything random or running frozen. A bare pair needs none of this."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError

PyTree = Any
Forward = Callable[..., Any]
Loss = Callable[[Forward, PyTree], jax.Array]
Model = TypeVar("Model", bound=nnx.Module)
LossFn = Callable[[PyTree, PyTree], jax.Array]

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

    Raises:
        ValueError: ``tokens`` is not whole numbers of shape ``(m, T)`` with ``T >= 2``.
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


def from_nnx(model: Model, loss: Callable[[Model, PyTree], jax.Array]) -> tuple[PyTree, LossFn]:
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
    held = nnx.to_pure_dict(rest)

    def run(weights: PyTree, held: PyTree, batch: PyTree) -> tuple[jax.Array, dict, dict]:
        """The loss, and every other variable by path, before and after it."""
        merged = nnx.merge(graphdef, _filled(params, weights), _filled(rest, held), copy=True)
        before = _other_variables(merged)
        return loss(merged, batch), before, _other_variables(merged)

    def loss_fn(weights: PyTree, batch: PyTree) -> jax.Array:
        value, before, after = run(weights, held, batch)
        changed = [i for i, (path, x) in enumerate(after.items()) if x is not before.get(path)]
        if changed:  # nnx.jit and nnx.remat write every variable back, the same or not
            jaxpr = jax.make_jaxpr(lambda h: tuple(run(weights, h, batch)[2].values()))(held).jaxpr
            changed = [i for i in changed if _copied_from(jaxpr, jaxpr.outvars[i]) is None]
        if changed:
            path = list(after)[changed[0]]
            kind = dict(nnx.to_flat_state(rest)).get(path)
            raise ValueError(_why("/".join(map(str, path)), None if kind is None else kind.type))
        return value

    return nnx.to_pure_dict(params), loss_fn


def _filled(like: nnx.State, values: PyTree) -> nnx.State:
    state = jax.tree.map(lambda x: x, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def _other_variables(model: nnx.Module) -> dict[tuple, jax.Array]:
    found = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
    return {path: variable.get_value() for path, variable in found}


def _copied_from(jaxpr: Any, var: Any) -> int | None:
    """Which input of ``jaxpr`` the output ``var`` is, looking into jit and remat; None if it is computed."""
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
