"""Models whose posterior can be drawn exactly, with the values of everything that is read at the draws."""

from typing import NamedTuple

import numpy as np

from slt_jax.results.observed import Observed


class Linear(NamedTuple):
    """y = Xw + noise with the loss (y - x w)^2 / 2 and its Gaussian posterior around ``center``; ``truth`` is the w."""

    x: np.ndarray
    y: np.ndarray
    beta: float
    gamma: float
    center: np.ndarray
    truth: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        return np.linalg.inv(self.beta * self.x.T @ self.x + self.gamma * np.eye(self.x.shape[1]))

    @property
    def mean(self) -> np.ndarray:
        return self.covariance @ (self.beta * self.x.T @ self.y + self.gamma * self.center)

    def losses(self, w, rows=slice(None)):
        return 0.5 * (self.y[rows] - w @ self.x[rows].T) ** 2

    def exact(self):
        """(C_ij, <l_i>, Bayes losses) of the training examples."""
        s, r = self.x @ self.covariance @ self.x.T, self.y - self.x @ self.mean
        held = np.diag(s)
        return np.outer(r, r) * s + s**2 / 2, (r**2 + held) / 2, np.log1p(held) / 2 + r**2 / (2 * (1 + held))

    def draw(self, rng, chains, draws):
        normal = rng.standard_normal((chains, draws, len(self.mean)))
        return self.mean + normal @ np.linalg.cholesky(self.covariance).T


def linear(n=40, d=4, beta=1.0, gamma=0.0, noise=1.0, seed=0):
    """With w* the least-squares solution."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((n, d)), rng.standard_normal(d)
    y = x @ w + noise * rng.standard_normal(n)
    return Linear(x, y, beta, gamma, np.linalg.lstsq(x, y, rcond=None)[0], w)


def observed(values, center, num_data, nbeta, *, gap=None, name="train", valid=None, level=None, gamma=0.0):
    """What a run would have observed: ``values`` (chain, draw, example[, token])."""
    if gap is None:
        gap = values.reshape(*values.shape[:2], -1).mean(-1) - center.mean()
    level = level or ("example" if values.ndim == 3 else "token")
    return Observed(name, level, values.astype(np.float32), None, np.asarray(center, np.float32), valid, gap, nbeta,
                    num_data, gamma)  # fmt: skip


def of_linear(model, rng, chains=4, draws=500, rows=slice(None)):
    """The training examples ``rows`` at exact draws; the gap is that of all of them."""
    losses = model.losses(model.draw(rng, chains, draws))
    center, n = model.losses(model.center), len(model.y)
    gap = losses.mean(-1) - center.mean()
    return observed(losses[..., rows], center[rows], n, n * model.beta, gap=gap, gamma=model.gamma)


class Singular(NamedTuple):
    """y = w^k x + N(0, 1) of the true w = 0, with the loss (y - w^k x)^2 / 2 and a flat prior on (-reach, reach).

    The posterior is a function of t = w^k alone: exp(-beta (t^2 S - 2 t T) / 2) with S = sum x^2, T = sum x y.
    """

    k: int
    x: np.ndarray
    y: np.ndarray
    beta: float
    reach: float = 1.0

    def grid(self, count=6001):
        """(values of w^k, probabilities) on a grid in w that is dense at 0."""
        w = np.sinh(np.linspace(-9, 9, count)) / np.sinh(9) * self.reach
        t = w**self.k
        energy = 0.5 * self.beta * (t**2 * (self.x @ self.x) - 2 * t * (self.x @ self.y))
        density = np.exp(-(energy - energy.min())) * np.gradient(w)
        return t, density / density.sum()

    def moments(self):
        """(<t>, <t^2>, sum_i Var(l_i))."""
        t, p = self.grid()
        first, second, third, fourth = (p @ t**j for j in range(1, 5))
        # l_i = x_i^2 t^2 / 2 - x_i y_i t + y_i^2 / 2
        a, b = self.x**2 / 2, self.x * self.y
        var = a**2 * (fourth - second**2) + b**2 * (second - first**2) - 2 * a * b * (third - first * second)
        return first, second, float(var.sum())

    def draw(self, rng, chains, draws):
        t, p = self.grid()
        return np.interp(rng.random((chains, draws)), np.cumsum(p) - p / 2, t)
