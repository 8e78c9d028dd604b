"""Is this estimate to be believed? Sensitivities, and the verdict."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slt_jax.corrections import Bias
from slt_jax.series import Rise, ess_and_rhat, extrapolate, standard_error, trend_of

RHAT_LIMIT = 1.05
TREND_SIGMA = 3.0
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
_NOISE_SHARE = 0.1  # of the variance of the loss, that minibatches may make
DEGREE_LIMIT = 6.25  # x^2 y^4 has 6
HELD_DEGREE_LIMIT = 4.0  # where the localization holds more directions than the loss
ERROR_LIMIT = 0.125


class Slope(NamedTuple):
    """A number found from the draws, such as d LLC / d log nbeta, and its standard error."""

    value: float
    stderr: float


_UNKNOWN = Slope(math.nan, math.nan)
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
    """

    virial: float = math.nan
    kinetic: float = math.nan
    acceptance: float = math.nan
    bias: Bias | None = None
    nbeta_slope: Slope = _UNKNOWN
    localization_slope: Slope = _UNKNOWN
    degree: Slope = _UNKNOWN
    held: float = math.nan
    hot: np.ndarray | None = None
    num_stopped: int = 0
    num_free: int = 1
    metric: bool = False
    heat: Slope = _UNKNOWN
    rise: Rise = _UNSEEN
    tilt: Slope = _UNKNOWN


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


def slopes(draws: np.ndarray, gap_var: np.ndarray, distance_sq: np.ndarray, nbeta: float, localization: float):
    """(d LLC / d log nbeta, d LLC / d log localization), from the draws alone.

    Derivation: with p proportional to exp(-nbeta L - localization D), D = |w - w*|^2 / 2, the derivative of E[L] by
    nbeta is -Var(L) and by localization -Cov(L, D). So LLC = nbeta (E[L] - L(w*)) has the slopes LLC - nbeta^2 Var(L)
    and -localization nbeta Cov(L, D). Var(L) is that of the whole loss: ``gap_var``, the variance of a minibatch's
    mean, is subtracted from what the draws show. Standard errors from the spread over quarters of the chains; the first
    is at least that of the law that nbeta (L - L(w*)) has at the asymptotic temperature: where no draw went far, the
    variance is too small and its spread is too.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). gap_var: per draw, of L_m(w) - L_m(w*). distance_sq: |w - w*|^2.
    """
    if (parts := _quarters(draws, nbeta * (nbeta * np.float64(gap_var)), localization / 2 * distance_sq)) is None:
        return _UNKNOWN, _UNKNOWN
    energy, noise, pull = parts
    up = _mean_of(energy - (_product(energy, energy) - noise))
    least = _gamma_error(float(energy.mean()), ess_and_rhat((draws - draws.mean()) ** 2)[0])
    return Slope(up.value, max(up.stderr, least)), _mean_of(-_product(energy, pull))


def _gamma_error(shape: float, count: float) -> float:
    """Standard error of mean - variance over ``count`` independent draws of a Gamma law of scale 1.

    Its cumulants are shape (n - 1)!, so that the mean, the variance and their covariance have the variances
    shape / count, (6 shape + 2 shape^2) / count and 2 shape / count.
    """
    return math.sqrt(max(0.0, shape * (2 * shape + 3)) / count) if count > 0 else 0.0


def covariance_with_loss(draws: np.ndarray, gap_var: np.ndarray, drift_sq: np.ndarray, nbeta: float) -> Slope:
    """Cov(nbeta L, |G|^2) over all draws; unknown where minibatches make it up.

    A minibatch of large examples has a large loss and a large gradient both: where its part of the loss's variance is
    above a tenth, the covariance is of no use. Standard error from the spread over quarters of the chains.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). gap_var: per draw, of L_m(w) - L_m(w*). drift_sq: G'PG.
    """
    parts = _quarters(draws, drift_sq)
    if parts is None or not nbeta**2 * gap_var.mean(dtype=np.float64) <= _NOISE_SHARE * draws.var():
        return _UNKNOWN
    return _mean_of(_product(*parts))


def tilt_of(tilt: np.ndarray, nbeta: float) -> Slope:
    """nbeta <grad L(w*), E[w] - w*> / 2: what lies on a slope at w* takes from the estimate; 0 at a minimum.

    Derivation, on a quadratic of Hessian H with gradient g at w*: the chains are centered on the minimum, w* less
    g / H, which lies nbeta g'g / (2 H) lower than w*, in units of the LLC. The estimate is by as much less than it
    would be around that minimum; and nbeta <g, E[w] - w*> is minus twice that, with the localization in H as well.

    Args:
        tilt: <grad L_m(w*), w - w*>, (chain, draw), NaN where it was not looked at.

    Error: from the spread over quarters of the chains and that over chains, whichever is larger.
    """
    if tilt.shape[0] == 0 or tilt.shape[1] < 4:
        return _UNKNOWN
    values = nbeta / 2 * tilt.astype(np.float64)
    parts = [part[np.isfinite(part)] for chain in values for part in np.array_split(chain, 4)]
    if not all(len(part) for part in parts):
        return _UNKNOWN
    means = np.array([part.mean() for part in parts])
    each = means.reshape(-1, 4).mean(1)
    errors = [x.std(ddof=1) / math.sqrt(len(x)) for x in (means, each) if len(x) > 1]
    return Slope(float(means.mean()), float(max(errors)))


def is_tilted(tilt: Slope, size: float) -> bool:
    """Whether an estimate of this size lacks too much because w* lies on a slope."""
    return -tilt.value > max(TILT_LIMIT * size, TILT_SIGMA * tilt.stderr)


def _quarters(*traces: np.ndarray) -> list[np.ndarray] | None:
    """Each as rows of float64, a quarter of a chain each; None with fewer than 8 draws in one."""
    count = traces[0].shape[1] // 4
    if traces[0].shape[0] == 0 or count < 8:
        return None
    return [x[:, : 4 * count].reshape(-1, count).astype(np.float64) for x in traces]


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Around the grand means: a quarter's own would hide what moves slowly."""
    return (a - a.mean()) * (b - b.mean())


def _mean_of(rows: np.ndarray) -> Slope:
    means = rows.mean(1)
    return Slope(float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))))


def degree_of(draws: np.ndarray, virial: np.ndarray, distance_sq: np.ndarray, localization: float) -> Slope:
    """The power of the distance from w* with which the loss grows where the chains are, and its standard error.

    mean <w - w*, nbeta grad L> / mean nbeta (L - L(w*)): k, by Euler, for a homogeneous loss of degree k; 2 near a
    regular minimum, 4 for x^2 y^2. A valley that bends adds to it, and a value far above says that the localization
    holds the chains where w* no longer decides the shape of the loss.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). virial: <w - w*, G>. distance_sq: |w - w*|^2.
    """
    if (parts := _quarters(draws, virial, distance_sq)) is None or not draws.mean() > 0:
        return _UNKNOWN
    energy, total, away = parts
    fall = (total - localization * away).mean(1)
    ratio = fall.mean() / energy.mean()
    # of the ratio of two means, to first order
    error = (fall - ratio * energy.mean(1)).std(ddof=1) / math.sqrt(len(fall)) / energy.mean()
    return Slope(float(ratio), float(error))


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
    rules = (_no_minimum, _moving, _apart, _unexplored, _unsure, _biased, _spiking, _dependent)
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
    error = standard_error(draws, facts.ess)
    if error > ERROR_LIMIT * abs(draws.mean()) or (facts.ess < 30 and error > 0.02 * abs(draws.mean())):
        return "too few draws", f"{facts.ess:.0f} effective draws leave an error of {error:.2g}; draw more."


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

    A homogeneous loss of degree k reads a function of nbeta / localization^(k / 2): the slope with nbeta is -2 / k
    times that with the localization, of nearly independent noise, and their mean weighted by 1 / error^2 is known
    better than either. Off a minimum the LLC rises with both, and then the first speaks for itself. Where chains mix
    too slowly for slopes, the degree of the loss where they are still tells. A product of L layers near zero has
    degree 2L by right, but then the loss itself holds more than half of the directions: L + 1 of 2L, if the widths are
    equal. Where the localization holds more of them than the loss, a degree above a product of two layers comes from
    how far out it lets them go.
    """
    degree = facts.evidence.degree
    limit = HELD_DEGREE_LIMIT if facts.evidence.held > 0.5 else DEGREE_LIMIT
    if degree.value - limit > SLOPE_SIGMA * degree.stderr:
        return "depends on nbeta or localization", (
            f"where the chains are, the loss grows like the power {degree.value:.2g} of the distance to w*: they are "
            "held far from where w* decides its shape. Raise nbeta or localization until the estimate stands."
        )
    up, down = facts.evidence.nbeta_slope, facts.evidence.localization_slope
    if not (up.stderr > 0 and down.stderr > 0):
        return None
    ratio = 2 / float(np.clip(degree.value, 2.0, limit)) if degree.value > 0 else 1.0
    share = 1 / (1 + (ratio * down.stderr / up.stderr) ** 2)
    both = Slope(up.value - share * (up.value + ratio * down.value), math.sqrt(1 - share) * up.stderr)
    if any(x.value > max(SLOPE_SIGMA * x.stderr, SLOPE_LIMIT * abs(draws.mean())) for x in (up, both)):
        return "depends on nbeta or localization", (
            f"a factor e in nbeta moves the estimate by {up.value:+.3g}, in localization by {down.value:+.3g}: it is "
            "right for this posterior, and not yet the learning coefficient. Raise nbeta, or lower localization, until "
            "it stands."
        )
