"""How a result shows itself in a notebook: a compact card in HTML, with its trace as a small picture."""

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from slt_jax.results.plateau import SETTLED

_WIDTH, _HEIGHT, _POINTS = 240, 56, 80
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TONES = {"converged": "#009E73", "caution": "#E69F00", "bad": "#D55E00"}


def tone_color(verdict: str) -> str:
    """Of the bar beside a card."""
    return _TONES["converged" if verdict == "converged" else "caution" if verdict in SETTLED else "bad"]


def card(title: str, verdict: str, lines: Sequence[str], picture: str, color: str) -> str:
    """HTML without scripts. ``picture``: of ``sparkline``, or empty."""
    text = "".join(f'<div style="opacity:.75;font-size:.9em">{html.escape(line)}</div>' for line in lines if line)
    return (
        f'<div style="border-left:4px solid {color};padding:.2em .9em;margin:.3em 0;max-width:48em">'
        f"<div><b>{html.escape(title)}</b> &nbsp;{html.escape(verdict)}</div>{text}{picture}</div>"
    )


def sparkline(lines: Float[np.ndarray, "line point"], what: str, level: float | None = None) -> str:
    """Lines over the same points as an inline SVG, means of blocks of points; ``level``: a dashed line.

    Empty where there are no two points. ``what`` is shown, in words, to those who do not see it.
    """
    if lines.shape[1] < 2 or not np.isfinite(lines).any():
        return ""
    edges = np.linspace(0, lines.shape[1], min(_POINTS, lines.shape[1]) + 1).astype(int)
    with np.errstate(invalid="ignore"):
        points = np.add.reduceat(lines.astype(np.float64), edges[:-1], axis=1) / np.diff(edges)
    finite = points[np.isfinite(points)]
    if not finite.size:
        return ""
    shown = finite if level is None else np.append(finite, level)
    low, high = float(np.min(shown)), float(np.quantile(shown, 0.995))
    across = np.linspace(1, _WIDTH - 1, points.shape[1])

    def up(values: np.ndarray) -> np.ndarray:
        return np.clip(_HEIGHT - 2 - (_HEIGHT - 4) * (values - low) / ((high - low) or 1.0), 1, _HEIGHT - 1)

    drawn = ""
    for k, line in enumerate(points):
        path = " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(across, up(line), strict=True) if np.isfinite(y))
        drawn += f'<polyline points="{path}" fill="none" stroke="{_COLORS[k % len(_COLORS)]}" stroke-opacity=".7"/>'
    if level is not None:
        (y,) = up(np.array([level]))
        drawn += f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-dasharray="4 3"/>'
    return (
        f'<svg role="img" aria-label="{html.escape(what)}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="margin-top:.4em">{drawn}</svg>'
    )
