"""The picture of one estimate: loss traces and the running estimate."""

import math
import os
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slt_jax.report.style import COLORS, figure_of, legend_below

_POINTS = 200  # of a line; if there are more than twice as many, it is averaged over blocks


def plot_result(result: Any, path: str | os.PathLike | None = None) -> Figure:
    """The loss of each chain with the warm-up shaded, and below it the running estimate with its final error bar.

    Long runs are drawn as means over blocks of steps. A cross marks the step at which a chain became non-finite.
    """

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        _plot_losses(upper, result)
        _plot_running_estimate(lower, result)
        figure.suptitle(f"LLC {result.estimate_text('±')}: {result.verdict}", fontweight="bold")
        upper.set_title(_title(result), fontsize=9)
        legend_below(figure, (upper, lower), 3)

    return figure_of((6.2, 6.0), path, draw)


def _title(result: Any) -> str:
    chains, draws = result.loss_trace.shape
    text = f"{chains} chain{'s' * (chains > 1)} of {draws} draws"
    if math.isfinite(result.rhat):
        text += f", R-hat {result.rhat:.3f}, ESS {result.ess:.0f}"
    if result.settings.interrupted:
        text += f"; interrupted, of {result.settings.interrupted} draws"
    return text + (f"; lines are means of {round(draws / _POINTS)} draws" if draws > 2 * _POINTS else "")


def block_means(values: Shaped[np.ndarray, "*leading step"]) -> Float64[np.ndarray, "*leading point"]:
    """Means along the last axis over ``_POINTS`` blocks, or the values if there are at most twice as many of them."""
    length = values.shape[-1]
    edges = np.linspace(0, length, (length if length <= 2 * _POINTS else _POINTS) + 1).astype(int)
    return np.add.reduceat(values.astype(np.float64), edges[:-1], axis=-1) / np.diff(edges)


def _chain_style(result: Any, chain: int) -> dict[str, Any]:
    """Colour and label: one for each chain if there are at most eight, else one for each kind of start."""
    hot = result.settings.hot > 1 and chain % 2 == 1
    if len(result.loss_trace) > len(COLORS):
        return {"color": COLORS[int(hot)], "label": "chains started hot" if hot else "chains from w*"}
    return {"color": COLORS[chain], "label": f"chain {chain}{', started hot' if hot else ''}"}


def _draw_steps(result: Any) -> np.ndarray:
    return result.settings.num_warmup + result.settings.thinning * (1 + np.arange(result.loss_trace.shape[1])) - 1


def _plot_losses(axis: Axes, result: Any) -> None:
    warm, kept = result.settings.num_warmup, result.kept_chains
    steps = np.r_[block_means(np.arange(warm)) if warm else [], block_means(_draw_steps(result))]
    losses = np.concatenate([block_means(x) for x in (result.warmup_loss, result.loss_trace) if x.size], axis=-1)
    for c, line in enumerate(losses):
        axis.plot(steps, line, lw=0.8, alpha=0.8, **_chain_style(result, c))
    if math.isfinite(result.init_loss):
        axis.axhline(result.init_loss, color="black", ls="--", lw=1.2, label="loss at w*")
    cross = {"transform": axis.get_xaxis_transform(), "color": "black", "ms": 8, "label": "chain went non-finite"}
    for step in result.stopped.values():
        axis.plot(step, 0.95, "X", **cross)
    if warm:
        axis.axvspan(0, warm, color="0.92", lw=0, zorder=0, label="warm-up")
    axis.set(ylabel="minibatch loss (nats per example)", xlabel="step")
    if kept.size:
        _set_limits(axis, losses[kept], steps.searchsorted(warm), result.init_loss)
        axis.set_xlim(-0.01 * steps[-1], 1.01 * steps[-1])
    elif (losses > 0).any():
        axis.set(yscale="log", xlim=(-1, 1.3 * max(result.stopped.values()) + 5))


def _set_limits(axis: Axes, losses: Float[np.ndarray, "chain point"], num_warm: int, init_loss: float) -> None:
    """Limits that include the draws and the second half of the warm-up. Hot starts and rare spikes may exceed them."""
    low, high = np.quantile(np.append(losses[:, num_warm // 2 :], init_loss), (0.0, 0.998))
    margin = 0.08 * (high - low) or 1e-3 * abs(high) or 1e-3
    axis.set_ylim(low - margin, high + margin)


def _plot_running_estimate(axis: Axes, result: Any) -> None:
    draws, bias = result.llc_draws, result.bias.applied
    if not draws.size:
        axis.text(0.5, 0.5, "no chain stayed finite: no estimate", transform=axis.transAxes, ha="center", va="center")
        axis.set(ylabel="running LLC", xticks=[], yticks=[])
        return
    points = np.linspace(0, draws.shape[1] - 1, min(_POINTS, draws.shape[1])).astype(int)
    steps, estimates = _draw_steps(result)[points], np.cumsum(draws, 1)[:, points] / (points + 1) - bias
    for c, line in zip(result.kept_chains, estimates, strict=True):
        axis.plot(steps, line, lw=0.8, alpha=0.8, **_chain_style(result, int(c)))
    axis.plot(steps, estimates.mean(0), color="black", lw=2, label="mean of the chains")
    band = (result.llc - result.llc_stderr, result.llc + result.llc_stderr)
    if math.isfinite(result.llc_stderr):
        axis.axhspan(*band, color=COLORS[4], alpha=0.45, lw=0, zorder=0.5, label="estimate ± standard error")
    if bias:
        axis.axhline(result.llc_raw, color="black", ls=":", lw=1.5, label="raw: without bias correction")
    later = estimates[:, estimates.shape[1] // 8 :]
    shown = [later.min(), later.max(), result.llc_raw, *(x for x in band if math.isfinite(x))]
    margin = 0.08 * (max(shown) - min(shown)) or 0.5
    axis.set(ylabel="running LLC", xlabel="step (after warm-up)", ylim=(min(shown) - margin, max(shown) + margin))
