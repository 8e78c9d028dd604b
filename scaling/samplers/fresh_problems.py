"""Problems for the verdict that share no family with those on which its limits were set.

Each has at most twelve weights and a posterior whose value, nbeta (E[L] - L(w*)) under
exp(-nbeta L - (localization / 2)|w - w*|^2), is known at any nbeta and localization: a closed form where the loss is
quadratic, else quadrature over one to three weights, the others being integrated out. w* minimizes L over the data set
itself. ``singular``: whether the Hessian at w* is degenerate.

Losses of data (regressions, likelihoods) have minibatch noise also at w*; the others are those of one function times
factors of mean 1, so that batches differ and agree at w*.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.known_answers import FACTORS, NUM_DATA
from scaling.samplers.quadrature import (
    Exact,
    average,
    confined,
    dense_at_0,
    in_the_plane,
    over_angle,
    over_radius,
    quadratic,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """``loss_fn(params, batch) -> (m,)``; ``exact(nbeta, localization)``: the value of the posterior."""

    name: str
    singular: bool
    loss_fn: Callable
    center: Any
    data: Any
    exact: Exact

    @property
    def num_data(self) -> int:
        return len(jax.tree.leaves(self.data)[0])


# --- losses of data, regular


def _newton(slope: Callable, hessian: Callable, start: np.ndarray) -> np.ndarray:
    w = start
    for _ in range(50):
        w = w - np.linalg.solve(hessian(w), slope(w))
    return w


def _rows(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(a.astype(np.float32) for a in arrays)


def _logistic() -> Problem:
    rng = np.random.default_rng(301)
    x = rng.normal(size=(500, 2)) * np.array([1.0, 0.4])
    y = np.where(rng.random(500) < 1 / (1 + np.exp(-x @ np.array([1.5, -2.0]))), 1.0, -1.0)
    signed = x * y[:, None]
    of_wrong = lambda w: 1 / (1 + np.exp(signed @ w))  # noqa: E731
    hessian = lambda w: (x.T * of_wrong(w) * (1 - of_wrong(w))) @ x / 500  # noqa: E731
    center = _newton(lambda w: -signed.T @ of_wrong(w) / 500, hessian, np.zeros(2))
    mean_loss = lambda w: np.mean(np.logaddexp(0, -w @ signed.T), -1)  # noqa: E731
    return Problem(
        name="logistic regression, d = 2", singular=False,
        loss_fn=lambda w, batch: jnp.logaddexp(0.0, -batch @ w), center=center.astype(np.float32),
        data=np.tile(signed.astype(np.float32), (10, 1)), exact=in_the_plane(mean_loss, center, hessian(center)),
    )  # fmt: skip


def _poisson() -> Problem:
    rng = np.random.default_rng(302)
    x = np.stack([np.ones(400), rng.uniform(-1, 2, 400)], 1)
    counts = rng.poisson(np.exp(x @ np.array([0.3, 0.8]))).astype(float)
    hessian = lambda w: (x.T * np.exp(x @ w)) @ x / 400  # noqa: E731
    center = _newton(lambda w: x.T @ (np.exp(x @ w) - counts) / 400, hessian, np.zeros(2))
    mean_loss = lambda w: np.mean(np.exp(w @ x.T), -1) - w @ (x.T @ counts / 400)  # noqa: E731
    return Problem(
        name="Poisson regression, d = 2", singular=False,
        loss_fn=lambda w, batch: jnp.exp(batch[0] @ w) - batch[1] * (batch[0] @ w),
        center=center.astype(np.float32), data=_rows(x, counts), exact=in_the_plane(mean_loss, center, hessian(center)),
    )  # fmt: skip


def _normal() -> Problem:
    x = np.random.default_rng(303).normal(0.7, 1.8, 1000).astype(np.float32)
    wide = x.astype(np.float64)
    mean, variance = wide.mean(), wide.var()
    scale = 0.5 * np.log(variance)

    def exact(nbeta: float, localization: float) -> float:
        s = scale + np.linspace(-1.5, 1.5, 20_001)
        fall, log_factor = confined(nbeta * np.exp(-2 * s), localization)
        along = nbeta * (s + 0.5 * variance * np.exp(-2 * s) - scale - 0.5)
        return average(fall + along, log_factor - along - 0.5 * localization * (s - scale) ** 2)

    return Problem(
        name="location and log scale of a normal", singular=False,
        loss_fn=lambda p, x: p["scale"] + 0.5 * ((x - p["mean"]) * jnp.exp(-p["scale"])) ** 2,
        center={"mean": np.float32(mean), "scale": np.float32(scale)}, data=x, exact=exact,
    )  # fmt: skip


def _least_squares(name: str, singular: bool, x: np.ndarray, y: np.ndarray, ridge: float = 0.0) -> Problem:
    hessian = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    center = np.linalg.pinv(hessian, rcond=1e-10) @ (x.T @ y / len(x))
    return Problem(
        name=name, singular=singular,
        loss_fn=lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2 + 0.5 * ridge * jnp.sum(w**2),
        center=center.astype(np.float32), data=_rows(x, y), exact=quadratic(hessian),
    )  # fmt: skip


def _cosine_features() -> Problem:
    rng = np.random.default_rng(304)
    x = rng.uniform(-1, 1, (2000, 2))
    features = 0.5 * np.cos(x @ (3 * rng.normal(size=(2, 8))) + rng.uniform(0, 2 * np.pi, 8))
    y = np.sin(3 * x[:, 0]) * x[:, 1] + 0.3 * rng.normal(size=2000)
    return _least_squares("ridge on random cosine features, d = 8", False, features, y, ridge=0.01)


def _heavy_tails() -> Problem:
    rng = np.random.default_rng(305)
    x = rng.standard_t(3, (5000, 6)) / np.sqrt(3)
    y = x @ rng.normal(size=6) + rng.normal(size=5000)
    return _least_squares("regression on Student-t inputs, d = 6", False, x, y)


def _collinear() -> Problem:
    """Twelve inputs that span five dimensions: seven directions are exactly flat."""
    rng = np.random.default_rng(306)
    x = rng.normal(size=(3000, 5)) @ rng.normal(size=(5, 12))
    y = x @ rng.normal(size=12) + 0.5 * rng.normal(size=3000)
    return _least_squares("collinear regression, d = 12, rank 5", True, x, y)


# --- losses of data, singular


def _factor_model() -> Problem:
    """N(0, I + a a') on data whose second moments are I: radial, about |a|^4 / 4."""
    x = np.random.default_rng(307).normal(size=(4000, 4))
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / 4000)).T

    def loss_fn(a, x):
        square = jnp.sum(a**2)
        return 0.5 * (jnp.log1p(square) - (x @ a) ** 2 / (1 + square))

    energy = lambda r: 0.5 * (np.log1p(r**2) - r**2 / (1 + r**2))  # noqa: E731
    return Problem(
        name="factor model, d = 4", singular=True, loss_fn=loss_fn, center=np.zeros(4, np.float32),
        data=x.astype(np.float32), exact=over_radius(energy, 4),
    )  # fmt: skip


def _phase_retrieval() -> Problem:
    """The signal is 0: (x.w)^4 of each example, in the mean a quartic that is not round."""
    x = (np.random.default_rng(308).normal(size=(1000, 2)) * np.array([1.0, 0.5])).astype(np.float32)
    angle = np.linspace(0, np.pi, 721)[:-1]
    around = np.stack([np.cos(angle), np.sin(angle)])
    share = np.mean((x.astype(np.float64) @ around) ** 4, 0)
    return Problem(
        name="phase retrieval of zero, d = 2", singular=True, loss_fn=lambda w, x: (x @ w) ** 4,
        center=np.zeros(2, np.float32), data=x, exact=over_angle(4, share, np.ones_like(share)),
    )  # fmt: skip


def _two_coins() -> Problem:
    """Success needs two coins with unknown odds; of 1000 trials 300 succeeded: all pairs of this product do as well."""
    y = np.repeat(np.array([1.0, 0.0], np.float32), [300, 700])
    center = np.array([0.0, np.log(0.6 / 0.4)])

    def exact(nbeta: float, localization: float) -> float:
        u = center[0] + np.linspace(-9, 9, 1501)[:, None] / np.sqrt(localization)
        away, weight = dense_at_0(1000, 30 / np.sqrt(localization), 1e-4)
        away, weight = np.concatenate([-away[::-1], away]), np.concatenate([weight[::-1], weight])
        # around the other coin's odds that fit, where there are any
        other = 0.3 * (1 + np.exp(-u))
        v = np.where(other < 0.99, np.log(other / np.maximum(1 - other, 0.01)), 5.0) + away
        log_p = -np.logaddexp(0, -u) - np.logaddexp(0, -v)
        fall = -nbeta * (0.3 * (log_p - np.log(0.3)) + 0.7 * (np.log(-np.expm1(log_p)) - np.log(0.7)))
        square = (u - center[0]) ** 2 + (v - center[1]) ** 2
        return average(fall, -fall - 0.5 * localization * square, weight)

    def loss_fn(w, y):
        log_p = jnp.sum(jax.nn.log_sigmoid(w))
        return -y * log_p - (1 - y) * jnp.log(-jnp.expm1(log_p))

    return Problem(
        name="two coins in a row", singular=True, loss_fn=loss_fn, center=center.astype(np.float32), data=y,
        exact=exact,
    )  # fmt: skip


def _two_sine_units() -> Problem:
    """a sin(b x) + c sin(d x) beside the truth 0: a and c integrated out."""
    x = np.linspace(-2, 2, 50)

    def exact(nbeta: float, localization: float) -> float:
        b, weight = dense_at_0(1200, 9 / np.sqrt(localization), 1e-4)  # one sign of b is as good as the other
        waves = np.sin(b[:, None] * x)
        mixed = nbeta * waves @ waves.T / len(x)
        own = np.diag(mixed) + localization
        determinant = own[:, None] * own[None, :] - mixed**2
        fall = 1 - 0.5 * localization * (own[:, None] + own[None, :]) / determinant
        pull = 0.5 * localization * (b[:, None] ** 2 + b[None, :] ** 2)
        return average(fall, -0.5 * np.log(determinant) - pull, weight[:, None] * weight[None, :])

    loss_fn = lambda p, x: 0.5 * jnp.sum(p["out"][:, None] * jnp.sin(p["in"][:, None] * x), 0) ** 2  # noqa: E731
    center = {"in": np.zeros(2, np.float32), "out": np.zeros(2, np.float32)}
    data = np.tile(x.astype(np.float32), NUM_DATA // 50)
    return Problem(name="two sine units", singular=True, loss_fn=loss_fn, center=center, data=data, exact=exact)


# --- functions of the weights


def _function(name: str, energy: Callable, center: np.ndarray, exact: Exact, singular: bool = True) -> Problem:
    return Problem(
        name=name, singular=singular, loss_fn=lambda w, factor: energy(w) * factor[:, 0],
        center=center.astype(np.float32), data=FACTORS, exact=exact,
    )  # fmt: skip


def _displaced(name: str, energy: Callable, dimension: int, exact: Exact) -> Problem:
    """``energy`` of the distance from a w* away from the origin, as trained weights are."""
    center = np.linspace(-1, 1, dimension).astype(np.float32)
    return _function(name, lambda w: energy(w - center), center, exact)


def _rosenbrock(nbeta: float, localization: float) -> float:
    """(1 - x)^2 / 20 + 5 (y - x^2)^2: y integrated out."""
    x = 1 + np.linspace(-8, 8, 80_001)
    fall, log_factor = confined(np.asarray(10 * nbeta), localization, x**2 - 1)
    along = nbeta * (1 - x) ** 2 / 20
    return average(fall + along, log_factor - along - 0.5 * localization * (x - 1) ** 2)


def _parabola(nbeta: float, localization: float) -> float:
    """(y - x^2)^2 + x^6: y integrated out."""
    x, weight = dense_at_0(20_001, 14 / np.sqrt(localization))
    fall, log_factor = confined(np.asarray(2 * nbeta), localization, x**2)
    along = nbeta * x**6
    return average(fall + along, log_factor - along - 0.5 * localization * x**2, weight)


def _pairs(nbeta: float, localization: float) -> float:
    """x^2 y^2 + y^2 z^2 + z^2 x^2: z integrated out."""
    x, weight = dense_at_0(1200, 14 / np.sqrt(localization))
    square = x[:, None] ** 2 + x[None, :] ** 2
    fall, log_factor = confined(2 * nbeta * square, localization)
    along = nbeta * x[:, None] ** 2 * x[None, :] ** 2
    log_density = log_factor - along - 0.5 * localization * square
    return average(fall + along, log_density, weight[:, None] * weight[None, :])


def _gram(nbeta: float, localization: float) -> float:
    """|U U'|^2 with U of 3 x 2: s1^4 + s2^4, the singular values of density s1 s2 |s1^2 - s2^2|."""
    s = np.geomspace(1e-6, 14 / np.sqrt(localization), 2500)  # so that another s is ds / dlog s
    fall = nbeta * (s[:, None] ** 4 + s[None, :] ** 4)
    square = s[:, None] ** 2 + s[None, :] ** 2
    apart = np.abs(s[:, None] ** 2 - s[None, :] ** 2) * s[:, None] ** 2 * s[None, :] ** 2
    return average(fall, -fall - 0.5 * localization * square, apart)


def _sphere(nbeta: float, localization: float) -> float:
    """(|w|^2 - 1)^2 in three dimensions, from a point of the sphere: over its angles in closed form."""
    r = np.linspace(1e-6, 1 + 12 / np.sqrt(localization), 200_001)
    fall = nbeta * (r**2 - 1) ** 2
    angles = np.log(-np.expm1(-2 * localization * r)) - np.log(r)
    return average(fall, -fall - 0.5 * localization * (r - 1) ** 2 + angles + 2 * np.log(r))


def _three_lines() -> Exact:
    """(x^3 - 3 x y^2)^2 = r^6 sin^2(angle), three times the angle from a line: the same between any two of them."""
    angle, weight = dense_at_0(1201, np.pi / 2)
    return over_angle(6, np.sin(angle) ** 2, weight)


@functools.cache
def fresh_problems() -> dict[str, Problem]:
    """By name."""
    tip = np.array([0.6, 0.0, 0.8])
    problems = (
        _logistic(), _poisson(), _normal(), _cosine_features(), _heavy_tails(),
        _function("Rosenbrock's valley", lambda w: (1 - w[0]) ** 2 / 20 + 5 * (w[1] - w[0] ** 2) ** 2, np.ones(2),
                  _rosenbrock, singular=False),
        _collinear(), _factor_model(), _phase_retrieval(), _two_coins(), _two_sine_units(),
        _displaced("(y - x^2)^2 + x^6", lambda v: (v[1] - v[0] ** 2) ** 2 + v[0] ** 6, 2, _parabola),
        _displaced("x^2 y^2 + y^2 z^2 + z^2 x^2",
                   lambda v: sum((a * b) ** 2 for a, b in itertools.combinations(v, 2)), 3, _pairs),
        _displaced("(x^3 - 3 x y^2)^2", lambda v: (v[0] ** 3 - 3 * v[0] * v[1] ** 2) ** 2, 2, _three_lines()),
        _displaced("|U U'|^2, 3 x 2", lambda v: jnp.sum((v.reshape(3, 2).T @ v.reshape(3, 2)) ** 2), 6, _gram),
        _function("(|w|^2 - 1)^2, d = 3", lambda w: (jnp.sum(w**2) - 1) ** 2, tip, _sphere),
    )  # fmt: skip
    return {problem.name: replace(problem, exact=functools.cache(problem.exact)) for problem in problems}
