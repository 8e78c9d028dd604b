"""A linear model whose susceptibilities are leverages, and observed losses at exact independent draws of it."""

import numpy as np

import slt_jax as slt
from slt_jax.results.observed import Observed
from slt_jax.results.susceptibilities_data import dataset_of
from slt_jax.results.susceptibility_columns import column_of, reference_of

N, D, BETA = 60, 8, 0.5
PARTS = {"first": [0, 1, 2], "last": [5, 6, 7], "mixed": [1, 4]}
GROUPS = ["a"] * 20 + ["b"] * 25 + ["c"] * 15


class Linear:
    """y = X w + noise at the least-squares solution: l_i(w* + u) = (r_i - x_i u)^2 / 2."""

    def __init__(self, seed=0):
        draw = np.random.default_rng(seed).normal
        self.x = draw(size=(N, D)) @ np.diag(np.linspace(0.7, 1.6, D))
        y = self.x @ draw(size=D) + draw(size=N)
        self.center = np.linalg.lstsq(self.x, y)[0]
        self.y, self.r = y, y - self.x @ self.center

    def covariance(self, free):
        """Of the weights ``free``, without a localization."""
        return np.linalg.inv(BETA * self.x[:, free].T @ self.x[:, free])

    def leverages(self, free):
        x = self.x[:, free]
        return np.einsum("id,de,ie->i", x, np.linalg.inv(x.T @ x), x)

    def chi(self, free, estimator):
        """Exact. One-chain: -(h_C - d_C/n) / (2 n beta^2); the two-chain estimator has the terms of both posteriors."""
        d, own = len(free), self.leverages(free) - len(free) / N
        if estimator == "two-chain":
            own = own * (1 + d / 2) - d / 2 * (self.leverages(list(range(D))) - D / N)
        return -own / (2 * N * BETA**2)

    def observed(self, free, chains, draws, rng, correlation=0.0):
        """The losses of all examples at draws of the posterior restricted to ``free``; an AR(1) in each chain."""
        root = np.linalg.cholesky(self.covariance(free))
        z = rng.normal(size=(chains, draws, len(free)))
        for t in range(1, draws):
            z[:, t] = correlation * z[:, t - 1] + np.sqrt(1 - correlation**2) * z[:, t]
        values = (self.r - z @ root.T @ self.x[:, free].T) ** 2 / 2
        return observed(values, self.r**2 / 2)


def observed(values, center, valid=None, gap=None):
    """Of losses (chain, draw, example[, token]) and those at w*; the gap is by default of their mean."""
    gap = values.mean(tuple(range(2, values.ndim))) - center.mean() if gap is None else gap
    return Observed(
        name="probe", level="token" if center.ndim == 2 else "example", values=values.astype(np.float32), moments=None,
        center=center.astype(np.float32), valid=valid, gap=gap, nbeta=BETA * N, num_data=N, localization=1e-9,
    )  # fmt: skip


def result_of(rng, estimator="one-chain", draws=64, groups=GROUPS, parts=PARTS):
    model = Linear()
    reference = None
    if estimator == "two-chain":
        reference = reference_of(model.observed(list(range(D)), 4, draws, rng))
    columns = {
        name: column_of(model.observed(free, 4, draws, rng), estimator, reference) for name, free in parts.items()
    }
    attributes = {"estimator": estimator, "level": "example", "nbeta": BETA * N, "beta": BETA}
    return slt.Susceptibilities(dataset=dataset_of(columns, reference, None, "example", groups, attributes))
