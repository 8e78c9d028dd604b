"""Text about estimates: the number with its error, the bias, the cost."""

import math

from slt_jax.diagnostics.bias import Bias
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


def shortened(mean_time: float) -> str:
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
    return f"\nTook {seconds:.3g} s{f' ({parts})' if parts else ''}{speed}{''.join(memory)}{estimate}."


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
