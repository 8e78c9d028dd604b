"""The page about one estimate: estimate, verdict, pictures, health, settings."""

import json
import math
from collections.abc import Iterable

import numpy as np

from slt_jax.diagnostics import verdict as diagnostics
from slt_jax.diagnostics.bias import LARGEST
from slt_jax.report.page import (
    BAD,
    GOOD,
    UNKNOWN,
    UNMEASURED,
    Page,
    Row,
    Section,
    citation_section,
    loading_section,
    picture,
    settings_sections,
    tone_of,
)
from slt_jax.report.traces import plot_result
from slt_jax.results.llc import LLCResult
from slt_jax.results.record import RunRecord
from slt_jax.results.text import estimate_text


def result_page(result: LLCResult, path: str | None) -> Page:
    found = result.estimate_text("±")
    reason, chains = result.health.reason, len(result.traces.loss)
    text = [reason[:1].upper() + reason[1:]]
    if result.stopped:
        where = ", ".join(f"chain {c} at step {t}" for c, t in sorted(result.stopped.items()))
        text.append(f"Went non-finite and left out: {where} ({len(result.stopped)} of {chains}).")
    text += [f"Note: {note}" for note in result.notes]
    alt = f"Loss of each chain over the steps, and the running estimate of the LLC: {found}, {result.verdict}."
    how = (
        "Above, the loss of each chain: settled chains look alike and do not climb or fall. Below, what the estimate "
        "would have been, had the run ended at that step: it should come to rest in the band."
    )
    sections = (
        Section("Traces", (how,), picture(plot_result(result), alt)),
        _estimate_section(result),
        _health_section(result),
        *_also_sections(result),
        *settings_sections(result.settings),
        _cost_section(result.settings),
        citation_section(result.settings, math.isfinite(result.wbic)),
        loading_section("result", path),
        Section("All numbers", code=json.dumps(result.to_dict(), indent=1), folded=True),
    )
    return Page(
        "Local learning coefficient", f"LLC {found}", tone_of(result.verdict), result.verdict, tuple(text), sections
    )


def _num(x: float, form: str = ".4g") -> str:
    return format(x, form) if math.isfinite(x) else UNKNOWN


def _estimate_section(result: LLCResult) -> Section:
    bias, kept, free = result.bias, result.kept_chains, result.settings.num_free
    around = float(result.traces.loss[kept].mean(dtype=np.float64)) if kept.size else math.nan
    taken = f"{_num(bias.applied)} taken off" if bias.applied else "nothing taken off"
    rows = [
        ("LLC", result.estimate_text("±"), "Estimate and one standard error, which counts sampling noise only."),
        ("Raw estimate", _num(result.llc_raw), "nbeta times the rise of the loss around w*, before any correction."),
        ("Bias of the step size", _num(bias.step_size, "+.3g"), "What steps of this length add, to first order."),
        ("Bias of minibatch noise", _num(bias.noise, "+.3g"), "What the noise of the gradients adds, to first order."),
        ("Raw to corrected", f"{_num(result.llc_raw)} → {_num(result.llc)}", f"{taken}: {bias.why}."),
        ("Half the weights", f"{free / 2:,.10g}", f"What a regular minimum with {free:,} free weights would read."),
        ("Loss at w*", _num(result.init_loss, ".5g"), "Of the trained weights, nats per example."),
        ("Loss around w*", _num(around, ".5g"), "Mean over the draws, nats per example."),
    ]
    if math.isfinite(result.wbic):
        rows.append(("WBIC", _num(result.wbic, ".6g"), "n times the mean loss at nbeta = n / log n, nats."))
    text = (
        "The local learning coefficient says how degenerate the loss is around the trained weights w*: half the number "
        "of weights where the minimum is regular, and less where the loss is flat in some directions.",
    )
    return Section("The estimate", text, header=("quantity", "value", "meaning"), rows=tuple(Row(row) for row in rows))


def _within(value: float, low: float, high: float) -> str:
    return UNMEASURED if math.isnan(value) else GOOD if low <= value <= high else BAD


def _health_section(result: LLCResult) -> Section:
    """Every number of the verdict beside what is accepted. The limits are the verdict's own."""
    d, h, e, raw = diagnostics, result.health, result.health.evidence, abs(result.llc_raw)
    error = d.standard_error(result.llc_draws, h.ess) / raw if raw and result.llc_draws.size else math.nan
    enough = GOOD if h.ess >= 30 or error <= 0.02 else UNMEASURED if math.isnan(h.ess) else BAD
    still = abs(h.trend_z) <= d.TREND_SIGMA or abs(h.trend) <= 0.02 * raw
    gap = abs(h.bracket[1] - h.bracket[0]) / raw if raw else math.nan
    met = UNMEASURED if math.isnan(gap) else BAD if gap > 0.05 and "chains disagree" in h.flags else GOOD
    hot = 1 + (2 * result.bias.noise / e.num_free if math.isfinite(result.bias.noise) else 0.0)
    room = d.KINETIC_LIMIT_METRIC if e.metric else d.KINETIC_LIMIT
    most = d.HELD_DEGREE_LIMIT if e.held > 0.5 else d.DEGREE_LIMIT
    up, down = e.nbeta_slope, e.localization_slope
    stands = UNMEASURED if not up.stderr > 0 < down.stderr else BAD if d.is_dependent(e, raw) else GOOD
    bias, both = d.BIAS_LIMIT, f"under {d.SLOPE_SIGMA:g} standard errors, or {d.SLOPE_LIMIT:.0%} of the LLC"
    parts = [x / raw if raw else math.nan for x in (result.bias.step_size, result.bias.noise)]
    owed = e.owed / raw if raw else math.nan
    slope = lambda s: f"{_num(s.value, '+.3g')} ± {_num(s.stderr, '.2g')}" if s.stderr > 0 else UNKNOWN  # noqa: E731
    trend = f"{_num(h.trend, '+.2g')} ({_num(h.trend_z, '+.1f')} standard errors)"
    pair = " and ".join(_num(x) for x in h.bracket)
    rise = e.rise
    rises = rise.mean > d.TREND_SIGMA * rise.stderr and rise.next > d.RISE_LIMIT * raw
    tilted = UNMEASURED if math.isnan(e.tilt.stderr) else BAD if d.is_tilted(e.tilt, raw) else GOOD
    rose = f"{_num(rise.next, '+.2g')}, after {_num(rise.before, '+.2g')} and {_num(rise.value, '+.2g')}"
    rows = (
        ("R-hat", _num(h.rhat, ".3f"), f"at most {d.RHAT_LIMIT}", _within(h.rhat, 0, d.RHAT_LIMIT),
         "Compares the chains, and the halves of each, with one another: 1 when they tell the same."),
        ("Effective draws (ESS)", _num(h.ess, ".0f"), "30 or more, unless the error is under 2 %", enough,
         f"How many independent draws the {result.llc_draws.size:,} correlated ones are worth."),
        ("Error of the mean", _num(error, ".1%"), f"at most {d.ERROR_LIMIT:.1%}", _within(error, 0, d.ERROR_LIMIT),
         "Standard error over the raw estimate."),
        ("Trend", UNKNOWN if math.isnan(h.trend) else trend,
         f"within {d.TREND_SIGMA:g} standard errors, or 2 % of the LLC",
         UNMEASURED if math.isnan(h.trend) else GOOD if still else BAD,
         "Second half of the draws less the first: 0 once the chains have settled."),
        ("Rise in one more doubling of the run", UNKNOWN if math.isnan(rise.stderr) else rose,
         f"at most {d.RISE_LIMIT:.0%} of the LLC, or not sure",
         UNMEASURED if math.isnan(rise.stderr) else BAD if rises else GOOD,
         "Chains that start at w* spread into ever softer directions; this is what more steps would add."),
        ("From w*, from hot starts", UNKNOWN if math.isnan(gap) else pair, "within 5 %, or 4 standard errors", met,
         "Chains started cold and hot come to the answer from both sides, and should meet."),
        ("Virial ratio", _num(h.virial, ".3f"), f"at least {d.VIRIAL_LIMIT}",
         _within(h.virial, d.VIRIAL_LIMIT, math.inf),
         "Share of the directions that have come to rest: 1 when the chains have explored all they can."),
        ("Owed by soft directions", _num(owed, ".1%"), f"at most {d.OWED_LIMIT:.0%} of the LLC",
         _within(owed, 0, d.OWED_LIMIT), "What chains of this length lack in directions that are slow at w*."),
        ("Kinetic temperature", _num(e.kinetic, ".3f"), f"{hot - room:.2f} to {hot + room:.2f}",
         _within(e.kinetic, hot - room, hot + room), "1 when the sampler keeps the right temperature."),
        ("Acceptance of a step", _num(e.acceptance, ".2f"), "no limit", "",
         "Share of such steps that an exact sampler would accept: near 1 where steps are short."),
        ("Bias of the step size", _num(parts[0], "+.1%"), f"within {bias:.0%} of the LLC",
         _within(abs(parts[0]), 0, bias), "What the step size adds. Halve step_size when it is too much."),
        ("Bias of minibatch noise", _num(parts[1], "+.1%"), f"within {bias:.0%} of the LLC",
         _within(abs(parts[1]), 0, bias), f"What noisy gradients add. Up to {LARGEST:.0%} in all is taken off."),
        ("Slope in log nbeta", slope(up), both, stands, "How far the estimate rises when nbeta grows by a factor e."),
        ("Slope in log localization", slope(down), "weighed with the one above", stands,
         "The same for the localization, which pulls the estimate down where it holds flat directions."),
        ("Slope at w*", slope(e.tilt), f"under {d.TILT_LIMIT:.0%} of the LLC, or {d.TILT_SIGMA:g} standard errors",
         tilted,
         "What the chains gain by going down from w*, which the estimate lacks: 0 at a minimum."),
        ("Degree of the loss", slope(e.degree).lstrip("+"), f"at most {most:g}",
         _within(e.degree.value - d.SLOPE_SIGMA * e.degree.stderr, -math.inf, most),
         "Power with which the loss grows with the distance from w*: 2 at a regular minimum."),
    )  # fmt: skip
    table = tuple(Row((name, value, accepted, why), tone) for name, value, accepted, tone, why in rows)
    legend = "✓ within what is accepted, ✗ outside of it, – not measured in this run."
    return Section("Health", (legend,), header=("check", "value", "accepted", "meaning"), rows=table)


def _also_sections(result: LLCResult) -> Iterable[Section]:
    if not result.also:
        return
    rows = []
    for name, r in result.also.items():
        health = _num(r.rhat, ".3f"), _num(r.ess, ".0f")
        rows.append(Row((name, estimate_text(r.llc, r.llc_stderr, "±"), *health, _num(r.init_loss, ".5g"))))
    text = f"The loss of other data at the same draws. Compare with the raw estimate, {_num(result.llc_raw)}."
    yield Section("Other data", (text,), header=("data", "LLC, raw", "R-hat", "ESS", "loss at w*"), rows=tuple(rows))


def _cost_section(settings: RunRecord) -> Section:
    cost, spent = settings.cost, settings.gradients
    rows = []
    if cost.get("seconds") is not None:
        rows.append(("time", f"{cost['seconds']:.3g} s"))
    if cost.get("steps_per_s") is not None:
        rows.append(("speed", f"{cost['steps_per_s']:,.4g} steps/s over all chains"))
    if spent:
        parts = ", ".join(f"{name} {count:,.0f}" for name, count in spent.items())
        rows.append(("minibatch gradients", f"{sum(spent.values()):,.0f} ({parts})"))
    peaks = {"device_peak_mib": "peak memory of a device", "process_peak_mib": "peak memory of the process"}
    rows += [(name, f"{cost[key]:,} MiB") for key, name in peaks.items() if cost.get(key)]
    if (predicted := settings.memory.get("total_mib")) is not None:
        rows.append(("memory predicted", f"{predicted:,} MiB"))
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    rows += [("devices", settings.devices or UNKNOWN), ("versions", versions or UNKNOWN)]
    return Section("Cost, device, versions", header=("", "value"), rows=tuple(Row(row) for row in rows))
