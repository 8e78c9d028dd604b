"""Numbers in words."""

import math


def estimate_text(llc: float, stderr: float, sign: str) -> str:
    """Estimate and error bar in words."""
    if math.isnan(llc):
        return "unknown"
    return f"{llc:.4g} " + ("without an error bar" if math.isnan(stderr) else f"{sign} {stderr:.2g}")
