"""Problems with at most twenty weights whose learning coefficient is known exactly, and the value of their posterior.

K(w - w*) is a loss with a known zero; w* is away from the origin, as trained weights are. Its examples differ by
factors of mean 1, so that minibatches are noisy and agree at w*. The value at finite temperature,
``exact(nbeta, localization)``, is nbeta (E[L] - L(w*)) under exp(-nbeta L - (localization / 2)|w - w*|^2), in closed
form or by quadrature. Where one layer or factor enters quadratically it is integrated out: a direction of curvature x
then counts (x / (x + localization)) / 2.

Sources of the truths: Watanabe, Algebraic Geometry and Statistical Learning Theory (2009); Aoyagi, Neural Networks 172
(2024) 106132. The toy model of superposition has eighteen weights, but critical points that must be trained for: it is
not here.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

NUM_DATA = 20_000
FACTORS = np.tile(np.array([0.5, 1.0, 1.5, 1.0], np.float32), NUM_DATA // 4)[:, None]


@dataclass(frozen=True)
class Target:
    """``loss_fn(params, batch) -> (m,)``; ``exact(nbeta, localization)`` is None where it is not known."""

    name: str
    truth: Fraction
    multiplicity: int
    loss_fn: Callable
    center: Any
    data: Any
    exact: Callable[[float, float], float] | None
    num_data: int = NUM_DATA


def _grid(count: int, reach: float, least: float = 1e-7) -> tuple[np.ndarray, np.ndarray]:
    """Points from -reach to reach, dense around 0 on a logarithmic scale, and their trapezoid weights."""
    u = np.linspace(-1, 1, count)
    scale = np.arcsinh(reach / least)
    return least * np.sinh(scale * u), least * scale * np.cosh(scale * u) * (u[1] - u[0])


def plane(energy: Callable, count: int = 1600, reach: float = 12.0) -> Callable[[float, float], float]:
    """Quadrature over two weights; ``reach`` is in units of 1 / sqrt(localization), at most ``reach`` itself."""

    def exact(nbeta: float, localization: float) -> float:
        x, weight = _grid(count, min(reach, reach / np.sqrt(localization)))
        k = energy(x[:, None], x[None, :])
        away = 0.5 * localization * (x[:, None] ** 2 + x[None, :] ** 2)
        density = np.exp(-nbeta * k - away) * weight[:, None] * weight[None, :]
        return float(np.sum(nbeta * k * density) / np.sum(density))

    return exact


def _cusp(nbeta: float, localization: float) -> float:
    """(y^2 - x^3)^2, along the valley: it is far thinner than any grid over the plane could resolve."""
    x, weight = _grid(20_001, 12.0 / np.sqrt(localization), 1e-4)
    band = 7 / np.sqrt(nbeta)  # of y^2 - x^3; beyond, the density is below exp(-49)
    low, high = (np.sqrt(np.maximum(0, x**3 + side * band)) for side in (-1, 1))
    total = held = 0.0
    for share in np.linspace(0, 1, 801):
        y = low + share * (high - low)
        fall = nbeta * (y**2 - x**3) ** 2
        density = np.exp(-fall - 0.5 * localization * (x**2 + y**2)) * (high - low) * weight
        density *= 0.5 if share in (0, 1) else 1.0
        total, held = total + density.sum(), held + (fall * density).sum()
    return float(held / total)


def radial(power: int, dimension: int) -> Callable[[float, float], float]:
    def exact(nbeta: float, localization: float) -> float:
        r = np.geomspace(1e-6, 12.0, 40_001)
        density = np.exp(-nbeta * r**power - 0.5 * localization * r**2) * r**dimension  # the last r is dr / dlog r
        return float(np.sum(nbeta * r**power * density) / np.sum(density))

    return exact


def _quadratic(curvature: np.ndarray) -> Callable[[float, float], float]:
    return lambda nbeta, localization: float(np.sum(nbeta * curvature / (nbeta * curvature + localization)) / 2)


def _counted(x: np.ndarray, localization: float) -> np.ndarray:
    return 0.5 * x / (x + localization)


def _triple(nbeta: float, localization: float) -> float:
    """w1^2 w2^2 w3^2: w3 integrated out."""
    x, weight = _grid(1600, 12.0 / np.sqrt(localization))
    curvature = 2 * nbeta * x[:, None] ** 2 * x[None, :] ** 2
    pull = np.exp(-0.5 * localization * (x[:, None] ** 2 + x[None, :] ** 2))
    density = pull / np.sqrt(curvature + localization) * weight[:, None] * weight[None, :]
    return float(np.sum(_counted(curvature, localization) * density) / np.sum(density))


def _one_linear(mean_square: Callable) -> Callable[[float, float], float]:
    """(a^2 / 2) m(b), a integrated out."""

    def exact(nbeta: float, localization: float) -> float:
        b, weight = _grid(20_001, 12.0 / np.sqrt(localization))
        curvature = nbeta * mean_square(b)
        density = np.exp(-0.5 * localization * b**2) / np.sqrt(curvature + localization) * weight
        return float(np.sum(_counted(curvature, localization) * density) / np.sum(density))

    return exact


def _rank_zero(inputs: int, hidden: int, outputs: int) -> Callable[[float, float], float]:
    """|W1 W2|^2 with inputs <= 2, W2 integrated out: over the singular values of W1, of density
    prod s_i^(hidden - inputs) prod |s_i^2 - s_j^2| (Muirhead, Aspects of Multivariate Statistical Theory, 1982)."""

    def exact(nbeta: float, localization: float) -> float:
        s = np.geomspace(1e-8, 14.0 / np.sqrt(localization), 2001)
        curvature = 2 * nbeta * s**2
        one = s ** (hidden - inputs + 1) * np.exp(-0.5 * localization * s**2)
        one *= (curvature + localization) ** (-outputs / 2)
        if inputs == 1:
            return float(np.sum(outputs * _counted(curvature, localization) * one) / np.sum(one))
        density = one[:, None] * one[None, :] * np.abs(s[:, None] ** 2 - s[None, :] ** 2)
        counted = outputs * (_counted(curvature, localization)[:, None] + _counted(curvature, localization)[None, :])
        return float(np.sum(counted * density) / np.sum(density))

    return exact


def _geometric(name: str, truth: Fraction, multiplicity: int, energy: Callable, dimension: int, exact) -> Target:
    """``energy`` of an array of the ``dimension`` displacements."""
    center = np.where(np.arange(dimension) % 2 == 0, 1.0, -1.0).astype(np.float32)

    def loss_fn(w, factor):
        return energy(w - center) * factor[:, 0]

    return Target(name, truth, multiplicity, loss_fn, center, FACTORS, exact)


def _regular(dimension: int, decades: float) -> Target:
    curvature = np.logspace(0, -decades, dimension)
    stiff = curvature.astype(np.float32)
    name = f"quadratic, d = {dimension}" + (f", {decades:.0f} decades" if decades else "")
    energy = lambda v: 0.5 * jnp.sum(stiff * v**2)  # noqa: E731
    return _geometric(name, Fraction(dimension, 2), 1, energy, dimension, _quadratic(curvature))


def _regression() -> Target:
    """Ten inputs, label noise orthogonal to them, so that the center is the minimum on the data itself."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_DATA, 10))
    noise = rng.normal(size=NUM_DATA)
    noise -= x @ np.linalg.lstsq(x, noise, rcond=None)[0]
    center = rng.normal(size=10)
    y = x @ center + noise
    curvature = np.linalg.eigvalsh(x.T @ x / NUM_DATA)
    loss_fn = lambda w, xy: 0.5 * (xy[0] @ w - xy[1]) ** 2  # noqa: E731
    data = (x.astype(np.float32), y.astype(np.float32))
    return Target(
        "noisy regression, d = 10",
        Fraction(5),
        1,
        loss_fn,
        center.astype(np.float32),
        data,
        _quadratic(curvature),
    )


def _tanh() -> Target:
    """a tanh(b x) beside the truth 0."""
    x = np.linspace(-2, 2, 100)
    data = np.tile(x.astype(np.float32), NUM_DATA // 100)[:, None]
    loss_fn = lambda p, x: 0.5 * (p["a"] * jnp.tanh(p["b"] * x[:, 0])) ** 2  # noqa: E731
    center = {"a": np.zeros((), np.float32), "b": np.zeros((), np.float32)}
    exact = _one_linear(lambda b: np.mean(np.tanh(b[:, None] * x[None, :]) ** 2, axis=1))
    return Target("one tanh unit", Fraction(1, 2), 2, loss_fn, center, data, exact)


def _log_part(z, np_):
    """-log f + f - 1 >= 0 for f = z, continued below z = 0.1 so that it is finite for any z."""
    safe = np_.maximum(z, 0.1)
    low = 0.1 * np_.exp(np_.minimum((z - 0.1) / 0.1, 0.0))
    return np_.where(z > 0.1, -np_.log(safe) + safe - 1, -np_.log(0.1) - (z - 0.1) / 0.1 + low - 1)


def _mixture() -> Target:
    """a N(b, 1) + (1 - a) N(0, 1) beside the truth N(0, 1): the divergence, over quantiles of the truth."""
    from scipy.special import ndtri

    x = ndtri((np.arange(100) + 0.5) / 100)
    data = np.tile(x.astype(np.float32), NUM_DATA // 100)[:, None]

    def loss_fn(p, x):
        return _log_part(1 + p["a"] * (jnp.exp(p["b"] * x[:, 0] - p["b"] ** 2 / 2) - 1), jnp)

    def energy(a, b):
        total = 0.0
        for point in x:
            total = total + _log_part(1 + a * (np.exp(b * point - b**2 / 2) - 1), np)
        return total / len(x)

    center = {"a": np.zeros((), np.float32), "b": np.zeros((), np.float32)}
    return Target("Gaussian mixture", Fraction(1, 2), 2, loss_fn, center, data, plane(energy, 600))


def _deep_linear(widths: tuple[int, int, int], truth: Fraction, multiplicity: int) -> Target:
    """Rank 0; the inputs' second moments are the identity exactly."""
    rows = np.sqrt(widths[0]) * np.eye(widths[0], dtype=np.float32)
    data = np.tile(rows, (NUM_DATA // widths[0], 1))
    loss_fn = lambda w, x: jnp.sum((x @ w[0] @ w[1]) ** 2, axis=-1)  # noqa: E731
    center = [np.zeros(shape, np.float32) for shape in itertools.pairwise(widths)]
    name = f"deep linear {'-'.join(map(str, widths))}, rank 0"
    return Target(name, truth, multiplicity, loss_fn, center, data, _rank_zero(*widths))


def _norm(power: int) -> Callable:
    return lambda v: jnp.sum(v**2) ** (power // 2)


TARGETS: tuple[Target, ...] = (
    _regular(1, 0), _regular(2, 0), _regular(10, 2), _regular(20, 1), _regression(),
    _geometric("x^4", Fraction(1, 4), 1, _norm(4), 1, radial(4, 1)),
    _geometric("x^6", Fraction(1, 6), 1, _norm(6), 1, radial(6, 1)),
    _geometric("|w|^4, d = 2", Fraction(1, 2), 1, _norm(4), 2, radial(4, 2)),
    _geometric("|w|^4, d = 4", Fraction(1), 1, _norm(4), 4, radial(4, 4)),
    _geometric("|w|^6, d = 3", Fraction(1, 2), 1, _norm(6), 3, radial(6, 3)),
    _geometric("x^2 + y^4", Fraction(3, 4), 1, lambda v: v[0] ** 2 + v[1] ** 4, 2, plane(lambda x, y: x**2 + y**4)),
    _geometric("(y^2 - x^3)^2", Fraction(5, 12), 1, lambda v: (v[1] ** 2 - v[0] ** 3) ** 2, 2, _cusp),
    _geometric("x^2 y^4", Fraction(1, 4), 1, lambda v: v[0] ** 2 * v[1] ** 4, 2, plane(lambda x, y: x**2 * y**4)),
    _geometric("x^2 (y^2 + z^2)", Fraction(1, 2), 1, lambda v: v[0] ** 2 * (v[1] ** 2 + v[2] ** 2), 3, None),
    _geometric("x^2 y^2", Fraction(1, 2), 2, lambda v: v[0] ** 2 * v[1] ** 2, 2, plane(lambda x, y: x**2 * y**2)),
    _geometric("x^2 y^2 z^2", Fraction(1, 2), 3, lambda v: jnp.prod(v**2), 3, _triple),
    _geometric("x^2 y^2 + z^2", Fraction(1), 2, lambda v: v[0] ** 2 * v[1] ** 2 + v[2] ** 2, 3,
               lambda t, g: plane(lambda x, y: x**2 * y**2)(t, g) + t / (2 * t + g)),
    _tanh(), _mixture(),
    _deep_linear((1, 2, 2), Fraction(1), 2), _deep_linear((2, 3, 3), Fraction(5, 2), 1),
    _deep_linear((2, 2, 2), Fraction(3, 2), 1),
)  # fmt: skip


def by_name(name: str) -> Target:
    """The target of this name. Raises KeyError."""
    return {target.name: target for target in TARGETS}[name]
