"""Estimates as text."""

import math


def estimate_text(llc: float, stderr: float, sign: str) -> str:
    """An estimate and its standard error, e.g. ``12.3 +/- 0.5``; ``sign`` is what stands between them."""
    if math.isnan(llc):
        return "unknown"
    return f"{llc:.4g} " + ("without an error bar" if math.isnan(stderr) else f"{sign} {stderr:.2g}")
