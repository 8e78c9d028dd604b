"""Checks of the run: have all chains stayed finite and settled, do they agree, and are there enough draws?"""

import math

from slt_jax.diagnostics.checks import UNKNOWN_TEXT, Check, Fault, fault_if, number, outcome
from slt_jax.diagnostics.end import end_of_trend
from slt_jax.diagnostics.evidence import Sample
from slt_jax.diagnostics.limits import (
    BRACKET_SHARE,
    BRACKET_SIGMA,
    CURVATURE_SHARE,
    CURVATURE_SIGMA,
    ERROR_SHARE,
    ERROR_SHARE_OF_FEW,
    FEW_DRAWS,
    GOOD_ERROR,
    LEAST_DRAWS,
    LEAST_TIMES,
    MOST_TIMES,
    RHAT_LIMIT,
    RISE_SHARE,
    TREND_SHARE,
    TREND_SIGMA,
    UNRELAXED_SHARE,
    VIRIAL_LIMIT,
)
from slt_jax.diagnostics.sensitivity import Slope


def finite_chains(sample: Sample) -> Check:
    kept, stopped = sample.draws.shape[0], sample.evidence.num_stopped
    ok = kept > 0 and not stopped
    cause = f": {found}" if (found := sample.evidence.stopped_by) else f"; {_shorter_step(sample)}"
    reason = f"every chain went non-finite{cause}"
    if kept:
        reason = f"{stopped} chains went non-finite and are left out{cause}"
    return Check(
        name="Chains that stayed finite",
        value=kept,
        limit=kept + stopped,
        ok=ok,
        meaning="A chain that goes non-finite is left out of the estimate.",
        value_text=f"{kept} of {kept + stopped}",
        limit_text="all",
        fault=fault_if(ok, "diverged", reason),
    )


def _shorter_step(sample: Sample) -> str:
    step = sample.evidence.chosen_step
    if math.isnan(step):
        return "take a smaller step_size."
    return (
        f"the calibration chose step_size {step:.3g}, and the chains met a larger curvature than it had. Raise "
        f"localization, so that they stay closer to w*, or give the sampler a shorter step: step_size={step / 4:.1g}."
    )


def usable_draws(sample: Sample) -> Check:
    """Whether there is an error bar at all."""
    chains, count = sample.draws.shape
    ok = None if not chains else not math.isnan(sample.ess)
    reason = f"an error bar needs at least {LEAST_DRAWS} draws a chain."
    if count >= LEAST_DRAWS:
        reason = (
            "the loss is the same at every draw: the chains did not move, or the loss does not depend on the free "
            "weights. Take a larger step_size or leave it out, and check which weights the mask frees."
        )
    return Check(
        name="Draws of a chain",
        value=count,
        limit=LEAST_DRAWS,
        ok=ok,
        meaning="Fewer have no error bar, and neither have draws that are all the same.",
        value_text=f"{count:,}" if chains else UNKNOWN_TEXT,
        limit_text=f"at least {LEAST_DRAWS}, not all the same",
        fault=fault_if(ok, "too few draws", reason),
    )


def rhat(sample: Sample) -> Check:
    ok = outcome(sample.rhat > RHAT_LIMIT, sample.rhat)
    reason = (
        f"R-hat {sample.rhat:.3f} is above {RHAT_LIMIT}: the chains, or the halves of a chain, differ. "
        f"{_run_longer(sample)}."
    )
    return Check(
        name="R-hat",
        value=sample.rhat,
        limit=RHAT_LIMIT,
        ok=ok,
        meaning="Compares the chains, and the halves of each, with one another: 1 when they agree.",
        value_text=number(sample.rhat, ".3f"),
        limit_text=f"at most {RHAT_LIMIT}",
        fault=fault_if(ok, "chains disagree", reason),
    )


def effective_draws(sample: Sample) -> Check:
    ok = outcome(sample.ess < FEW_DRAWS and sample.error > ERROR_SHARE_OF_FEW * sample.size, sample.ess)
    return Check(
        name="Effective draws (ESS)",
        value=sample.ess,
        limit=FEW_DRAWS,
        ok=ok,
        meaning=f"How many independent draws the {sample.draws.size:,} correlated ones are worth.",
        value_text=number(sample.ess, ".0f"),
        limit_text=f"{FEW_DRAWS} or more, unless the error is under {ERROR_SHARE_OF_FEW:.0%}",
        fault=_too_few(sample) if ok is False else None,
    )


def error_of_the_mean(sample: Sample) -> Check:
    share = sample.share(sample.error)
    ok = outcome(sample.error > ERROR_SHARE * sample.size, sample.error)
    return Check(
        name="Error of the mean",
        value=share,
        limit=ERROR_SHARE,
        ok=ok,
        meaning="Standard error over the raw estimate.",
        value_text=number(share, ".1%"),
        limit_text=f"at most {ERROR_SHARE:.1%}",
        fault=_too_few(sample) if ok is False else None,
    )


def _too_few(sample: Sample) -> Fault:
    share = sample.error / sample.size if sample.size else math.inf
    times = max((share / GOOD_ERROR) ** 2, FEW_DRAWS / sample.ess, LEAST_TIMES)
    reason = f"{sample.ess:.0f} effective draws leave a standard error of {sample.error:.2g}"
    if times < MOST_TIMES:
        more = f"{_arguments(sample, times)} would bring it to {share / math.sqrt(times):.1%}"
        return Fault("too few draws", f"{reason}, {share:.1%} of the estimate; {more}.")
    return Fault(
        "too few draws", f"{reason}; over {MOST_TIMES} times as many would bring it to {GOOD_ERROR:.0%} of it."
    )


def _run_longer(sample: Sample, times: float = 2.0) -> str:
    count = {2.0: "twice", 4.0: "four times"}.get(times, f"{times:.2g} times")
    return f"Run {count} as long: {_arguments(sample, times)}"


def _arguments(sample: Sample, times: float) -> str:
    """Those of a run that is so many times as long."""
    draws = f"num_draws={_rounded_up(times * sample.draws.shape[1]):_}"
    gradients = sample.evidence.gradients
    return f"budget={_rounded_up(times * gradients):_} (or {draws})" if math.isfinite(gradients) else draws


def _rounded_up(value: float) -> int:
    """With two digits."""
    digit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return math.ceil(value / digit) * digit


def trend(sample: Sample) -> Check:
    moved = abs(sample.trend_z) > TREND_SIGMA and abs(sample.trend) > TREND_SHARE * sample.size
    ok = outcome(moved, sample.trend)
    text = f"{number(sample.trend, '+.2g')} ({number(sample.trend_z, '+.1f')} standard errors)"
    return Check(
        name="Trend",
        value=sample.trend,
        limit=TREND_SHARE * sample.size,
        ok=ok,
        meaning="Mean of the second half of the draws less that of the first: 0 once the chains have settled.",
        value_text=UNKNOWN_TEXT if math.isnan(sample.trend) else text,
        limit_text=f"within {TREND_SIGMA:g} standard errors, or {TREND_SHARE:.0%} of the LLC",
        fault=_moving(sample) if ok is False else None,
    )


def _moving(sample: Sample) -> Fault:
    end = sample.evidence.end
    if sample.trend < 0 or not math.isfinite(end.stderr):
        end = end_of_trend(sample.draws)
    reason = (
        f"the mean of the second half of the draws differs by {sample.trend:+.3g} from that of the first "
        f"({sample.trend_z:+.1f} standard errors); {_end_text(end)}. "
        f"{_run_longer(sample)}."
    )
    return Fault("still rising" if sample.trend > 0 else "still falling", reason, end)


def _end_text(end: Slope) -> str:
    if not math.isfinite(end.stderr):
        return "no end can be extrapolated"
    return f"the estimate would end near {end.value:.4g} +/- {end.stderr:.2g} (extrapolated)"


def rise(sample: Sample) -> Check:
    measured = sample.evidence.rise
    rises = measured.mean > TREND_SIGMA * measured.stderr and measured.next > RISE_SHARE * sample.size
    ok = outcome(rises, measured.stderr)
    text = (
        f"{number(measured.next, '+.2g')}, after {number(measured.before, '+.2g')} and {number(measured.value, '+.2g')}"
    )
    reason = (
        f"the last two doublings of the run changed the mean of the chains that started at w* by "
        f"{measured.before:+.3g} and {measured.value:+.3g}: they are still spreading into soft "
        f"directions; {_end_text(sample.evidence.end)}. {_run_longer(sample, 4.0)}."
    )
    return Check(
        name="Rise in one more doubling of the run",
        value=measured.next,
        limit=RISE_SHARE * sample.size,
        ok=ok,
        meaning="Chains that start at w* spread into ever softer directions; this is what more steps would add.",
        value_text=UNKNOWN_TEXT if math.isnan(measured.stderr) else text,
        limit_text=f"at most {RISE_SHARE:.0%} of the LLC, or not sure",
        fault=fault_if(ok, "still rising", reason, sample.evidence.end),
    )


def hot_starts(sample: Sample) -> Check:
    cold, hot = sample.bracket
    gap = abs(hot - cold)
    apart = gap > BRACKET_SIGMA * sample.bracket_error and gap > BRACKET_SHARE * sample.size
    ok = outcome(apart, gap, sample.bracket_error)
    reason = (
        f"chains that started at w* give {cold:.4g}, and those that started hot give {hot:.4g}: the answer lies "
        f"between, unless the hot ones left the neighbourhood of w*. {_run_longer(sample)}."
    )
    return Check(
        name="From w*, from hot starts",
        value=sample.share(gap),
        limit=BRACKET_SHARE,
        ok=ok,
        meaning="Chains started at w* and chains started hot approach the answer from both sides, and should meet.",
        value_text=UNKNOWN_TEXT if math.isnan(gap) else f"{number(cold)} and {number(hot)}",
        limit_text=f"within {BRACKET_SHARE:.0%}, or {BRACKET_SIGMA:g} standard errors",
        fault=fault_if(ok, "chains disagree", reason),
    )


def virial(sample: Sample) -> Check:
    """Flat directions relax long after the LLC has settled; but not where hardly any direction has moved."""
    measured = sample.evidence.virial
    ok = outcome(measured < VIRIAL_LIMIT, measured)
    reason = (
        f"the chains have equilibrated in about {max(0.0, measured):.0%} of the directions (virial ratio), and what "
        f"the others would add is unknown. {_run_longer(sample, 4.0)}."
    )
    return Check(
        name="Virial ratio",
        value=measured,
        limit=VIRIAL_LIMIT,
        ok=ok,
        meaning="Share of the directions that have equilibrated: 1 when the chains have explored all they can.",
        value_text=number(measured, ".3f"),
        limit_text=f"at least {VIRIAL_LIMIT}",
        fault=fault_if(ok, "still rising", reason),
    )


def unrelaxed_bias(sample: Sample) -> Check:
    """Not made where the draws fall: such chains come from somewhere else than w*. Nor where the curvatures at w* give
    far more than the draws, but for what going downhill takes: the loss is then no quadratic where the chains are.
    """
    measured, times = sample.evidence.unrelaxed_bias, sample.evidence.times_longer
    falls = sample.trend_z < -TREND_SIGMA
    tilt = sample.evidence.tilt.value
    downhill = max(0.0, -tilt) if math.isfinite(tilt) else 0.0
    above = sample.evidence.expected - sample.mean - downhill
    wrong = above > max(CURVATURE_SHARE * sample.evidence.expected, CURVATURE_SIGMA * sample.error)
    ok = None if falls or wrong else outcome(measured > UNRELAXED_SHARE * sample.size, measured)
    end = Slope(sample.mean + measured, math.hypot(measured / 2, sample.error))
    remedy = "Take a longer step_size, or leave it out"
    if math.isfinite(sample.evidence.chosen_step):
        remedy = "The curvatures span too wide a range: rescale the inputs or the weights"
    if times < MOST_TIMES:
        remedy = _run_longer(sample, times)
    reason = (
        f"by the curvatures at w*, directions that have not relaxed in a run of this length would still add "
        f"{measured:.3g}: {_end_text(end)}. {remedy}."
    )
    return Check(
        name="Bias of unrelaxed directions",
        value=sample.share(measured),
        limit=UNRELAXED_SHARE,
        ok=ok,
        meaning="What directions that have not relaxed yet would still add, by the curvatures at w*.",
        value_text=number(sample.share(measured), ".1%"),
        limit_text=f"at most {UNRELAXED_SHARE:.0%} of the LLC",
        fault=fault_if(ok, "still rising", reason, end),
    )
