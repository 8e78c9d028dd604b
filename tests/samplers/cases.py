"""Every stochastic-gradient sampler, and the exact law of its discretization on a quadratic.

On a quadratic of curvature a, with gradient noise of variance S, all of them are linear, and their stationary variance
is known exactly (the docstrings give it). k = step_size a.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest

from slt_jax.samplers.base import Sampler
from slt_jax.samplers.preconditioned import preconditioned_sgld
from slt_jax.samplers.sghmc import sghmc
from slt_jax.samplers.sgld import sgld
from slt_jax.samplers.sgnht import sgnht
from slt_jax.samplers.underdamped import underdamped

FRICTION = 0.3


class Case(NamedTuple):
    """``variance(a, eps, S)``: exact. ``order``: of the step-size bias on a quadratic; 0 for none."""

    sampler: Sampler
    variance: Callable
    order: int


def euler(a, eps, noise):
    return (1 + eps * noise / 4) / (a * (1 - eps * a / 4))


def matthews(a, eps, noise):
    return (1 + eps * noise / 4 / (1 - eps * a / 4)) / a


def baoab(a, eps, noise):
    return (1 + eps * noise / 4 / math.tanh(FRICTION / 2) / (1 - eps * a / 4)) / a


def hmc_euler(a, eps, noise):
    return (1 + eps * noise / (2 * FRICTION)) / (a * (1 - eps * a / (4 - 2 * FRICTION)))


CASES = {
    "sgld": Case(sgld(1e-3), euler, 1),
    "matthews": Case(sgld(1e-3, noise="leimkuhler-matthews"), matthews, 0),
    "rmsprop": Case(preconditioned_sgld(1e-3), euler, 1),
    "adam": Case(preconditioned_sgld(1e-3, moments="adam"), euler, 1),
    "underdamped": Case(underdamped(1e-3), baoab, 0),
    "sghmc": Case(sghmc(1e-3), hmc_euler, 1),
    "sgnht": Case(sgnht(1e-3), baoab, 0),
}
every = pytest.mark.parametrize("name", CASES)
