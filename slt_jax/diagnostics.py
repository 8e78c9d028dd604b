"""Is this estimate to be believed? Effective sample size, R-hat, trend, and the verdict."""

import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

_RHAT_LIMIT = 1.05
_TREND_SIGMA = 3.0


@dataclass(frozen=True)
class Health:
    """Convergence numbers of the draws ``nbeta (L_m(w_t) - L_m(w*))``.

    ``ess``: effective number of independent draws over all chains. ``rhat``: split R-hat. ``trend``: mean of the second
    half less mean of the first, in units of the LLC; ``trend_z``: the same over its standard error. ``virial``: mean
    <w - w*, G> over d + (step_size / 4) mean |G|^2, 1 when stationary. ``verdict``: few words; ``reason``: a sentence.
    """

    ess: float
    rhat: float
    trend: float
    trend_z: float
    virial: float
    verdict: str
    reason: str


def split_chains(draws: np.ndarray) -> np.ndarray:
    """(chain, draw) -> (2 chain, draw // 2): each chain's halves as chains of their own."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])


def ess_and_rhat(draws: np.ndarray) -> tuple[float, float]:
    """Effective sample size and split R-hat of ``draws`` (chain, draw); NaN with fewer than 4 draws a chain.

    Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner, arXiv:1903.08008, as implemented in BlackJAX.
    """
    if draws.shape[0] == 0 or draws.shape[1] < 4:
        return math.nan, math.nan
    halves = split_chains(draws - draws.mean())
    if halves.std() == 0:
        return math.nan, math.nan
    ess, rhat = (float(x) for x in _ess_and_rhat()(halves.astype(np.float32)))
    return min(max(ess, 1.0), float(draws.size)), rhat


@functools.cache
def _ess_and_rhat():
    # blackjax runs JAX at its import, which would fix the number of devices before the user can.
    from blackjax.diagnostics import effective_sample_size, potential_scale_reduction

    return jax.jit(lambda x: (effective_sample_size(x, 0, 1), potential_scale_reduction(x, 0, 1)))


def standard_error(draws: np.ndarray, ess: float) -> float:
    """Standard error of the mean over all chains and draws."""
    return float(draws.std(ddof=1) / math.sqrt(ess)) if draws.size > 1 else math.nan


def trend_of(draws: np.ndarray) -> tuple[float, float]:
    """Mean of the second half of the draws less that of the first, and the same over its standard error."""
    half = draws.shape[1] // 2
    if half < 4 or draws.shape[0] == 0:
        return math.nan, math.nan
    first, second = draws[:, :half], draws[:, -half:]
    errors = [standard_error(part, ess_and_rhat(part)[0]) for part in (first, second)]
    change = float(second.mean() - first.mean())
    return change, change / max(math.hypot(*errors), 1e-30)


def assess(draws: np.ndarray, virial: float, num_stopped: int) -> Health:
    """The Health of ``draws`` (chain, draw), from finite chains alone; ``num_stopped`` others went non-finite."""
    ess, rhat = ess_and_rhat(draws)
    trend, trend_z = trend_of(draws)
    verdict, reason = _judge(draws, ess, rhat, trend, trend_z, num_stopped)
    return Health(ess, rhat, trend, trend_z, virial, verdict, reason)


def _judge(draws, ess, rhat, trend, trend_z, num_stopped) -> tuple[str, str]:
    if draws.shape[0] == 0:
        return "diverged", "every chain went non-finite; take a smaller step_size."
    if num_stopped:
        return "diverged", f"{num_stopped} chains went non-finite and are left out; take a smaller step_size."
    if math.isnan(ess):
        return "too few draws", "an error bar needs at least 4 draws a chain."
    mean, error = draws.mean(), standard_error(draws, ess)
    if mean < -2 * error:
        return "not a minimum", "the chains found lower loss than w*; train further, or raise localization."
    if abs(trend_z) > _TREND_SIGMA and abs(trend) > 0.02 * abs(mean):
        word = "still rising" if trend > 0 else "still falling"
        return (
            word,
            f"the second half of the draws is {trend:+.3g} from the first ({trend_z:+.1f} standard errors); "
            "raise num_warmup.",
        )
    if rhat > _RHAT_LIMIT:
        return "chains disagree", f"R-hat {rhat:.3f} is above {_RHAT_LIMIT}; draw more, or raise num_warmup."
    if ess < 100 and error > 0.1 * abs(mean):
        return "too few draws", f"{ess:.0f} effective draws leave an error of {error:.2g}; draw more."
    return (
        "converged",
        "no sign of trouble in trend, R-hat or divergence. Step-size bias is not checked: halve step_size and compare.",
    )
