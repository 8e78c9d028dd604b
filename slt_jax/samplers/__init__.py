"""Transition rules, one a file, on the contract in ``base``; ``kronecker`` measures the metric that one can take."""

from slt_jax.samplers.base import Theory
from slt_jax.samplers.exact import FULL_BATCH
from slt_jax.samplers.sghmc import SGHMC
from slt_jax.samplers.sgld import EULER, MATTHEWS
from slt_jax.samplers.sgnht import SGNHT
from slt_jax.samplers.underdamped import BAOAB

_THEORIES = (EULER, MATTHEWS, BAOAB, SGHMC, SGNHT, FULL_BATCH)


def theory_of(family: str) -> Theory:
    """The theory that a saved result names; one that knows nothing for a name that is not here."""
    return next((theory for theory in _THEORIES if theory.family == family), Theory(family))
