"""What JAX does around a caller's line, and must not do inside the programs of an estimate."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_not_traced

P = ParamSpec("P")
R = TypeVar("R")


def in_own_context(call: Callable[P, R]) -> Callable[P, R]:
    """``call`` with its programs out of reach of the caller's settings of JAX.

    A mesh that ``jax.set_mesh`` made current would be taken for that of every array, and the chains have one of their
    own (``mesh``). ``jax_debug_nans`` and ``jax_debug_infs`` would stop at the NaN that marks what was not recorded;
    chains that go non-finite are reported. Arrays do have to move between host and device.

    Raises:
        TypeError: inside ``jax.jit``, ``vmap`` or ``grad``.
    """

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [*args, *kwargs.values()]
        centers = [getattr(value, "center", None) for value in given]
        check_not_traced(call.__name__, *given, *centers)
        with _own_context():
            return call(*args, **kwargs)

    return called


@contextlib.contextmanager
def _own_context() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for setting in (jax.debug_nans(False), jax.debug_infs(False), jax.transfer_guard("allow")):
            stack.enter_context(setting)
        if not jax.sharding.get_abstract_mesh().empty:
            stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        yield
