"""Floating-point operations of a program, counted in its jaxpr.

XLA's own count (``cost_analysis``) takes the body of a loop once. Here a scan, such as that over a decoder's blocks,
counts as often as it runs.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

_MOVES = {
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "dynamic_update_slice", "gather",
    "concatenate", "pad", "rev", "iota", "copy", "convert_element_type", "bitcast_convert_type", "select_n",
    "stop_gradient", "sharding_constraint", "split",
}  # fmt: skip


@dataclass(frozen=True)
class Operations:
    """``products``: in products of matrices, and convolutions, by the type of what is multiplied; a product and a sum
    are two operations. ``others``: results of elementwise arithmetic and terms of sums, on numbers of any type.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    others: float = 0.0

    @property
    def total(self) -> float:
        """Of the products, whatever their type."""
        return sum(self.products.values())

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(dict(Counter(self.products) + Counter(other.products)), self.others + other.others)

    def times(self, number: float) -> "Operations":
        """Of so many runs."""
        return Operations({kind: number * count for kind, count in self.products.items()}, number * self.others)

    def seconds(self, peak: Callable[[str], float]) -> float:
        """At ``peak(type)`` operations per second in products of that type; the others take none."""
        return sum(count / peak(kind) for kind, count in self.products.items())


def operations_of(fn: Callable[..., Any], *arguments: Any) -> Operations:
    """Of one call, on arrays or shapes. Of a branch the larger side counts; the body of a ``while`` counts once."""
    return _of_jaxpr(jax.make_jaxpr(fn)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> Operations:
    total = Operations()
    for equation in jaxpr.eqns:
        total = total + _of_equation(equation)
    return total


def _of_equation(equation: Any) -> Operations:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval
        return _products(equation, 2 * math.prod(left.shape[axis] for axis in contracted))
    if name == "conv_general_dilated":
        kernel, features = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return _products(equation, 2 * math.prod(kernel.shape) / kernel.shape[features])
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "scan":
        return inner[0].times(params["length"])
    if name == "cond":
        return max(inner, key=lambda found: (found.total, found.others))
    if inner:
        return sum(inner, Operations())
    if name in _MOVES:
        return Operations()
    where = equation.invars if name.startswith(("reduce_", "cum", "arg")) else equation.outvars
    return Operations({}, max((_size(x.aval) for x in where), default=0))


def _products(equation: Any, each: float) -> Operations:
    """``each``: operations for one number of the result."""
    operand, result = equation.invars[0].aval, equation.outvars[0].aval
    return Operations({jnp.dtype(operand.dtype).name: float(each * _size(result))})


def _size(aval: Any) -> float:
    return float(math.prod(getattr(aval, "shape", ())))


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
