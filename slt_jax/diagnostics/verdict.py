"""Is this estimate to be believed? All checks of a run, and the verdict that follows from them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from slt_jax.diagnostics.checks import Check, Fault
from slt_jax.diagnostics.convergence import (
    effective_draws,
    error_of_the_mean,
    finite_chains,
    hot_starts,
    rhat,
    rise,
    trend,
    unrelaxed_bias,
    usable_draws,
    virial,
)
from slt_jax.diagnostics.evidence import Evidence, Sample, sample_of
from slt_jax.diagnostics.sensitivity import bounded
from slt_jax.diagnostics.validity import (
    acceptance,
    below_chance,
    degree,
    heat_in_a_metric,
    hidden_directions,
    kinetic_temperature,
    localization_slope,
    lower_loss,
    nbeta_slope,
    noise_bias,
    resolution,
    slope_at_center,
    spread_of_losses,
    step_size_bias,
)

Rule = Callable[[Sample], Check]

# As a page shows them.
CHECKS: tuple[Rule, ...] = (
    finite_chains, usable_draws, rhat, effective_draws, error_of_the_mean, trend, rise, hot_starts, virial,
    unrelaxed_bias, kinetic_temperature, heat_in_a_metric, acceptance, step_size_bias, noise_bias, spread_of_losses,
    resolution, below_chance, hidden_directions, nbeta_slope, localization_slope, lower_loss, slope_at_center, degree,
)  # fmt: skip

# A run that fails one of these has no other fault: what is left says little.
DECISIVE: tuple[Rule, ...] = (finite_chains, usable_draws)

# The verdict is the first fault, in this order. Of checks in one group, which ask the same question, the first speaks.
PRECEDENCE: tuple[tuple[Rule, ...], ...] = (
    (resolution,),
    (below_chance,),
    (lower_loss, slope_at_center),
    (unrelaxed_bias,),
    (trend, rise),
    (hot_starts, rhat),
    (virial,),
    (hidden_directions,),
    (error_of_the_mean, effective_draws),
    (kinetic_temperature, heat_in_a_metric, step_size_bias, noise_bias),
    (spread_of_losses,),
    (degree, nbeta_slope, localization_slope),
)

CONVERGED = Fault("converged", "trend, R-hat, bias and sensitivities are all in order.")

# At nbeta = 0 the LLC is 0, and the draws can only fail to be draws.
OF_CONTROL: tuple[Rule, ...] = (finite_chains, usable_draws, rhat)
CONTROL = Fault("converged", "nbeta = 0: a control; draws from the localization alone.")


@dataclass(frozen=True, kw_only=True)
class Health:
    """Convergence numbers of the draws ``nbeta (L_m(w_t) - L_m(w*))``.

    ``ess``: effective number of independent draws over all chains. ``rhat``: split R-hat. ``trend``: mean of the
    second half less mean of the first, in units of the LLC; ``trend_z``: the same over its standard error.
    ``bracket``: means of the chains started at w* and of those started hot, NaN without such. ``verdict``: few words;
    ``reason``: why, and what to do. ``extrapolated``: where a moving estimate would end, NaN otherwise, and
    ``extrapolated_stderr``: its standard error. ``flags``: the
    verdicts of all faults, the verdict first; none where it converged. ``checks``: every number beside its limit.
    """

    ess: float
    rhat: float
    trend: float
    trend_z: float
    evidence: Evidence
    bracket: tuple[float, float]
    verdict: str
    reason: str
    extrapolated: float = math.nan
    extrapolated_stderr: float = math.nan
    flags: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    def __repr__(self) -> str:
        failed = f"{sum(check.ok is False for check in self.checks)} of {len(self.checks)} checks failed"
        return f"<Health: {self.verdict}; R-hat {self.rhat:.3f}, ESS {self.ess:,.0f}; {failed}>"

    @property
    def virial(self) -> float:
        return self.evidence.virial

    def numbers(self, llc: float) -> dict[str, float]:
        """Every number of the checks by its name in JSON, NaN where it is not known; ``llc``: the estimate."""
        e = self.evidence
        slopes = {
            "nbeta_slope": bounded(e.nbeta_slope, llc), "localization_slope": bounded(e.localization_slope, llc),
            "degree": e.degree, "tilt": e.tilt,
        }  # fmt: skip
        return {
            "rhat": self.rhat, "ess": self.ess, "trend": self.trend, "virial": e.virial, "kinetic": e.kinetic,
            "acceptance": e.acceptance, "from_center": self.bracket[0], "from_hot": self.bracket[1],
            "extrapolated": self.extrapolated, "extrapolated_stderr": self.extrapolated_stderr,
            **{name: slope.value for name, slope in slopes.items()},
            **{f"{name}_stderr": slope.stderr for name, slope in slopes.items()},
            "held": e.localized_share, "owed": e.unrelaxed_bias,
        }  # fmt: skip


def assess(draws: np.ndarray, evidence: Evidence, *, control: bool = False) -> Health:
    """The Health of ``draws`` (chain, draw), of the chains that stayed finite.

    ``control``: whether nbeta is 0, and the draws are L_m(w_t) - L_m(w*).
    """
    sample = sample_of(draws, evidence)
    checks = {rule: rule(sample) for rule in (OF_CONTROL if control else CHECKS)}
    faults = list(_faults(checks))
    verdict, reason, end = faults[0] if faults else CONTROL if control else CONVERGED
    flags = tuple(dict.fromkeys(fault.verdict for fault in faults))
    if len(flags) > 1:
        reason += f" Also: {', '.join(flags[1:])}."
    return Health(
        ess=sample.ess, rhat=sample.rhat, trend=sample.trend, trend_z=sample.trend_z, evidence=evidence,
        bracket=sample.bracket, verdict=verdict, reason=reason, extrapolated=end.value,
        extrapolated_stderr=end.stderr, flags=flags,
        checks=tuple(checks.values()),
    )  # fmt: skip


def _faults(checks: dict[Rule, Check]) -> Iterator[Fault]:
    """In the order of precedence."""
    for rule in DECISIVE:
        if fault := checks[rule].fault:
            yield fault
            return
    for group in PRECEDENCE:
        faults = (checks[rule].fault for rule in group if rule in checks)
        if fault := next(filter(None, faults), None):
            yield fault
