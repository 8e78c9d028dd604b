"""Text about estimates: the number with its error, the bias, the cost."""

import math

from slt_jax.diagnostics.bias import Bias
from slt_jax.diagnostics.verdict import Health
from slt_jax.results.record import CostRecord, RunRecord

_UNKNOWN = "unknown"


def estimate_text(llc: float, stderr: float, sign: str) -> str:
    """An estimate and its standard error, e.g. ``12.3 +/- 0.5``; ``sign`` is what stands between them."""
    if math.isnan(llc):
        return _UNKNOWN
    return f"{llc:.4g} " + ("without an error bar" if math.isnan(stderr) else f"{sign} {stderr:.2g}")


def bias_line(raw: float, bias: Bias) -> str:
    """The raw estimate, its bias, and whether that was subtracted."""
    terms = {"step size": bias.step_size, "minibatch noise": bias.noise}
    known = [f"{name} {value:+.2g}" for name, value in terms.items() if math.isfinite(value)]
    if not known:
        return f"Raw estimate {raw:.4g}; bias unknown: {bias.why}."
    done = f"not subtracted: {bias.why}" if bias.total else "nothing to subtract"
    done = f"subtracted ({bias.why})" if bias.applied else done
    return f"Raw estimate {raw:.4g}; bias: {', '.join(known)}; {done}."


def signs_text(health: Health) -> str:
    """What the checks read, as far as it is known."""
    signs = [f"trend {health.trend:+.2g}", f"virial ratio {health.virial:.3f}"]
    if math.isfinite(health.evidence.kinetic):
        signs.append(f"kinetic temperature {health.evidence.kinetic:.3f}")
    if math.isfinite(health.evidence.acceptance):
        signs.append(f"acceptance of a step {health.evidence.acceptance:.2f}")
    if math.isfinite(health.bracket[1]):
        signs.append(f"{health.bracket[0]:.4g} from w* and {health.bracket[1]:.4g} from hot starts")
    return ", ".join(signs)


def settings_line(settings: RunRecord) -> str:
    """What a run was moved with, and in a second line what a calibration chose."""
    s = settings
    text = (
        f"{s.sampler} with step_size {s.step_size:.3g}, nbeta {s.nbeta:.4g}, localization "
        f"{s.localization:.3g}{_shortened(s.mean_time)}; {s.num_free:,} weights free, {s.num_warmup} warm-up steps, "
        f"thinning {s.thinning}, batch {s.batch_size} of {s.num_data:,}."
    )
    lines = s.calibration.get("lines")
    return f"{text}\nChosen: {'; '.join(lines)}." if lines else text


def stopped_line(stopped: dict[int, int], chains: int) -> str:
    """Which of the chains went non-finite at which step; empty if none did."""
    if not stopped:
        return ""
    where = ", ".join(f"chain {c} at step {t}" for c, t in sorted(stopped.items())[:8])
    return f"Went non-finite and left out: {where} ({len(stopped)} of {chains})."


def _shortened(mean_time: float) -> str:
    """By how much steps were shortened on average; empty if they were not."""
    return f", steps shortened to {mean_time:.1%} of their time on average" if mean_time < 0.9995 else ""


def cost_line(cost: CostRecord, predicted: int | None) -> str:
    """Time, speed and memory of a run, and the MiB that were predicted."""
    if (seconds := cost.get("seconds")) is None:
        return ""
    parts = parts_text(cost.get("parts", {}))
    rate = cost.get("steps_per_s")
    speed = "" if rate is None else f", {rate:,.4g} steps/s over all chains"
    peaks = {"of a device": cost.get("device_peak_mib"), "of the process": cost.get("process_peak_mib")}
    memory = [f"; peak memory {of} {size:,} MiB" for of, size in peaks.items() if size]
    estimate = f" ({predicted:,} predicted)" if memory and predicted else ""
    return f"Took {seconds:.3g} s{f' ({parts})' if parts else ''}{speed}{''.join(memory)}{estimate}."


def parts_text(parts: dict[str, float]) -> str:
    """What took how long, without what took less than a hundredth of a second."""
    return ", ".join(f"{name} {seconds:.2g} s" for name, seconds in parts.items() if seconds >= 0.01)


def interrupted_line(settings: RunRecord) -> str:
    """That a run was ended before it had its draws; empty of one that was not."""
    if not settings.interrupted:
        return ""
    return (
        f"Interrupted after {settings.num_draws:,} of {settings.interrupted:,} draws: the estimate and its verdict are "
        "of these."
    )


MARK = "*"
MARKED = f"{MARK} not converged"  # what the mark means, below a table or in a picture


def marked(estimate: str, verdict: str) -> str:
    """An estimate as it stands in a text, a table or a picture: with a mark unless its verdict is "converged"."""
    return estimate if verdict == "converged" or estimate == _UNKNOWN else f"{estimate}{MARK}"
