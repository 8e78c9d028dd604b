"""Which examples help or harm which: covariances of single losses over the draws (Bayesian influence functions)."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from slt_jax._checks import check_count, shown
from slt_jax.results.card import card, tone_color
from slt_jax.results.loss_traces import Traces, effective_draws
from slt_jax.results.ranking import Ranking

_FLOORS = 2.0  # noise floors from which an entry is more than noise
_SAMPLE = 256  # units of each side whose pairs are compared for the reliability
_RELIABLE = 0.5


@dataclass(frozen=True)
class Influence:
    """The influence of the units of ``of`` on those of ``on``, from their traces: no matrix of units is ever made.

    With C_ij = Cov(l_i, l_j) over the draws, an entry is the correlation C_ij / sqrt(C_ii C_jj) if ``normalized``, and
    -C_ij, nats^2, if not. Units that help each other have a positive correlation, and a negative -C_ij. More weight
    omega_i on l_i in the posterior changes the mean of l_j by d<l_j> / d omega_i = -beta C_ij, with ``beta``.

    ``of``, ``on``: traces; ``labels`` of them say which example and token a unit is. ``beta``: nbeta over the number of
    training examples, or over that of their tokens where the losses of tokens were observed.
    """

    of: Traces
    on: Traces
    normalized: bool
    beta: float
    nbeta: float
    localization: float

    def __repr__(self) -> str:
        reliability = f"{self.reliability:.2f}" if self.of.num_chains > 1 else "unknown (one chain)"
        return (
            f"<Influence: {self.of.size:,} x {self.on.size:,} {self.quantity}, noise floor {self.noise_floor:.2g}, "
            f"reliability {reliability}>"
        )

    def _repr_html_(self) -> str:
        known = self.of.num_chains > 1
        lines = [
            f"{self.of.num_chains} chains, {self.of.num_draws:,} draws, worth {self.effective_draws:,.0f} independent "
            f"ones; noise floor of a correlation {self.noise_floor:.2g}",
            f"split-half reliability {self.reliability:.2f}" if known else "one chain: its reliability is not known",
            f"between the chains: {self.between_chains:.0%} of the variance" if known else "",
            f"{self.constant:,} units do not change over the draws" if self.constant else "",
        ]
        good = known and self.reliability >= _RELIABLE
        verdict = "more signal than noise" if good else "mostly noise" if known else "not known how reliable"
        color = tone_color("converged" if good else "depends on nbeta or localization")
        return card(f"Influence of {self.of.size:,} on {self.on.size:,} {self._units}s", verdict, lines, "", color)

    @property
    def _units(self) -> str:
        return "token" if self.of.level == "token" else "example"

    @property
    def quantity(self) -> str:
        """What an entry is."""
        return "correlations of the losses" if self.normalized else "-Cov of the losses, nats^2"

    @functools.cached_property
    def effective_draws(self) -> float:
        """How many independent draws would give entries with the same error."""
        return effective_draws(self.of, self.on)

    @property
    def noise_floor(self) -> float:
        """Standard error of a correlation that is 0, 1 / sqrt(effective_draws - 3); infinite with too few draws."""
        left = self.effective_draws - 3
        return 1 / math.sqrt(left) if left > 0 else math.inf

    @property
    def constant(self) -> int:
        """Units whose loss does not change over the draws. They have no correlations (NaN) and no influence."""
        return int(np.isnan(self.of.sd).sum() + (0 if self.on is self.of else np.isnan(self.on.sd).sum()))

    @property
    def between_chains(self) -> float:
        """Share of the variance that is between the means of the chains, averaged over the units of both sides.

        About (chains - 1) / ESS if all chains sample one distribution. What exceeds that is a difference between
        chains, and no influence: center the chains apart (``within_chains=True``). Raises ValueError for one chain.
        """
        self._check_chains("what is between chains")
        shares = [t.between / np.where(np.isnan(t.sd), np.nan, t.total) for t in (self.of, self.on)]
        return float(np.nanmean(np.concatenate(shares)))

    def block(self, i: Any, j: Any, *, masked: bool = False) -> Float64[np.ndarray, "i j"]:
        """Entries of the units ``i`` of ``of`` and ``j`` of ``on``: numbers, slices or arrays of numbers.

        With ``masked``, entries below twice the noise floor are NaN.
        """
        rows, columns = self._index(self.of, i), self._index(self.on, j)
        products = self.of.columns(rows).T @ self.on.columns(columns)
        return self._entries(products, self.of.sd[rows], self.on.sd[columns], masked)

    def row(self, i: int, *, masked: bool = False) -> Float64[np.ndarray, " on"]:
        """The influence of unit ``i`` on every unit of ``on``."""
        rows = self._one(self.of, i)
        return self._entries(self.on.product(self.of.columns(rows)), self.of.sd[rows], self.on.sd, masked)[0]

    def column(self, j: int, *, masked: bool = False) -> Float64[np.ndarray, " of"]:
        """The influence of every unit of ``of`` on unit ``j``."""
        columns = self._one(self.on, j)
        products = self.of.product(self.on.columns(columns)).T
        return self._entries(products, self.of.sd, self.on.sd[columns], masked)[:, 0]

    def stderr(self, i: Any, j: Any) -> Float64[np.ndarray, "i j"]:
        """Standard errors of ``block(i, j)``, from the spread of its parts over (chain, block of draws).

        Of a correlation to first order, with a and b the losses over their standard deviations: the spread of
        mean(a b) - rho mean(a^2 + b^2) / 2. A block is an eighth of a chain's draws, which must be long against their
        correlation time. About ``noise_floor`` where rho is 0 and the draws of the losses are normal.
        """
        rows, columns = self._index(self.of, i), self._index(self.on, j)
        left, right = self.of.columns(rows), self.on.columns(columns)
        if self.normalized:
            left, right = left / self.of.sd[rows], right / self.on.sd[columns]
        rho, parts = np.clip(left.T @ right / self.of.degrees, -1, 1), []
        for draws in self.of.blocks:
            a, b = left[draws], right[draws]
            parts.append(a.T @ b / len(a))
            if self.normalized:
                parts[-1] -= rho * ((a**2).mean(0)[:, None] + (b**2).mean(0)) / 2
        return np.std(parts, axis=0, ddof=1) / math.sqrt(len(parts))

    def top(self, j: int, k: int = 10) -> Ranking:
        """The ``k`` units of ``of`` that help unit ``j`` of ``on`` most, and the ``k`` that harm it most.

        A unit is not ranked for itself. Those below twice the noise floor, or twice their own error, are left out.
        """
        check_count("k", k, 1, "It is the number of units that help, and of those that harm.")
        column = self._one(self.on, j)
        values, spread = self.column(j), self.of.sd * self.on.sd[column]
        good = values if self.normalized else -values
        size = np.abs(good) if self.normalized else np.abs(good) / spread
        known = np.nan_to_num(size) >= _FLOORS * self.noise_floor
        if self.on is self.of:
            known[column] = False
        order = np.argsort(np.where(known, -good, 0), kind="stable")
        helps = [i for i in order[:k] if known[i] and good[i] > 0]
        harms = [i for i in order[::-1][:k] if known[i] and good[i] < 0]
        _, example, token = self.on.labels[column[0]]
        return Ranking(
            helps=self._ranked(helps, j, values),
            harms=self._ranked(harms, j, values),
            labels=self.of.labels,
            names=tuple(part.name for part in self.of.parts),
            target=f"example {example}" + (f", token {token}" if token >= 0 else ""),
            quantity=self.quantity,
        )

    def _ranked(self, units: list, j: int, values: np.ndarray) -> tuple[tuple[int, float, float], ...]:
        if not units:
            return ()
        errors = self.stderr(units, [j])[:, 0]
        rows = [(int(i), float(values[i]), float(error)) for i, error in zip(units, errors, strict=True)]
        return tuple(row for row in rows if not abs(row[1]) < _FLOORS * row[2])

    def embedding(self, dims: int = 2) -> Float64[np.ndarray, "of dims"]:
        """Coordinates of the units of ``of`` whose inner products approximate their correlations (or covariances).

        The first ``dims`` right singular vectors of the matrix of traces, times the singular values; units that do not
        change are at the origin. The sign of each coordinate is such that its largest value is positive. Takes time in
        proportion to draws^2 x units, and memory to draws^2.

        Raises:
            ValueError: ``dims`` is not from 1 to the number of draws.
        """
        return self._decomposed(dims)[1]

    def spectrum(self, dims: int = 10) -> Float64[np.ndarray, " dims"]:
        """Share of the variance that each of the first ``dims`` coordinates of the embedding has."""
        return self._decomposed(dims)[0]

    def _decomposed(self, dims: int) -> tuple[np.ndarray, np.ndarray]:
        check_count("dims", dims, 1, f"There are {self.of.num_draws} draws.", self.of.num_draws)
        values, vectors = self._eigen
        values, vectors = values[::-1][:dims], vectors[:, ::-1][:, :dims]
        scale = self._scale
        places = self.of.product(vectors).T * scale[:, None] / math.sqrt(self.of.degrees)
        signs = np.sign(places[np.abs(places).argmax(0), np.arange(dims)])
        return np.maximum(values, 0) / self._eigen[0].sum(), places * np.where(signs, signs, 1)

    @property
    def _scale(self) -> np.ndarray:
        return np.nan_to_num(1 / self.of.sd) if self.normalized else np.isfinite(self.of.sd).astype(float)

    @functools.cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        return np.linalg.eigh(self.of.gram(self._scale))

    @functools.cached_property
    def reliability(self) -> float:
        """Correlation over pairs of units that two runs of this length would have, from the halves of the chains.

        r over the pairs i != j of up to 256 units of each side, of the even chains and of the odd ones; then
        Spearman and Brown's 2 r / (1 + r). Below 0.5 the entries are mostly noise. Raises ValueError for one chain.
        """
        self._check_chains("a split-half reliability")
        rows, columns = (np.unique(np.linspace(0, t.size - 1, _SAMPLE).astype(int)) for t in (self.of, self.on))
        halves = []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            of, on = self.of.of_chains(half), self.on.of_chains(half)
            part = Influence(of, on, self.normalized, self.beta, self.nbeta, self.localization)
            halves.append(part.block(rows, columns))
        apart = np.ones(halves[0].shape, bool)
        if self.on is self.of:
            apart = rows[:, None] != columns[None]
        known = apart & np.isfinite(halves[0]) & np.isfinite(halves[1])
        if known.sum() < 3:
            return math.nan
        r = float(np.corrcoef(halves[0][known], halves[1][known])[0, 1])
        return max(-1.0, 2 * r / (1 + r)) if r > -1 else -1.0

    def plot(self, path: str | os.PathLike | None = None, groups: Sequence[str] | None = None):
        """Scatter of the first two coordinates of the embedding, coloured by ``groups`` (a name for each unit).

        Written to ``path`` if given. Returns the figure, which a notebook shows.
        """
        from slt_jax.report.influence import plot_embedding

        return plot_embedding(self, path, groups)

    def report(
        self, path: str | os.PathLike, j: int, texts: Sequence[Any], on_texts: Sequence[Any] | None = None, *,
        k: int = 10, groups: Sequence[str] | None = None, overwrite: bool = False,
    ) -> Path:  # fmt: skip
        """Write what influences unit ``j`` as one self-contained HTML page: a table, coloured texts, and a map.

        Args:
            j: a unit of ``on``.
            texts: of every example of ``of``: a string, or at token level a list with the string of each predicted
                token.
            on_texts: likewise of ``on``; default ``texts`` where both are the same data.
            k: how many that help and that harm. groups: as in ``plot``. overwrite: replace a page of slt-jax.

        Returns:
            The path of the page.

        Raises:
            ValueError: texts of other numbers of examples or tokens. FileExistsError, FileNotFoundError: as reports.
        """
        from slt_jax.report.influence import write_influence_page

        if on_texts is None and self.on is not self.of:
            raise ValueError("on_texts must be given, since what is influenced is other data than what influences it.")
        on_texts = texts if on_texts is None else on_texts
        (unit,) = self._one(self.on, j)
        return write_influence_page(self, path, int(unit), texts, on_texts, k, groups, overwrite)

    def _check_chains(self, what: str) -> None:
        if self.of.num_chains < 2:
            raise ValueError(f"{what} needs at least 2 chains, and this run has 1. Run it with num_chains=4.")

    def _index(self, traces: Traces, units: Any) -> Int[np.ndarray, " chosen"]:
        try:
            return np.atleast_1d(np.arange(traces.size)[units])
        except (IndexError, TypeError) as error:
            raise type(error)(
                f"units must be numbers from 0 to {traces.size - 1}, slices, or arrays of them, got {shown(units)}."
            ) from None

    def _one(self, traces: Traces, unit: Any) -> Int[np.ndarray, " 1"]:
        if isinstance(unit, bool) or not isinstance(unit, int | np.integer):
            raise TypeError(f"a unit must be one number from 0 to {traces.size - 1}, got {shown(unit)}.")
        return self._index(traces, int(unit)).reshape(1)

    def _entries(self, products: np.ndarray, left: np.ndarray, right: np.ndarray, masked: bool) -> np.ndarray:
        covariance, spread = products / self.of.degrees, left[:, None] * right[None]
        correlation = covariance / spread
        found = np.clip(correlation, -1, 1) if self.normalized else -covariance
        return np.where(np.abs(correlation) >= _FLOORS * self.noise_floor, found, np.nan) if masked else found
