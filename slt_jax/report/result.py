"""The page about one estimate: estimate, verdict, pictures, health, settings."""

import json
import math
from collections.abc import Iterable

import numpy as np

from slt_jax.diagnostics.checks import Check
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
from slt_jax.results.spectral import MATRICES
from slt_jax.results.text import estimate_text, interrupted_line, parts_text


def result_page(result: LLCResult, path: str | None) -> Page:
    found = result.estimate_text("±")
    reason, chains = result.health.reason, len(result.traces.loss)
    text = [reason[:1].upper() + reason[1:]]
    if line := interrupted_line(result.settings):
        text.append(line)
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
    taken = f"{_num(bias.applied)} subtracted" if bias.applied else "nothing subtracted"
    rows = [
        ("LLC", result.estimate_text("±"), "Estimate and one standard error, which counts sampling noise only."),
        ("Raw estimate", _num(result.llc_raw), "nbeta times the rise of the loss around w*, before any correction."),
        ("Bias of the step size", _num(bias.step_size, "+.3g"), "What steps of this length add, to first order."),
        ("Bias of minibatch noise", _num(bias.noise, "+.3g"), "What the noise of the gradients adds, to first order."),
        ("Raw to corrected", f"{_num(result.llc_raw)} → {_num(result.llc)}", f"{taken}: {bias.why}."),
        *_effective_dimension_rows(result),
        ("Half the weights", f"{free / 2:,.10g}", f"What a regular minimum with {free:,} free weights would give."),
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


def _effective_dimension_rows(result: LLCResult) -> Iterable[tuple[str, str, str]]:
    """As it was given, else by the curvatures that were measured at the end, if they were."""
    meaning = "What the LLC would be if the loss were quadratic around w*"
    if (found := result.effective_dimension) is not None:
        text = [f"{meaning}: half the trace of nbeta H (nbeta H + localization)^-1, with H the "]
        text += [f"{MATRICES[found.curvature]} at w*. {found.method_text}"]
        text += [f" {found.negative_text}"] if found.has_negative else []
        yield "Effective dimension", found.text("±"), "".join(text)
        difference = found.below(result.llc, result.llc_stderr, "±")
    elif math.isfinite(value := float(result.settings.probe.get("quadratic", math.nan))):
        measured = "by the eigenvalues of the Hessian at w* that were measured at the end; negative ones count 0."
        yield "Effective dimension", _num(value), f"{meaning}, {measured}"
        difference = _num(result.llc - value, "+.3g")
    else:
        return
    yield "LLC less that", difference, "Due to curvature away from w*, if the estimate has converged."


def _health_section(result: LLCResult) -> Section:
    """Every number of the verdict beside what it accepts."""
    rows = tuple(
        Row((check.name, check.value_text, check.limit_text or "no limit", check.meaning), _tone(check))
        for check in result.health.checks
    )
    legend = "✓ within what is accepted, ✗ outside of it, – not measured in this run, or not a fair test of it."
    return Section("Health", (legend,), header=("check", "value", "accepted", "meaning"), rows=rows)


def _tone(check: Check) -> str:
    if not check.limit_text:
        return ""
    return UNMEASURED if check.ok is None else GOOD if check.ok else BAD


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
    cost, spent = settings.cost, settings.spent
    rows = []
    if (seconds := cost.get("seconds")) is not None:
        parts = parts_text(cost.get("parts", {}))
        rows.append(("time", f"{seconds:.3g} s" + (f" ({parts})" if parts else "")))
    if (speed := cost.get("steps_per_s")) is not None:
        rows.append(("speed", f"{speed:,.4g} steps/s over all chains"))
    if spent:
        parts = ", ".join(f"{name} {count:,.0f}" for name, count in spent.items())
        rows.append(("minibatch gradients", f"{sum(spent.values()):,.0f} ({parts})"))
    peaks = {"of a device": cost.get("device_peak_mib"), "of the process": cost.get("process_peak_mib")}
    rows += [(f"peak memory {of}", f"{size:,} MiB") for of, size in peaks.items() if size]
    if (predicted := settings.memory.get("total_mib")) is not None:
        rows.append(("memory predicted", f"{predicted:,} MiB"))
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    rows += [("devices", settings.devices or UNKNOWN), ("versions", versions or UNKNOWN)]
    return Section("Cost, device, versions", header=("", "value"), rows=tuple(Row(row) for row in rows))
