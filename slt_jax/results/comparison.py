"""Which of two solutions the posterior prefers, and the size of the data set at which that changes."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from slt_jax.results.llc import LLCResult
from slt_jax.results.text import estimate_text, marked

LEVEL = 0.9
_RESAMPLES = 20_000


class Switch(NamedTuple):
    """The data size at which the preference changes, and an interval with a fraction ``LEVEL`` of the resamples."""

    num_data: float
    low: float
    high: float


@dataclass(frozen=True)
class Solution:
    """One side of a comparison. Losses are in nats per example; ``loss_stderr`` is the error from the minibatches."""

    loss: float
    loss_stderr: float
    llc: float
    llc_stderr: float
    verdict: str

    @classmethod
    def of(cls, result: LLCResult) -> "Solution":
        """Loss and LLC of a result.

        The batches of different draws and chains are independent, so that the standard error is that of a mean of
        independent numbers. It is 0 if the baseline is the loss over all data.
        """
        kept = result.traces.baseline[result.kept_chains].astype(np.float64)
        error = float(kept.std(ddof=1) / math.sqrt(kept.size)) if kept.size > 1 else math.nan
        return cls(result.init_loss, error, result.llc, result.llc_stderr, result.verdict)

    def free_energy(self, n: float) -> float:
        """n L(w*) + llc log n at ``n`` examples, nats."""
        return n * self.loss + self.llc * math.log(n)


@dataclass(frozen=True)
class Comparison:
    """Free energies of two solutions a and b, nats: F(n) = n L(w*) + llc log n. The posterior prefers the lower.

    ``switch``: where the sign of F_a - F_b changes; None if it does not. ``no_switch``: fraction of resamples of losses
    and LLCs, within their errors, in which it does not; NaN if an error is unknown. ``notes``: settings in which the
    two estimates differ.
    """

    a: Solution
    b: Solution
    num_data: float
    switch: Switch | None
    no_switch: float
    notes: tuple[str, ...]

    def free_energy(self, n: float | None = None) -> tuple[float, float]:
        """(F_a, F_b) at ``n`` examples; default ``num_data``. Raises ValueError unless n > 1."""
        n = self._size(n)
        return self.a.free_energy(n), self.b.free_energy(n)

    def difference(self, n: float | None = None) -> tuple[float, float]:
        """F_a - F_b = n (L_a - L_b) + (llc_a - llc_b) log n, and its standard error. If negative, a is preferred."""
        n = self._size(n)
        a, b, log_n = self.a, self.b, math.log(n)
        value = n * (a.loss - b.loss) + (a.llc - b.llc) * log_n
        errors = n * a.loss_stderr, n * b.loss_stderr, log_n * a.llc_stderr, log_n * b.llc_stderr
        return value, math.hypot(*errors)

    def prefers(self, n: float | None = None) -> Literal["a", "b", "neither"]:
        """The solution with the lower free energy; "neither" if they are equal."""
        value = self.difference(n)[0]
        return "a" if value < 0 else "b" if value > 0 else "neither"

    def _size(self, n: float | None) -> float:
        return self.num_data if n is None else _checked_size("n", n)

    def __repr__(self) -> str:
        return f"<Comparison: {str(self).splitlines()[0]}>"

    def __str__(self) -> str:
        value, error = self.difference()
        lines = [f"At n = {_count(self.num_data)} {_winner_text(self.prefers(), abs(value), error)}."]
        for name, side, energy in zip("ab", (self.a, self.b), self.free_energy(), strict=True):
            llc, loss = (estimate_text(*x, "+/-") for x in ((side.llc, side.llc_stderr), (side.loss, side.loss_stderr)))
            llc = marked(llc, side.verdict)
            lines.append(f"{name}: LLC {llc}, loss {loss} nats per example; free energy {energy:.6g} nats.")
        lines.append(self._switch_text())
        for name, side in zip("ab", (self.a, self.b), strict=True):
            if side.verdict != "converged":
                lines.append(f"Note: the verdict of {name} is '{side.verdict}'; the error bars do not include that.")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def _switch_text(self) -> str:
        certainty = "without an error bar"
        if not math.isnan(self.no_switch):
            certainty = f"no switch in {self.no_switch:.0%} of the resamples"
        if self.switch is None:
            winner = {"a": "a is preferred", "b": "b is preferred", "neither": "they are equal"}[self.prefers()]
            return f"No switch: {winner} at every n ({certainty})."
        at, low, high = map(_count, self.switch)
        if not math.isnan(self.switch.low):
            certainty = f"{LEVEL:.0%} interval {low} to {high}; {certainty}"
        below, above = ("b", "a") if self.a.loss < self.b.loss else ("a", "b")
        return f"They switch at n = {at} ({certainty}): {below} below it, {above} above it."

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON; NaN becomes None."""
        value, error = self.difference()
        sides = {name: _plain(vars(side)) for name, side in (("a", self.a), ("b", self.b))}
        switch = None if self.switch is None else _plain(self.switch._asdict())
        rest = {"num_data": self.num_data, "difference": value, "difference_stderr": error, "no_switch": self.no_switch}
        return {**sides, **_plain(rest), "prefers": self.prefers(), "switch": switch, "notes": list(self.notes)}


def compare(a: LLCResult, b: LLCResult, *, num_data: float | None = None) -> Comparison:
    """The free energies of two solutions of the same loss on the same data, and the data size where they are equal.

    F(n) = n L(w*) + llc log n, so that F_a - F_b = n (L_a - L_b) + (llc_a - llc_b) log n, nats. If the solution with
    the lower loss has the higher LLC, the difference is 0 where n / log n = c, with c = (llc_b - llc_a) / (L_a - L_b).
    The left side has its minimum e at n = e. For c > e the switch is the larger root,

        n* = -c W_{-1}(-1 / c),   W_{-1} the lower branch of Lambert's function,

    and for c <= e there is none. (The smaller root is below three examples, where no asymptotics hold.)

    Args:
        a, b: results of the two.
        num_data: n at which they are compared; default the size of their data set.

    Returns:
        Both sides, the switch and its interval: the 5 % and 95 % quantiles of the switch over those of 20,000 normal
        resamples of both losses and both LLCs, with a fixed seed, that have one.

    Raises:
        TypeError: an argument that is not a result.
        ValueError: an LLC or loss that is NaN; results of data sets of different sizes without ``num_data``.

    Error: terms of order log log n (the multiplicity) and of order 1 (volumes, the prior) are neglected, so that a
    difference of a few nats is not meaningful, however small its standard error. L is the loss over this data set; at
    another n it approximates the loss over that many examples. Its standard error is from the minibatches at which it
    was evaluated, and 0 for ``baseline="full"``. Errors of loss and LLC are treated as independent, although they come
    from the same minibatches.

    Source: Watanabe, Algebraic Geometry and Statistical Learning Theory (2009), chapter 6; for two solutions Chen et
    al., arXiv:2310.06301.
    """
    for name, result in (("a", a), ("b", b)):
        _check_result(name, result)
    sizes = a.settings.num_data, b.settings.num_data
    if num_data is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the results are of {sizes[0]} and {sizes[1]} examples; say with num_data at which n to compare them."
        )
    n = _checked_size("num_data", sizes[0] if num_data is None else num_data)
    first, second = Solution.of(a), Solution.of(b)
    switch = float(_sign_change(first.loss - second.loss, first.llc - second.llc))
    low, high, none = _resampled(first, second)
    return Comparison(
        a=first,
        b=second,
        num_data=n,
        switch=None if math.isnan(switch) else Switch(switch, low, high),
        no_switch=none,
        notes=_different_settings(a, b),
    )


def _sign_change(loss: Any, llc: Any) -> Float64[np.ndarray, " *resample"]:
    """The n > e at which n loss + llc log n changes its sign; NaN if there is none."""
    from scipy.special import lambertw

    with np.errstate(divide="ignore", invalid="ignore"):
        c = -np.asarray(llc, np.float64) / np.asarray(loss, np.float64)
        exists = (c > math.e) & np.isfinite(c)
        ratio = np.where(exists, c, math.inf)
        return np.where(exists, -c * lambertw(-1 / ratio, -1).real, math.nan)


def _resampled(a: Solution, b: Solution) -> tuple[float, float, float]:
    """(low, high, fraction of resamples without a switch); the interval is over the other resamples."""
    errors = math.hypot(a.loss_stderr, b.loss_stderr), math.hypot(a.llc_stderr, b.llc_stderr)
    if not all(map(math.isfinite, errors)):
        return math.nan, math.nan, math.nan
    noise = np.random.default_rng(0).standard_normal((2, _RESAMPLES))
    switches = _sign_change(a.loss - b.loss + errors[0] * noise[0], a.llc - b.llc + errors[1] * noise[1])
    existing = switches[~np.isnan(switches)]
    none = 1 - existing.size / switches.size
    if not existing.size:
        return math.nan, math.nan, none
    low, high = np.quantile(existing, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), none


def _different_settings(a: LLCResult, b: LLCResult) -> tuple[str, ...]:
    """Settings that an LLC may depend on and that differ between the two estimates."""
    values = {
        name: (getattr(a.settings, name), getattr(b.settings, name)) for name in ("num_data", "nbeta", "localization")
    }
    return tuple(f"{name} is {x:g} for a and {y:g} for b." for name, (x, y) in values.items() if x != y)


def _check_result(name: str, result: Any) -> None:
    if not isinstance(result, LLCResult):
        raise TypeError(f"{name} must be an LLCResult, got a {type(result).__name__}. Pass what estimate_llc returned.")
    if not (math.isfinite(result.llc) and math.isfinite(result.init_loss)):
        raise ValueError(
            f"{name} has LLC {result.llc} and loss {result.init_loss} (verdict '{result.verdict}'), so it has no "
            "free energy. Estimate it again with a smaller step_size, so that a chain stays finite."
        )


def _checked_size(name: str, n: float) -> float:
    if not (n > 1 and math.isfinite(n)):
        raise ValueError(f"{name} must be a number of examples above 1, got {n}: log n is not positive below.")
    return n


def _winner_text(winner: str, difference: float, error: float) -> str:
    if winner == "neither":
        return "the two have the same free energy"
    nats = f"{estimate_text(difference, error, '+/-')} nats"
    significance = f" ({difference / error:.1f} standard errors)" if error > 0 else ""
    return f"the posterior prefers {winner}: its free energy is lower by {nats}{significance}"


def _count(n: float) -> str:
    return f"{n:,.0f}" if n < 1e12 else f"{n:.3g}"


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
