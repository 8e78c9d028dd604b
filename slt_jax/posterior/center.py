"""Is a center only weights, and each of them once? Models, training states, running statistics and ties are refused."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from slt_jax.posterior.tree import path_of

_STATE = (nnx.BatchStat, nnx.Cache)  # variables that a forward pass changes
_OF_TORCH = ("running_mean", "running_var")  # the last part of their names
_NORM = ("mean", "var", "scale", "bias")  # the variables of a batch normalization, by their names
_COLLECTIONS = ("batch_stats", "cache", "intermediates")  # of Linen


def check_kind(center: PyTree) -> None:
    """Raise TypeError for a Flax NNX model, whose tied weights are leaves of their own, or a training state."""
    if hasattr(center, "params") and hasattr(center, "opt_state"):
        raise TypeError(
            f"center is a {type(center).__name__}, which holds the optimizer's state too. Pass state.params."
        )
    nodes = jax.tree_util.tree_flatten_with_path(center, is_leaf=lambda x: isinstance(x, nnx.Module))[0]
    for path, node in nodes:
        if isinstance(node, nnx.Module):
            where = f"'{'/'.join(path_of(path))}' of center" if path else "center"
            raise TypeError(
                f"{where} is a Flax model, {type(node).__name__}: its tied weights would be sampled twice and its "
                "statistics as weights. Use params, loss_fn = slt_jax.from_nnx(model, loss), and center=params."
            )


def check_state(center: PyTree, free: Sequence[bool]) -> None:
    """Raise ValueError where a running statistic would be sampled. ``free``: whether any entry moves, of each leaf."""
    variables = jax.tree_util.tree_flatten_with_path(center, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    kinds = [kind for _, x in variables for kind in [type(x)] * len(jax.tree.leaves(x))]
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(center)[0]]
    linen = any(path[0] == "params" for path in paths if path)
    for path, kind, moves in zip(paths, kinds, free, strict=True):
        collection = path[0] if linen and path[0] in _COLLECTIONS else None
        of_torch = bool(path) and path[-1].split(".")[-1] in _OF_TORCH
        if moves and (of_torch or collection or path[:1] == ("batch_stats",) or issubclass(kind, _STATE)):
            what = "a running statistic" if of_torch else f"a variable of '{path[0]}'"
            what = f"an nnx.{kind.__name__}" if issubclass(kind, _STATE) else what
            raise ValueError(
                f"'{'/'.join(path)}' of center is {what}, not a weight, and would be sampled. Use "
                "slt_jax.from_nnx(model, loss) or slt_jax.from_linen(module, variables, loss), which freeze it, or "
                "freeze it by the mask."
            )
    _check_pure_dict(center, paths, free)


def _check_pure_dict(center: PyTree, paths: Sequence[tuple[str, ...]], free: Sequence[bool]) -> None:
    """Refuse a batch normalization's state as a plain dict: mean and var beside scale or bias, all of one shape."""
    shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}  # by the path of the dict and the name in it
    moving = set()
    for path, leaf, moves in zip(paths, jax.tree.leaves(center), free, strict=True):
        *where, name = path[:-1] if path[-1:] == ("value",) else path or ("",)
        if name in _NORM:
            shapes.setdefault(tuple(where), {})[name] = np.shape(leaf)
            moving |= {(*where, name)} if moves else set()
    for where, found in shapes.items():
        both, sampled = {"mean", "var"} <= found.keys(), moving & {(*where, "mean"), (*where, "var")}
        if both and sampled and len(found) > 2 and len(set(found.values())) == 1:
            beside = " and ".join(f"'{name}'" for name in found if name != min(sampled)[-1])
            raise ValueError(
                f"'{'/'.join(min(sampled))}' of center, beside {beside} of the same shape, is a statistic of a batch "
                "normalization, not a weight, and would be sampled. Use slt_jax.from_nnx(model, loss), which freezes "
                "it, or freeze it by the mask. If it is a weight, give it another name."
            )


def check_ties(names: Sequence[str], leaves: Sequence[Any], free: Sequence[bool]) -> None:
    """Raise ValueError where two leaves that move are one array: the same object, or the same memory."""
    seen: dict[Any, str] = {}
    for name, leaf, moves in zip(names, leaves, free, strict=True):
        for mark in _marks(leaf) if moves else ():
            if mark in seen:
                raise ValueError(
                    f"'{seen[mark]}' and '{name}' of center are one array: tied weights would be sampled twice. Keep "
                    "it under one name and use it twice in loss_fn (slt_jax.from_nnx does that for a Flax model); if "
                    "the two are separate weights, copy one: jnp.array(x)."
                )
        seen |= dict.fromkeys(_marks(leaf) if moves else (), name)


def _marks(leaf: Any) -> tuple[Any, ...]:
    """Of the object, and of its memory where that is known; none of a shape without an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return ()
    if isinstance(leaf, np.ndarray) and leaf.size:
        return id(leaf), (leaf.__array_interface__["data"][0], leaf.nbytes)
    if isinstance(leaf, jax.Array) and leaf.size and leaf.is_fully_addressable:
        first = leaf.addressable_shards[0]
        if len(leaf.addressable_shards) == 1:
            return id(leaf), (str(first.device), first.data.unsafe_buffer_pointer())
    return (id(leaf),)
