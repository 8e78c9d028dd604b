"""What is recorded of every step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Trace(NamedTuple):
    """Per chain and step, float32 ``(num_chains, total_steps)``; NaN where nothing was recorded. Of a result: of draws.

    ``loss``: L_m(w) before the step's move, and ``baseline``: the loss at w* that is subtracted from it, nats per
    example. ``gap_var``: variance of the batch mean of the per-example losses less their baseline, by their spread in
    the batch; 0 where the batch is the whole data set. ``tilt``: <grad L_m(w*), w - w*>, at every
    ``Window.tilt_every``-th draw. ``also``: with K further data sets, ``(num_chains, total_steps, K, 3)``: loss,
    baseline and gap_var on each; () with none. The other names are those of ``samplers.base.Info``; ``time`` is () of
    a result, whose draws are at equal times.
    """

    loss: Any
    baseline: Any
    gap_var: Any
    tilt: Any
    drift_sq: Any
    virial: Any
    distance_sq: Any
    kinetic: Any
    acceptance: Any
    pull: Any
    time: Any = ()
    also: Any = ()

    def __repr__(self) -> str:
        names = [name for name in self._fields if np.size(getattr(self, name))]
        return f"<Trace: {', '.join(names)}; {' x '.join(map(str, np.shape(self.loss)))}>"


SCALARS = tuple(name for name in Trace._fields if name != "also")  # the columns of ``columns``


def columns(trace: Trace) -> jax.Array:
    """The scalars of one step as a vector, float32: a program writes one array at a step, not eleven."""
    return jnp.stack([jnp.asarray(getattr(trace, name), jnp.float32) for name in SCALARS])


class Rows(NamedTuple):
    """What a program records of the steps of a chunk: ``columns`` of each, and ``Trace.also``."""

    scalars: jax.Array
    also: jax.Array | tuple[()]


def blank_rows(shape: tuple[int, ...], num_also: int) -> Rows:
    """Of NaN; ``shape``: (chains, steps)."""
    also = jnp.full((*shape, num_also, 3), jnp.nan, jnp.float32) if num_also else ()
    return Rows(jnp.full((*shape, len(SCALARS)), jnp.nan, jnp.float32), also)


def blank(shape: tuple[int, ...], num_also: int) -> Trace:
    """A trace of NaN in NumPy, each name of this shape."""
    full = functools.partial(np.full, fill_value=np.nan, dtype=np.float32)
    return Trace(**{name: full(shape) for name in SCALARS}, also=full((*shape, num_also, 3)) if num_also else ())
