"""The value of a posterior, nbeta (E[L] - L(w*)) under exp(-nbeta L - (localization / 2)|w - w*|^2), by quadrature.

``exact(nbeta, localization)`` everywhere; "fall" is nbeta (L(w) - L(w*)).
"""

from collections.abc import Callable

import numpy as np

Exact = Callable[[float, float], float]


def average(fall: np.ndarray, log_density: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Mean of ``fall`` under the density, on a grid whose points have these weights."""
    density = np.exp(log_density - log_density.max()) * weight
    return float(np.sum(fall * density) / np.sum(density))


def dense_at_0(count: int, reach: float, least: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Points from 0 to ``reach``, on a logarithmic scale above ``least``, and their trapezoid weights."""
    u = np.linspace(0, np.arcsinh(reach / least), count)
    weight = least * np.cosh(u) * (u[1] - u[0])
    weight[[0, -1]] /= 2
    return least * np.sinh(u), weight


def confined(precision: np.ndarray, localization: float, offset: np.ndarray | float = 0.0):
    """A weight integrated out: (its mean fall, the log of its factor in the density of the others).

    It adds (precision / 2)(y - c)^2 to the fall, beside (localization / 2)(y - y*)^2; ``offset`` = c - y*.
    """
    total = precision + localization
    fall = 0.5 * precision * (1 / total + (localization / total * offset) ** 2)
    return fall, -0.5 * np.log(total) - 0.5 * precision * localization / total * offset**2


def quadratic(hessian: np.ndarray) -> Exact:
    """In closed form; curvatures below 0 are rounding."""
    curvature = np.linalg.eigvalsh(hessian).clip(0)
    return lambda nbeta, localization: float(np.sum(nbeta * curvature / (nbeta * curvature + localization)) / 2)


def in_the_plane(mean_loss: Callable, center: np.ndarray, hessian: np.ndarray) -> Exact:
    """Two weights with one peak: twelve standard deviations around it, along the axes of the Hessian."""

    def exact(nbeta: float, localization: float) -> float:
        curvature, axes = np.linalg.eigh(nbeta * hessian + localization * np.eye(2))
        t = np.linspace(-12, 12, 241)
        steps = np.stack(np.meshgrid(t, t), -1).reshape(-1, 2) / np.sqrt(curvature) @ axes.T
        losses = np.concatenate([mean_loss(center + part) for part in np.array_split(steps, 50)])
        fall = nbeta * (losses - mean_loss(center[None]))
        return average(fall, -fall - 0.5 * localization * (steps**2).sum(-1))

    return exact


def over_radius(energy: Callable, dimension: int) -> Exact:
    """A function of the distance to w*."""

    def exact(nbeta: float, localization: float) -> float:
        r = np.geomspace(1e-6, 14 / np.sqrt(localization), 20_001)
        fall = nbeta * energy(r)
        return average(fall, -fall - 0.5 * localization * r**2 + dimension * np.log(r))  # the last r is dr / dlog r

    return exact


def over_angle(power: int, share: np.ndarray, weight: np.ndarray) -> Exact:
    """r^power share, in the plane; ``share`` at angles of these weights."""

    def exact(nbeta: float, localization: float) -> float:
        r = np.geomspace(1e-5, 14 / np.sqrt(localization), 1501)[:, None]
        fall = nbeta * r**power * share
        return average(fall, -fall - 0.5 * localization * r**2 + 2 * np.log(r), weight)

    return exact
