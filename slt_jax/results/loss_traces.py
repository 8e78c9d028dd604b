"""Observed values of many examples or tokens as a matrix of centered columns (draw x unit), read piece by piece."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from slt_jax.results.observed import Observed, block_edges

_CHUNK = 1 << 25  # numbers of the matrix that are held at once, beside the values themselves
_WINDOW = 6.0
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Traces:
    """Values of the units of one or more observables at the draws of one run.

    A unit is an example, or a token that counts. Column i is its value at all draws, less the mean over all draws, or
    with ``within`` over those of the same chain. Nothing of the size units x units is ever made.

    Args:
        parts: observables of the same draws. level: "example" sums over the tokens of a text; "token" keeps them apart.
        within: whether every chain is centered at its own mean.
    """

    parts: tuple[Observed, ...]
    level: str
    within: bool = False

    def __post_init__(self):
        first = self.parts[0]
        if any(part.gap.shape != first.gap.shape or not np.array_equal(part.gap, first.gap) for part in self.parts):
            raise ValueError("the observables are not of the same draws. Observe all of them in one run.")

    @property
    def num_chains(self) -> int:
        return len(self.parts[0].gap)

    @property
    def num_draws(self) -> int:
        """Draws of all chains."""
        return self.parts[0].gap.size

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, "unit 3"]:
        """(number of the observable, example, token) of each unit; token -1 where the unit is an example."""
        found = []
        for number, part in enumerate(self.parts):
            if self.level == "token":
                places = np.argwhere(np.ones(part.center.shape, bool) if part.valid is None else part.valid)
            else:
                places = np.stack([np.arange(len(part.center)), np.full(len(part.center), -1)], 1)
            found.append(np.insert(places, 0, number, axis=1))
        return np.concatenate(found)

    @property
    def size(self) -> int:
        return len(self.labels)

    @property
    def blocks(self) -> list[slice]:
        """Rows of the matrix of each block of each chain."""
        length = self.num_draws // self.num_chains
        edges = block_edges(length)
        return [
            slice(chain * length + start, chain * length + stop)
            for chain in range(self.num_chains)
            for start, stop in itertools.pairwise(edges)
        ]

    def pieces(self) -> Iterator[tuple[int, slice, Float[np.ndarray, "draw unit"]]]:
        """(chain, rows of the matrix, values that are not centered)."""
        length = self.parts[0].gap.shape[1]
        every = [_units_of(part, self.level, part.pieces()) for part in self.parts]
        if len(every) > 1:
            every = [_aligned(every, length, self.num_chains)]
        for chain, draws, values in every[0]:
            yield chain, slice(chain * length + draws.start, chain * length + draws.stop), values

    @functools.cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of each chain, (chain, unit), and sum of squares around it, (unit,)."""
        count = np.zeros(self.num_chains)
        mean, squares = np.zeros((self.num_chains, self.size)), np.zeros(self.size)
        for chain, _, values in self.pieces():
            x = values.astype(np.float64)
            new, center = len(x), x.mean(0)
            share = new / (count[chain] + new)
            step = center - mean[chain]
            squares += ((x - center) ** 2).sum(0) + count[chain] * share * step**2
            mean[chain] += share * step
            count[chain] += new
        return mean, squares

    @property
    def chain_means(self) -> Float64[np.ndarray, "chain unit"]:
        return self._sums[0]

    @functools.cached_property
    def mean(self) -> Float64[np.ndarray, " unit"]:
        """Over all draws."""
        return self._sums[0].mean(0)

    @functools.cached_property
    def between(self) -> Float64[np.ndarray, " unit"]:
        """Sum of squares of the chain means around the mean, over all draws."""
        return ((self.chain_means - self.mean) ** 2).sum(0) * self.num_draws / self.num_chains

    @property
    def total(self) -> Float64[np.ndarray, " unit"]:
        """Sum of squares of all draws around their mean."""
        return self._sums[1] + self.between

    @functools.cached_property
    def sd(self) -> Float64[np.ndarray, " unit"]:
        """Standard deviation of each column; NaN where the value changes by no more than its rounding."""
        squares = self._sums[1] if self.within else self.total
        found = np.sqrt(squares / self.degrees)
        return np.where(found > _ROUNDING * np.abs(self.mean), found, np.nan)

    @property
    def degrees(self) -> int:
        """Draws less the means that were subtracted."""
        return self.num_draws - (self.num_chains if self.within else 1)

    def _center_of(self, chain: int) -> np.ndarray:
        return self.chain_means[chain] if self.within else self.mean

    def columns(self, units: Any) -> Float64[np.ndarray, "draw chosen"]:
        """The centered columns of these units."""
        chosen = np.atleast_1d(np.arange(self.size)[units])
        found = np.empty((self.num_draws, len(chosen)))
        for chain, rows, values in self.pieces():
            found[rows] = values[:, chosen].astype(np.float64) - self._center_of(chain)[chosen]
        return found

    def product(self, left: Float64[np.ndarray, "draw k"]) -> Float64[np.ndarray, "k unit"]:
        """left' A, with A the matrix of centered columns, in one pass over the values."""
        found = np.zeros((left.shape[1], self.size))
        for chain, rows, values in self.pieces():
            part = np.ascontiguousarray(left[rows], np.float32)
            scale = float(np.abs(part).max()) or 1.0  # far from the ends of float32
            centered = values - self._center_of(chain).astype(np.float32)
            found += scale * ((part / scale).T @ centered).astype(np.float64)
        return found

    def gram(self, scale: Float64[np.ndarray, " unit"]) -> Float64[np.ndarray, "draw draw"]:
        """A S^2 A' for S the diagonal matrix ``scale``: of the size of the draws, over blocks of units."""
        found = np.zeros((self.num_draws, self.num_draws))
        step = max(1, _CHUNK // self.num_draws)
        for start in range(0, self.size, step):
            units = slice(start, start + step)
            part = self.columns(units) * scale[units]
            found += part @ part.T
        return found

    def of_chains(self, chains: slice) -> "Traces":
        """Of some of the chains."""
        parts = [dataclasses.replace(p, values=_Chosen(p.values, chains), gap=p.gap[chains]) for p in self.parts]
        return Traces(tuple(parts), self.level, self.within)

    @functools.cached_property
    def autocorrelation(self) -> Float64[np.ndarray, " lag"]:
        """Mean over units of the autocorrelation of their columns within a chain, from lag 0 on."""
        chosen = np.unique(np.linspace(0, self.size - 1, 256).astype(int))
        chosen = chosen[np.isfinite(self.sd[chosen])]
        length = self.num_draws // self.num_chains
        x = self.columns(chosen).reshape(self.num_chains, length, -1)
        x = x - x.mean(1, keepdims=True)
        power = np.abs(np.fft.rfft(x, 2 * length, axis=1)) ** 2
        covariance = np.fft.irfft(power, axis=1)[:, :length].mean(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean(covariance / covariance[0], axis=1) if len(chosen) else np.ones(1)


def effective_draws(left: Traces, right: Traces) -> float:
    """The number of independent draws that determine a covariance of two units as well. By Bartlett's formula

        draws / (1 + 2 sum_k rho(k) rho'(k)),   rho, rho' the mean autocorrelations of the units of both sides.

    The sum goes on as long as it grows fast, until the lag is six times the whole (Sokal's window): draws that swing
    around a minimum have autocorrelations that change their sign and still add up.

    Source: Bartlett, J. R. Statist. Soc. Suppl. 8 (1946), 27-41.
    """
    a, b = left.autocorrelation, right.autocorrelation
    length = min(len(a), len(b))
    times = 1 + 2 * np.cumsum(a[1:length] * b[1:length])
    enough = np.arange(1, length) >= _WINDOW * times
    end = int(np.argmax(enough)) if enough.any() else len(times) - 1
    time = float(times[end]) if len(times) else 1.0
    return min(left.num_draws / time, left.num_draws) if time > 0 else math.nan


@dataclass(frozen=True)
class _Chosen:
    """Values of some of the chains, which are read when they are asked for."""

    values: Any
    chains: slice

    def __getitem__(self, at: tuple[int, slice]) -> np.ndarray:
        chain, draws = at
        every = range(*self.chains.indices(10**9))
        return self.values[every[chain], draws]


def _units_of(part: Observed, level: str, pieces: Iterator) -> Iterator[tuple[int, slice, np.ndarray]]:
    for chain, draws, values in pieces:
        if level == "token":
            values = values.reshape(len(values), -1) if part.valid is None else values[:, part.valid]
        elif values.ndim == 3:
            values = part.summed(values)
        yield chain, draws, values


def _aligned(every: list, length: int, chains: int) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Pieces of several observables side by side, chain by chain."""
    waiting: list[list] = [[] for _ in every]
    for chain in range(chains):
        for source, held in zip(every, waiting, strict=True):
            held.clear()
            while sum(len(x) for x in held) < length:
                held.append(next(source)[2])
        yield chain, slice(0, length), np.concatenate([np.concatenate(held) for held in waiting], axis=1)
