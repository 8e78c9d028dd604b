"""Checks of what was sampled: is w* a minimum, do step and noise bias the estimate, does it depend on nbeta?"""

import math
from collections.abc import Mapping

import numpy as np

from slt_jax.diagnostics.checks import UNKNOWN_TEXT, Check, Fault, fault_if, number, outcome, with_error
from slt_jax.diagnostics.evidence import Sample
from slt_jax.diagnostics.limits import (
    BIAS_SHARE,
    CORRECTION_SHARE,
    DEGREE_LIMIT,
    DITHER_NEGATIVE,
    DITHER_SHARE,
    DITHER_SPACINGS,
    HEAT_SIGMA,
    HIDDEN_SHARE,
    KINETIC_LIMIT,
    KINETIC_LIMIT_METRIC,
    LOCALIZED_DEGREE_LIMIT,
    LOCALIZED_SHARE,
    LOWER_PART_SIGMA,
    LOWER_PARTS,
    LOWER_SIGMA,
    REGULAR_DEGREE,
    RHAT_LIMIT,
    ROUNDING_SHARE,
    SLOPE_SHARE,
    SLOPE_SIGMA,
    SPIKE_LIMIT,
    TILT_SHARE,
    TILT_SIGMA,
)
from slt_jax.diagnostics.sensitivity import Slope, bounded, rises_with_nbeta

_QUARTILES_OF_NORMAL = 1.349  # standard deviations from the lower to the upper


def resolution(sample: Sample) -> Check:
    """A difference of two means, each rounded to float32, is biased where the spacing is not small beside it.

    Unless examples differ enough for their rounding errors to average out.
    """
    share = sample.share(sample.evidence.spacing)
    ok = outcome(share > ROUNDING_SHARE and not _is_dithered(sample), share)
    reason = (
        f"at the loss of w*, neighbouring numbers of float32 are {share:.2g} of the estimate apart, and rounding "
        "biases it. Drop constants from the loss, return one loss per example and not their mean, or lower nbeta."
    )
    return Check(
        name="Resolution of float32",
        value=share,
        limit=ROUNDING_SHARE,
        ok=ok,
        meaning="Spacing of float32 at the loss of w*, in LLCs: differences of losses are rounded to it.",
        value_text=number(share, ".2g"),
        limit_text=f"at most {ROUNDING_SHARE:g}, unless examples differ enough to average it out",
        fault=fault_if(ok, "not resolved in float32", reason),
    )


def below_chance(sample: Sample) -> Check:
    """Where the weights that are drawn predict nothing, the draws know nothing of the model."""
    loss, chance = sample.evidence.loss, sample.evidence.chance_loss
    ok = outcome(loss >= chance, loss, chance)
    reason = (
        f"the mean loss of the draws, {loss:.4g}, is not below that of a model that has learned nothing, {chance:.4g}: "
        "the chains have left the model, and the estimate does not describe it. Raise localization or nbeta, or take a "
        "shorter step_size."
    )
    return Check(
        name="Loss below chance",
        value=loss,
        limit=chance,
        ok=ok,
        meaning="Mean loss of the draws, beside chance_loss, that of a model that has learned nothing.",
        value_text=number(loss),
        limit_text=f"below {number(chance)}" if math.isfinite(chance) else "below chance_loss, if that is given",
        fault=fault_if(ok, "no better than chance", reason),
    )


def _is_dithered(sample: Sample) -> bool:
    spread = sample.evidence.example_spread
    if math.isnan(spread):
        return float((sample.draws < 0).mean()) > DITHER_NEGATIVE
    return spread > max(DITHER_SHARE * sample.size, DITHER_SPACINGS * sample.evidence.spacing)


def lower_loss(sample: Sample) -> Check:
    """At a minimum all draws are positive but for minibatch noise, which is independent from draw to draw: the error
    that counts is that of this noise, where it is known. That of the mean is inflated where chains drift away.
    """
    draws, mean, error = sample.draws, sample.mean, sample.error
    if math.isfinite(scatter := sample.evidence.scatter_error):
        rounding = sample.evidence.spacing
        error = float(min(error, max(scatter, rounding if math.isfinite(rounding) else 0.0)))
    lowest, part_error = math.nan, math.nan
    if draws.size:
        count = max(1, draws.shape[1] // LOWER_PARTS)
        parts = np.array_split(draws, max(1, draws.shape[1] // count), axis=1)
        lowest, part_error = float(min(part.mean() for part in parts)), error * math.sqrt(len(parts))
    ok = outcome(mean < -LOWER_SIGMA * error or lowest < -LOWER_PART_SIGMA * part_error, error)
    reason = "the chains found a lower loss than that of w*; train further, or raise localization."
    text = f"{number(mean)}, and {number(lowest)} in the lowest part of the run"
    return Check(
        name="Loss above that of w*",
        value=mean,
        limit=-LOWER_SIGMA * error,
        ok=ok,
        meaning="Negative where chains find a lower loss than w* has, which is then no minimum.",
        value_text=UNKNOWN_TEXT if math.isnan(mean) else text,
        limit_text=f"not negative by {LOWER_SIGMA:g} standard errors, or {LOWER_PART_SIGMA:g} in a part",
        fault=fault_if(ok, "not a minimum", reason),
    )


def slope_at_center(sample: Sample) -> Check:
    tilt, bias = sample.evidence.tilt, sample.evidence.bias
    ok = outcome(-tilt.value > max(TILT_SHARE * sample.size, TILT_SIGMA * tilt.stderr), tilt.stderr)
    around = sample.mean - tilt.value - (bias.applied if bias else 0.0)
    reason = (
        f"the loss slopes at w*, and going downhill takes {-tilt.value:.3g} from the estimate: around the minimum "
        f"nearby it would be about {around:.4g}. Train further, or raise localization."
    )
    return Check(
        name="Slope at w*",
        value=tilt.value,
        limit=-TILT_SHARE * sample.size,
        ok=ok,
        meaning="What going downhill from w* does to the estimate: 0 at a minimum, negative on a slope.",
        value_text=with_error(tilt),
        limit_text=f"under {TILT_SHARE:.0%} of the LLC, or {TILT_SIGMA:g} standard errors",
        fault=fault_if(ok, "not a minimum", reason),
    )


def _explained_heat(sample: Sample) -> float:
    """What the measured minibatch noise adds, as an LLC."""
    bias = sample.evidence.bias
    return bias.noise if bias and math.isfinite(bias.noise) else 0.0


def kinetic_temperature(sample: Sample) -> Check:
    e = sample.evidence
    expected = 2 * _explained_heat(sample) / e.num_free
    room = KINETIC_LIMIT_METRIC if e.metric else KINETIC_LIMIT
    ok = None if e.bias is None else outcome(abs(e.kinetic - 1 - expected) > room, e.kinetic)
    reason = (
        f"the kinetic temperature is {e.kinetic:.3g}, not 1: steps of this size do not sample the posterior. Halve "
        "step_size, or leave it out."
    )
    return Check(
        name="Kinetic temperature",
        value=e.kinetic,
        limit=1 + expected + room,
        ok=ok,
        meaning="1 when the sampler keeps the right temperature.",
        value_text=number(e.kinetic, ".3f"),
        limit_text=f"{1 + expected - room:.2f} to {1 + expected + room:.2f}",
        fault=fault_if(ok, "biased by the step size", reason),
    )


def heat_in_a_metric(sample: Sample) -> Check:
    """In a metric all directions are about as stiff as the stiffest, so that heat in any of them counts."""
    heat, size = sample.evidence.heat, sample.size
    measured = heat.value - _explained_heat(sample)
    judged = sample.evidence.metric and sample.evidence.bias is not None
    ok = outcome(measured > max(BIAS_SHARE * size, HEAT_SIGMA * heat.stderr), measured) if judged else None
    reason = (
        f"the kinetic temperature is too high, which adds up to {measured:.3g} of {size:.4g}, and minibatch noise does "
        "not explain it: the metric does not fit where the chains go. Raise localization."
    )
    share = sample.share(measured) if judged else math.nan
    return Check(
        name="Heat in a metric",
        value=share,
        limit=BIAS_SHARE,
        ok=ok,
        meaning="What heat beyond that of minibatch noise adds at most, where the chains move in a metric.",
        value_text=number(share, "+.1%"),
        limit_text=f"under {BIAS_SHARE:.0%} of the LLC, or {HEAT_SIGMA:g} standard errors",
        fault=fault_if(ok, "biased by the step size", reason),
    )


def acceptance(sample: Sample) -> Check:
    return Check(
        name="Acceptance of a step",
        value=sample.evidence.acceptance,
        limit=None,
        ok=None,
        meaning="Share of such steps that an exact sampler would accept: near 1 where steps are short.",
        value_text=number(sample.evidence.acceptance, ".2f"),
        limit_text="",
    )


def step_size_bias(sample: Sample) -> Check:
    """Alone, or with minibatch noise where their sum is too large to be subtracted and neither is so by itself."""
    bias, limit = sample.evidence.bias, BIAS_SHARE * sample.size
    measured, what = (bias.step_size, "the step size adds") if bias else (math.nan, "")
    if bias and not bias.applied and max(abs(bias.step_size), abs(bias.noise)) <= limit < abs(bias.total):
        measured, what = bias.total, "step size and minibatch noise together add"
    ok = outcome(abs(measured) > limit, measured)
    reason = (
        f"{what} about {measured:.3g} to {sample.size:.4g}, too much for a first-order correction; halve step_size, or "
        "leave it out."
    )
    return Check(
        name="Bias of the step size",
        value=sample.share(measured),
        limit=BIAS_SHARE,
        ok=ok,
        meaning="What the step size adds. Halve step_size when it is too much.",
        value_text=number(sample.share(measured), "+.1%"),
        limit_text=f"within {BIAS_SHARE:.0%} of the LLC",
        fault=fault_if(ok, "biased by the step size", reason),
    )


def noise_bias(sample: Sample) -> Check:
    measured = sample.evidence.bias.noise if sample.evidence.bias else math.nan
    ok = outcome(abs(measured) > BIAS_SHARE * sample.size, measured)
    reason = (
        f"the noise of the minibatch gradients adds about {measured:.3g} of {sample.size:.4g}; take a shorter "
        "step_size, more friction, a larger batch_size, or control_variate=True."
    )
    return Check(
        name="Bias of minibatch noise",
        value=sample.share(measured),
        limit=BIAS_SHARE,
        ok=ok,
        meaning=f"What noisy gradients add. Up to {CORRECTION_SHARE:.0%} in all is subtracted.",
        value_text=number(sample.share(measured), "+.1%"),
        limit_text=f"within {BIAS_SHARE:.0%} of the LLC",
        fault=fault_if(ok, "heated by minibatch noise", reason),
    )


def spread_of_losses(sample: Sample) -> Check:
    """nbeta L has the variance LLC - d LLC / d log nbeta: about the LLC, and less while it still rises with nbeta.

    Rare excursions, of chains that a step has thrown off and that come back, make it many times as large; the mean then
    hangs on a few draws, and neither R-hat nor the thermometer need show it. A broad spread says instead that chains
    wander over slopes, as they do around weights that are no minimum. Not judged where the chains disagree.
    """
    mean, up = sample.mean, sample.evidence.nbeta_slope.value
    judged = mean > 0 and sample.rhat <= RHAT_LIMIT
    times = (mean - up) / mean if mean > 0 else math.nan
    ok = outcome(mean - up > SPIKE_LIMIT * mean, times) if judged else None
    return Check(
        name="Variance of nbeta L over its mean",
        value=times,
        limit=SPIKE_LIMIT,
        ok=ok,
        meaning="About 1 in a posterior; far more where single draws were thrown off, or w* is no minimum.",
        value_text=number(times, ".2g"),
        limit_text=f"at most {SPIKE_LIMIT:g}, where R-hat is in order",
        fault=_spread_out(sample, times) if ok is False else None,
    )


def _spread_out(sample: Sample, times: float) -> Fault:
    text = f"the variance of nbeta L is {times:.2g} times its mean, where a posterior has about 1: "
    low, high = np.quantile(sample.draws, [0.25, 0.75])
    # a normal spread would make these equal
    if ((high - low) / _QUARTILES_OF_NORMAL) ** 2 < sample.draws.var() / SPIKE_LIMIT:
        return Fault(
            "biased by the step size",
            f"{text}some steps throw a chain far off, and it comes back. Halve step_size, or take a larger batch_size.",
        )
    return Fault(
        "depends on nbeta or localization",
        f"{text}the estimate falls as nbeta grows, as around weights that are no minimum. Train further, or raise "
        "localization.",
    )


def nbeta_slope(sample: Sample) -> Check:
    """Directions that the localization confines at this nbeta make the LLC rise with nbeta and fall with localization.

    Off a minimum it rises with both, and the first slope speaks for itself.
    """
    ok, fault = _slopes(sample)
    return Check(
        name="Slope in log nbeta",
        value=bounded(sample.evidence.nbeta_slope, sample.mean).value,
        limit=SLOPE_SHARE * sample.size,
        ok=ok,
        meaning="How far the estimate rises when nbeta grows by a factor e.",
        value_text=with_error(bounded(sample.evidence.nbeta_slope, sample.mean)),
        limit_text=f"under {SLOPE_SIGMA:g} standard errors, or {SLOPE_SHARE:.0%} of the LLC",
        fault=fault,
    )


def localization_slope(sample: Sample) -> Check:
    ok, fault = _slopes(sample)
    return Check(
        name="Slope in log localization",
        value=bounded(sample.evidence.localization_slope, sample.mean).value,
        limit=None,
        ok=ok,
        meaning="The same for the localization, which lowers the estimate where it confines flat directions.",
        value_text=with_error(bounded(sample.evidence.localization_slope, sample.mean)),
        limit_text="weighed with the one above",
        fault=fault,
    )


def hidden_directions(sample: Sample) -> Check:
    """Where the range of the curvatures, not the size of the weights, sets the localization."""
    e = sample.evidence
    ok = outcome(e.hides > HIDDEN_SHARE * sample.size and e.hidden > 0, e.hides)
    reason = (
        f"{e.hidden} of {e.num_free} directions have a curvature at w* below the localization, which the range of the "
        f"curvatures demands; without it the estimate would be up to {e.hides:.3g} higher. Rescale the inputs, such as "
        "to mean 0 and standard deviation 1, or the weights, so that the curvatures are more alike."
    )
    return Check(
        name="Directions below the localization",
        value=sample.share(e.hides),
        limit=HIDDEN_SHARE,
        ok=ok,
        meaning="What the localization takes from the estimate, where the range of the curvatures demands it.",
        value_text=UNKNOWN_TEXT if math.isnan(e.hides) else f"{sample.share(e.hides):.0%} ({e.hidden} directions)",
        limit_text=f"under {HIDDEN_SHARE:.0%} of the LLC",
        fault=fault_if(ok, "depends on nbeta or localization", reason),
    )


def _slopes(sample: Sample) -> tuple[bool | None, Fault | None]:
    """Both slopes are weighed together, by the degree of the loss where the chains are."""
    up, down = sample.evidence.nbeta_slope, sample.evidence.localization_slope
    degree = float(np.clip(sample.evidence.degree.value, REGULAR_DEGREE, DEGREE_LIMIT))
    measured = rises_with_nbeta(up, down, degree)
    rises = any(x.value > max(SLOPE_SIGMA * x.stderr, SLOPE_SHARE * sample.size) for x in measured)
    ok = not rises if measured else None
    told = {name: bounded(x, sample.mean) for name, x in {"nbeta": up, "localization": down}.items()}
    reason = (
        f"{_changes(told)}: it describes this posterior, and is not yet the learning coefficient. Raise nbeta until "
        "the estimate no longer changes."
    )
    return ok, fault_if(ok, "depends on nbeta or localization", reason)


def _changes(told: Mapping[str, Slope]) -> str:
    """What a factor e in these settings adds to the estimate."""
    known = [(name, f"by {x.value:+.3g} +/- {x.stderr:.2g}") for name, x in told.items() if x.stderr > 0]
    if not known:
        return "the estimate changes with nbeta or localization, by how much is not sure"
    (first, change), *others = known
    return f"a factor e in {first} changes the estimate {change}" + "".join(f", one in {n} {c}" for n, c in others)


def degree(sample: Sample) -> Check:
    """Where the chains mix too slowly for slopes, the degree of the loss where they are still tells.

    A product of L layers near zero has degree 2L by right, but then the loss itself confines more than half of the
    directions. Where the localization confines more of them than the loss, a degree above a product of two layers comes
    from how far out it lets them go.
    """
    measured = sample.evidence.degree
    most = LOCALIZED_DEGREE_LIMIT if sample.evidence.localized_share > LOCALIZED_SHARE else DEGREE_LIMIT
    ok = outcome(measured.value - most > SLOPE_SIGMA * measured.stderr, measured.value)
    reason = (
        f"where the chains are, the loss grows like the power {measured.value:.2g} of the distance to w*: they are "
        "too far out for w* to determine its shape. Raise nbeta until the estimate no longer changes."
    )
    return Check(
        name="Degree of the loss",
        value=measured.value,
        limit=most,
        ok=ok,
        meaning="Power with which the loss grows with the distance from w*: 2 at a regular minimum.",
        value_text=with_error(measured).lstrip("+"),
        limit_text=f"at most {most:g}, or {SLOPE_SIGMA:g} standard errors above",
        fault=fault_if(ok, "depends on nbeta or localization", reason),
    )
