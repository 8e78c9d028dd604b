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
from slt_jax.diagnostics.validity import (
    acceptance,
    below_chance,
    degree,
    heat_in_a_metric,
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
    resolution, below_chance, nbeta_slope, localization_slope, lower_loss, slope_at_center, degree,
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
    (error_of_the_mean, effective_draws),
    (kinetic_temperature, heat_in_a_metric, step_size_bias, noise_bias),
    (spread_of_losses,),
    (degree, nbeta_slope, localization_slope),
)

CONVERGED = Fault("converged", "trend, R-hat, bias and sensitivities are all in order.")


@dataclass(frozen=True, kw_only=True)
class Health:
    """Convergence numbers of the draws ``nbeta (L_m(w_t) - L_m(w*))``.

    ``ess``: effective number of independent draws over all chains. ``rhat``: split R-hat. ``trend``: mean of the
    second half less mean of the first, in units of the LLC; ``trend_z``: the same over its standard error.
    ``bracket``: means of the chains started at w* and of those started hot, NaN without such. ``verdict``: few words;
    ``reason``: why, and what to do. ``extrapolated``: where a moving estimate would end, NaN otherwise. ``flags``: the
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
    flags: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    def __repr__(self) -> str:
        failed = f"{sum(check.ok is False for check in self.checks)} of {len(self.checks)} checks failed"
        return f"<Health: {self.verdict}; R-hat {self.rhat:.3f}, ESS {self.ess:,.0f}; {failed}>"

    @property
    def virial(self) -> float:
        return self.evidence.virial


def assess(draws: np.ndarray, evidence: Evidence) -> Health:
    """The Health of ``draws`` (chain, draw), of the chains that stayed finite."""
    sample = sample_of(draws, evidence)
    checks = {rule: rule(sample) for rule in CHECKS}
    faults = list(_faults(checks))
    verdict, reason, end = faults[0] if faults else CONVERGED
    flags = tuple(dict.fromkeys(fault.verdict for fault in faults))
    if len(flags) > 1:
        reason += f" Also: {', '.join(flags[1:])}."
    return Health(
        ess=sample.ess, rhat=sample.rhat, trend=sample.trend, trend_z=sample.trend_z, evidence=evidence,
        bracket=sample.bracket, verdict=verdict, reason=reason, extrapolated=end, flags=flags,
        checks=tuple(checks.values()),
    )  # fmt: skip


def _faults(checks: dict[Rule, Check]) -> Iterator[Fault]:
    """In the order of precedence."""
    for rule in DECISIVE:
        if fault := checks[rule].fault:
            yield fault
            return
    for group in PRECEDENCE:
        faults = (checks[rule].fault for rule in group)
        if fault := next(filter(None, faults), None):
            yield fault
