"""A digest of a loss: of its program with its gradient, and of the constants inside."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from slt_jax.posterior.program import LossProgram
from slt_jax.posterior.tree import tree_digest


def loss_digest(program: LossProgram, center: PyTree, batch: PyTree) -> str:
    """SHA-256 of the jaxpr of the mean loss and its gradient. Of ``center`` and ``batch`` only shapes and types matter.

    The gradient is part of it, since a custom derivative does not appear in the forward program.
    """
    position, frozen = jax.eval_shape(program.split, center)
    return program_digest(jax.value_and_grad(program.mean_loss), position, frozen, batch)


def program_digest(function: Callable[..., Any], *arguments: PyTree) -> str:
    """SHA-256 of the jaxpr of a function. Of the arguments only shapes and types matter."""
    closed = jax.make_jaxpr(function)(*arguments)
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "0x", str(closed.jaxpr)).encode())
    _digest_constants(digest, closed)
    return digest.hexdigest()


def _digest_constants(digest: Any, value: Any) -> None:
    """Add the bytes of all arrays in a jaxpr, also inside nested jits: its text abbreviates them."""
    if isinstance(value, ClosedJaxpr | Jaxpr):  # one type from JAX 0.11 on
        _digest_constants(digest, list(getattr(value, "consts", ())))
        for equation in value.eqns:
            _digest_constants(digest, [v.val for v in equation.invars if isinstance(v, Literal)])
            _digest_constants(digest, list(equation.params.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _digest_constants(digest, item)
    elif isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "__array__"):
        digest.update(tree_digest(value).encode())
