"""Is this estimate to be believed? Sensitivities, and the verdict."""

import math
from dataclasses import dataclass

import numpy as np

from slt_jax.diagnostics.bias import Bias
from slt_jax.diagnostics.sensitivity import UNKNOWN, Slope, rises_with_nbeta
from slt_jax.diagnostics.series import Rise, ess_and_rhat, extrapolate, standard_error, trend_of

RHAT_LIMIT = 1.05
TREND_SIGMA = 3.0
OWED_LIMIT = 0.03  # of the estimate, that slow directions may owe
RISE_LIMIT = 0.03  # of the estimate, in one more doubling of the run
BIAS_LIMIT = 0.15
SLOPE_LIMIT = 0.05
TILT_LIMIT = 0.03  # of the estimate, that chains may gain by running downhill from w*
TILT_SIGMA = 4.0
KINETIC_LIMIT = 0.15
KINETIC_LIMIT_METRIC = 0.05  # where all directions are about as stiff as the stiffest
HEAT_SIGMA = 4.0
VIRIAL_LIMIT = 0.2
SLOPE_SIGMA = 2.5
_SPIKE_LIMIT = 4.0
DEGREE_LIMIT = 6.25  # x^2 y^4 has 6
HELD_DEGREE_LIMIT = 4.0  # where the localization holds more directions than the loss
ERROR_LIMIT = 0.11
_FEW = 30  # effective draws, whose error bar is itself not known well


_UNSEEN = Rise()


@dataclass(frozen=True)
class Evidence:
    """What the verdict rests on beside the draws. NaN where unknown.

    ``virial``: mean <w - w*, G> over d + (step_size / 4) mean G'PG, 1 when stationary. ``kinetic``: mean kinetic
    temperature, 1 when right. ``acceptance``: Metropolis acceptance of one Euler-Maruyama step of this step_size.
    ``bias``: of the raw estimate. ``nbeta_slope``, ``localization_slope``: d LLC / d log nbeta, d LLC / d log
    localization. ``degree``: see ``degree_of``. ``held``: 1 - mean <w - w*, nbeta grad L> / d, the share of the
    directions that the localization holds and not the loss. ``hot``: which of the chains started hot. ``num_free``: d.
    ``metric``: whether the chains moved in a metric's coordinates. ``heat``: what ``thermometer`` found, as an LLC.
    ``rise``: of the chains started at w*, from doubling to doubling of the run. ``tilt``: see ``tilt_of``.
    ``owed``, ``longer``: see ``reach.debt``.
    """

    virial: float = math.nan
    kinetic: float = math.nan
    acceptance: float = math.nan
    bias: Bias | None = None
    nbeta_slope: Slope = UNKNOWN
    localization_slope: Slope = UNKNOWN
    degree: Slope = UNKNOWN
    held: float = math.nan
    hot: np.ndarray | None = None
    num_stopped: int = 0
    num_free: int = 1
    metric: bool = False
    heat: Slope = UNKNOWN
    rise: Rise = _UNSEEN
    tilt: Slope = UNKNOWN
    owed: float = math.nan
    longer: float = math.nan


@dataclass(frozen=True)
class Health:
    """Convergence numbers of the draws ``nbeta (L_m(w_t) - L_m(w*))``.

    ``ess``: effective number of independent draws over all chains. ``rhat``: split R-hat. ``trend``: mean of the
    second half less mean of the first, in units of the LLC; ``trend_z``: the same over its standard error.
    ``bracket``: means of the chains started at w* and of those started hot, NaN without such. ``verdict``: few words;
    ``reason``: why, and what to do. ``extrapolated``: where a moving estimate would end, NaN otherwise.
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

    @property
    def virial(self) -> float:
        return self.evidence.virial


def is_dependent(evidence: Evidence, size: float) -> bool:
    """Whether an estimate of this size rises too much with nbeta."""
    degree = float(np.clip(evidence.degree.value, 2.0, DEGREE_LIMIT))
    found = rises_with_nbeta(evidence.nbeta_slope, evidence.localization_slope, degree)
    return any(x.value > max(SLOPE_SIGMA * x.stderr, SLOPE_LIMIT * size) for x in found)


def is_tilted(tilt: Slope, size: float) -> bool:
    """Whether an estimate of this size lacks too much because w* lies on a slope."""
    return -tilt.value > max(TILT_LIMIT * size, TILT_SIGMA * tilt.stderr)


def assess(draws: np.ndarray, evidence: Evidence) -> Health:
    """The Health of ``draws`` (chain, draw), of the chains that stayed finite."""
    ess, rhat = ess_and_rhat(draws)
    trend, trend_z = trend_of(draws)
    bracket = (math.nan, math.nan)
    if evidence.hot is not None and evidence.hot.any() and not evidence.hot.all():
        bracket = (float(draws[~evidence.hot].mean()), float(draws[evidence.hot].mean()))
    facts = Health(ess, rhat, trend, trend_z, evidence, bracket, "", "")
    found = _findings(draws, facts)
    if not found:
        found = [("converged", "trend, R-hat, bias and sensitivities are all in order.", math.nan)]
    verdict, reason, end = found[0]
    flags = tuple(dict.fromkeys(name for name, *_ in found if name != "converged"))
    if len(flags) > 1:
        reason += f" Also: {', '.join(flags[1:])}."
    return Health(ess, rhat, trend, trend_z, evidence, bracket, verdict, reason, end, flags)


def _findings(draws: np.ndarray, facts: Health) -> list[tuple[str, str, float]]:
    """(verdict, reason and remedy, extrapolated end) of every rule that speaks; the first is the verdict."""
    for rule in (_diverged, _too_short):
        if found := rule(draws, facts):
            return [(found[0], found[1], math.nan)]
    rules = (_no_minimum, _owing, _moving, _apart, _unexplored, _unsure, _biased, _spiking, _dependent)
    found = [rule(draws, facts) for rule in rules]
    return [(f[0], f[1], f[2] if len(f) == 3 else math.nan) for f in found if f]


def _diverged(draws, facts):
    stopped = facts.evidence.num_stopped
    if draws.shape[0] == 0:
        return "diverged", "every chain went non-finite; take a smaller step_size."
    if stopped:
        return "diverged", f"{stopped} chains went non-finite and are left out; take a smaller step_size."


def _too_short(draws, facts):
    if math.isnan(facts.ess) and draws.shape[1] >= 4:
        return "too few draws", (
            "the loss is the same at every draw: the chains did not move, or nothing that is free changes it. Take a "
            "larger step_size, or leave it out; see that the mask leaves free what the loss depends on."
        )
    if math.isnan(facts.ess):
        return "too few draws", "an error bar needs at least 4 draws a chain."


def _no_minimum(draws, facts):
    mean, error = draws.mean(), standard_error(draws, facts.ess)
    count = max(1, draws.shape[1] // 8)
    lows = np.array([part.mean() for part in np.array_split(draws, max(1, draws.shape[1] // count), axis=1)])
    part_error = error * math.sqrt(len(lows))
    if mean < -2 * error or lows.min() < -5 * part_error:
        return "not a minimum", "the chains found lower loss than w*; train further, or raise localization."
    tilt, bias = facts.evidence.tilt, facts.evidence.bias
    if is_tilted(tilt, abs(mean)):
        around = mean - tilt.value - (bias.applied if bias else 0.0)
        return "not a minimum", (
            f"the loss slopes at w*, and the chains gain {-tilt.value:.3g} by going down: around the minimum nearby "
            f"the estimate would be about {around:.4g}. Train further, or raise localization."
        )


def _owing(draws, facts):
    owed, mean = facts.evidence.owed, float(draws.mean())
    falls = facts.trend_z < -TREND_SIGMA  # from somewhere else than w*
    if owed > OWED_LIMIT * abs(mean) and not falls:
        times = facts.evidence.longer
        remedy = f"Raise the budget {times:.2g} times" if times < 100 else "Take a longer step_size, or leave it out"
        text = (
            f"by the curvatures at w*, soft directions that relax more slowly than these chains run owe {owed:.3g}: it "
            f"would end near {mean + owed:.4g} (extrapolated). {remedy}, or raise localization."
        )
        return "still rising", text, mean + owed


def _moving(draws, facts):
    mean = draws.mean()
    if abs(facts.trend_z) > TREND_SIGMA and abs(facts.trend) > 0.02 * abs(mean):
        end = extrapolate(draws)
        where = f"it would end near {end:.4g} (extrapolated)" if math.isfinite(end) else "where it ends cannot be said"
        text = (
            f"the second half of the draws is {facts.trend:+.3g} from the first ({facts.trend_z:+.1f} standard "
            f"errors); {where}. Raise num_warmup or the budget."
        )
        return ("still rising" if facts.trend > 0 else "still falling"), text, end
    rise = facts.evidence.rise
    if rise.mean > TREND_SIGMA * rise.stderr and rise.next > RISE_LIMIT * abs(mean):
        return "still rising", (
            f"of the chains started at w*, the last two doublings of the run added {rise.before:+.3g} and "
            f"{rise.value:+.3g}: they are still spreading in soft directions. Raise the budget, or localization."
        )


def _apart(draws, facts):
    cold, hot = facts.bracket
    if math.isfinite(hot):
        which = facts.evidence.hot
        errors = [standard_error(part, ess_and_rhat(part)[0]) for part in (draws[which], draws[~which])]
        gap = abs(hot - cold)
        if gap > 4 * math.hypot(*errors) and gap > 0.05 * abs(draws.mean()):
            return "chains disagree", (
                f"chains started at w* read {cold:.4g} and those started hot {hot:.4g}: the answer lies between, if "
                "the hot ones did not leave the neighbourhood. Raise the budget or num_warmup, or raise localization."
            )
    if facts.rhat > RHAT_LIMIT:
        return "chains disagree", f"R-hat {facts.rhat:.3f} is above {RHAT_LIMIT}; draw more, or raise num_warmup."


def _unexplored(draws, facts):
    """Flat directions relax long after the LLC has settled; but not where hardly any direction has moved."""
    if facts.virial < VIRIAL_LIMIT:
        return "still rising", (
            f"the chains have come to rest in about {max(0.0, facts.virial):.0%} of the directions (virial ratio), and "
            "what the others would add is not known. Raise the budget, num_warmup or localization."
        )


def _unsure(draws, facts):
    error, size = standard_error(draws, facts.ess), abs(draws.mean())
    if error > ERROR_LIMIT * size or (facts.ess < _FEW and error > 0.02 * size):
        times = max((error / (ERROR_LIMIT * size)) ** 2 if size else math.inf, _FEW / facts.ess, 1.1)
        count = f"{times:.1f} times as many" if times < 100 else "many more"
        return "too few draws", f"{facts.ess:.0f} effective draws leave an error of {error:.2g}; draw {count}."


def _biased(draws, facts):
    bias, mean, kinetic = facts.evidence.bias, abs(draws.mean()), facts.evidence.kinetic
    if bias is None:
        return None
    explained = 2 * bias.noise / facts.evidence.num_free if math.isfinite(bias.noise) else 0.0
    if abs(kinetic - 1 - explained) > (KINETIC_LIMIT_METRIC if facts.evidence.metric else KINETIC_LIMIT):
        return "biased by the step size", (
            f"the kinetic temperature is {kinetic:.3g}, not 1: the chains do not follow this step. Halve step_size, or "
            "leave it out."
        )
    heat = facts.evidence.heat
    found = heat.value - (bias.noise if math.isfinite(bias.noise) else 0.0)
    if facts.evidence.metric and found > max(BIAS_LIMIT * mean, HEAT_SIGMA * heat.stderr):
        return "biased by the step size", (
            f"the kinetic temperature is too high by {found:.3g} of {mean:.4g}, if the directions that count are the "
            "hot ones, and minibatch noise does not explain it: the metric is of another place. Raise localization."
        )
    if abs(bias.step_size) > BIAS_LIMIT * mean:
        return "biased by the step size", (
            f"the step size adds about {bias.step_size:.3g} of {mean:.4g}, too much for a first-order correction; "
            "halve step_size, or leave it out."
        )
    if abs(bias.noise) > BIAS_LIMIT * mean:
        return "heated by minibatch noise", (
            f"noise of the minibatch gradient adds about {bias.noise:.3g} of {mean:.4g}; take a shorter step_size, "
            "more friction, a larger batch_size, or control_variate=True."
        )


def _spiking(draws, facts):
    """nbeta L has the variance LLC - d LLC / d log nbeta: about the LLC, and less while it still rises with nbeta.

    Rare excursions, of chains that a step has thrown off and that come back, make it many times as large; the mean then
    hangs on a few draws, and neither R-hat nor the thermometer need show it. A broad spread says instead that chains
    wander over slopes, as they do around weights that are no minimum.
    """
    mean, rise = draws.mean(), facts.evidence.nbeta_slope.value
    if not (facts.rhat <= RHAT_LIMIT and mean > 0 and mean - rise > _SPIKE_LIMIT * mean):
        return None
    times = f"the variance of nbeta L is {(mean - rise) / mean:.2g} times its mean, where a posterior has about 1: "
    low, high = np.quantile(draws, [0.25, 0.75])
    if ((high - low) / 1.349) ** 2 < draws.var() / _SPIKE_LIMIT:  # a normal spread would make these equal
        return "biased by the step size", (
            f"{times}chains are thrown off and come back. Halve step_size, or take a larger batch_size."
        )
    return "depends on nbeta or localization", (
        f"{times}a factor e in nbeta would move the estimate by {rise:+.3g}, as around weights that are no minimum. "
        "Train further, or raise localization."
    )


def _dependent(draws, facts):
    """Directions that the localization holds at this nbeta make the LLC rise with nbeta and fall with localization.

    Off a minimum it rises with both, and the first slope speaks for itself. Where the chains mix too slowly for slopes,
    the degree of the loss where they are still tells. A product of L layers near zero has degree 2L by right, but then
    the loss itself holds more than half of the directions: L + 1 of 2L, if the widths are equal. Where the localization
    holds more of them than the loss, a degree above a product of two layers comes from how far out it lets them go.
    """
    degree = facts.evidence.degree
    limit = HELD_DEGREE_LIMIT if facts.evidence.held > 0.5 else DEGREE_LIMIT
    if degree.value - limit > SLOPE_SIGMA * degree.stderr:
        return "depends on nbeta or localization", (
            f"where the chains are, the loss grows like the power {degree.value:.2g} of the distance to w*: they are "
            "held far from where w* decides its shape. Raise nbeta or localization until the estimate stands."
        )
    if is_dependent(facts.evidence, abs(draws.mean())):
        up, down = facts.evidence.nbeta_slope, facts.evidence.localization_slope
        return "depends on nbeta or localization", (
            f"a factor e in nbeta moves the estimate by {up.value:+.3g}, in localization by {down.value:+.3g}: it is "
            "right for this posterior, and not yet the learning coefficient. Raise nbeta, or lower localization, until "
            "it stands."
        )
