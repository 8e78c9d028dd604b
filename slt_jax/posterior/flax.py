"""Flax models as (params, loss_fn). Random streams and running statistics are frozen or refused.

``LocalPosterior`` takes any pair (params, loss_fn): a model that is written as such a pair needs nothing from here.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jaxtyping import Array, Float, Integer, PyTree

from slt_jax.posterior.outputs import OUTPUTS, parts_through
from slt_jax.posterior.program import TOKEN_LOSSES
from slt_jax.posterior.tree import path_of

Forward = Callable[..., Any]
Loss = Callable[[Forward, PyTree], Array]
Model = TypeVar("Model", bound=nnx.Module)
LossFn = Callable[[PyTree, PyTree], Array]
Variables = dict[tuple[Any, ...], Any]

_STILL_RANDOM = (
    "the model is still random: {why}. Sampling needs a loss that depends only on the weights and the batch. "
    "Turn dropout off (model.eval(), or deterministic=True in the module's own configuration)."
)


def next_token_loss(forward: Forward, tokens: Integer[Array, "batch length"]) -> Float[Array, " batch"]:
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
    return jnp.mean(_next_tokens(forward, tokens), axis=-1)


def _next_tokens(forward: Forward, tokens: Integer[Array, "batch length"]) -> Float[Array, "batch predicted"]:
    logits = forward(tokens)[:, :-1]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = tokens[:, 1:, None].astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, jnp.where(targets < 0, logits.shape[-1], targets), axis=-1, mode="fill")
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]


setattr(next_token_loss, TOKEN_LOSSES, _next_tokens)


def from_nnx(model: Model, loss: Callable[[Model, PyTree], Array]) -> tuple[PyTree, LossFn]:
    """A Flax NNX model as (params, loss_fn).

    Args:
        model: is not changed; a copy is put in evaluation mode.
        loss: ``loss(forward, batch)``, e.g. ``next_token_loss``; ``forward`` calls the model.

    Returns:
        ``params``: a nested dict of arrays, the model's ``nnx.Param`` variables. ``loss_fn(params, batch)``.

    Raises:
        TypeError: not a model and a function.
        ValueError: when ``loss_fn`` is first traced: the forward pass draws random numbers, or changes a variable such
            as a batch statistic. Sown intermediates are dropped.
    """
    if not isinstance(model, nnx.Module):
        order = " They are in the wrong order." if isinstance(loss, nnx.Module) else ""
        raise TypeError(f"from_nnx(model, loss) needs an nnx.Module first, got a {type(model).__name__}.{order}")
    if not callable(loss):
        raise TypeError(f"loss must be a function loss(model, batch), got a {type(loss).__name__}.")
    copy = nnx.clone(model)
    copy.eval()
    graphdef, params, rest = nnx.split(copy, nnx.Param, ...)
    other_values = nnx.to_pure_dict(rest)

    def run(loss: Any, weights: PyTree, others: PyTree, batch: PyTree) -> tuple[Any, Variables, Variables]:
        """The loss, and every other variable by path, before and after it."""
        merged = nnx.merge(graphdef, _with_values(params, weights), _with_values(rest, others), copy=True)
        before = _other_variables(merged)
        return loss(merged, batch), before, _other_variables(merged)

    def evaluate(loss: Any, weights: PyTree, batch: PyTree) -> Any:
        value, before, after = run(loss, weights, other_values, batch)
        changed = [i for i, (path, x) in enumerate(after.items()) if x is not before.get(path)]
        if changed:  # nnx.jit and nnx.remat write every variable back, changed or not
            written = lambda others: tuple(run(loss, weights, others, batch)[2].values())  # noqa: E731
            jaxpr = jax.make_jaxpr(written)(other_values).jaxpr
            changed = [i for i in changed if _copied_from(jaxpr, jaxpr.outvars[i]) is None]
        if changed:
            path = list(after)[changed[0]]
            kind = dict(nnx.to_flat_state(rest)).get(path)
            raise ValueError(_why("/".join(map(str, path)), None if kind is None else kind.type))
        return value

    return nnx.to_pure_dict(params), _with_versions(loss, evaluate)


def _with_versions(loss: Any, evaluate: Callable[[Any, PyTree, PyTree], Any]) -> LossFn:
    """``loss_fn``, by ``evaluate(loss, weights, batch)``; its two parts, and its per-token version if it has one."""

    def loss_fn(weights: PyTree, batch: PyTree) -> Array:
        return evaluate(loss, weights, batch)

    if (by_token := getattr(loss, TOKEN_LOSSES, None)) is not None:
        setattr(loss_fn, TOKEN_LOSSES, lambda weights, batch: evaluate(by_token, weights, batch))
    setattr(loss_fn, OUTPUTS, parts_through(loss, evaluate))
    return loss_fn


def params_like(checkpoint: Any, like: PyTree) -> PyTree:
    """The weights of a checkpoint in the structure of ``like``: of an ``nnx.State``, an NNX model, or a pytree.

    Where the names of the leaves are not those of ``like``, the weights as they are.

    Raises:
        ValueError: a state or model with running statistics, which the loss of ``like`` takes from another model.
    """
    if isinstance(like, nnx.State):
        return nnx.state(checkpoint) if isinstance(checkpoint, nnx.Module) else checkpoint
    if isinstance(checkpoint, nnx.Module):
        checkpoint = nnx.state(checkpoint)
    if isinstance(checkpoint, nnx.State):
        for path, variable in nnx.to_flat_state(checkpoint):
            if isinstance(variable, nnx.BatchStat):
                raise ValueError(
                    f"it holds the running statistic '{'/'.join(map(str, path))}', but the loss has those of the model "
                    "that from_nnx was given. Make one posterior for each checkpoint, each by from_nnx."
                )
        checkpoint = nnx.to_pure_dict(nnx.filter_state(checkpoint, nnx.Param))
    if jax.tree.structure(checkpoint) == jax.tree.structure(like):
        return checkpoint
    found = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(checkpoint)[0]}
    if found.keys() != {path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]}:
        return checkpoint
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_of(path)], like)


def _with_values(like: PyTree, values: PyTree) -> PyTree:
    values = nnx.to_pure_dict(values) if isinstance(values, nnx.State) else values
    state = jax.tree.map(lambda x: x, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def _other_variables(model: nnx.Module) -> Variables:
    kept = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))  # what is sown is read by nobody
    state = nnx.to_flat_state(nnx.state(model, kept))
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
        TypeError: not a module and its variables.
        ValueError: ``variables`` has no ``params``; or, when ``loss_fn`` is traced, the module is still random or
            changes a frozen collection.
    """
    if not isinstance(module, nn.Module) or not isinstance(variables, Mapping):
        raise TypeError(
            f"from_linen(module, variables, loss) needs an nn.Module and its variables, got a {type(module).__name__} "
            f"and a {type(variables).__name__}."
        )
    if "params" not in variables:
        raise ValueError(f"variables must hold the collection 'params', got {sorted(variables)}.")
    frozen = {name: value for name, value in variables.items() if name != "params"}

    def evaluate(loss: Any, weights: PyTree, batch: PyTree) -> Any:
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

    return variables["params"], _with_versions(loss, evaluate)
