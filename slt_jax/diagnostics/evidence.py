"""What the verdict rests on: the draws, the numbers computed from them, and what was measured beside them."""

import math
from dataclasses import dataclass, field

import numpy as np

from slt_jax.diagnostics.bias import Bias
from slt_jax.diagnostics.sensitivity import UNKNOWN, Slope
from slt_jax.diagnostics.series import Rise, error_of_mean, ess_and_rhat, standard_error, trend_of


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the verdict rests on beside the draws. NaN where unknown.

    ``virial``: mean <w - w*, G> over d + (step_size / 4) mean G'PG, 1 when stationary. ``kinetic``: mean kinetic
    temperature, 1 when right. ``acceptance``: Metropolis acceptance of one Euler-Maruyama step of this step_size.
    ``bias``: of the raw estimate. ``nbeta_slope``, ``localization_slope``: d LLC / d log nbeta, d LLC / d log
    localization. ``degree``: see ``degree_of``. ``localized_share``: 1 - mean <w - w*, nbeta grad L> / d, the share of
    the directions that the localization confines and not the loss. ``hot``: which of the chains started hot.
    ``num_stopped``: chains that went non-finite and are not among the draws; ``stopped_by``: what in the data made
    them, "" where nothing did. ``num_free``: d. ``metric``: whether the
    chains moved in a metric's coordinates. ``heat``: what ``thermometer`` gives, as an LLC. ``rise``: of the chains
    started at w*, from doubling to doubling of the run. ``tilt``: see ``tilt_of``. ``unrelaxed_bias``: what directions
    that have not relaxed yet would still add, by the curvatures at w*; ``times_longer``: the length of run that leaves
    little of it, over the length of this run; both from ``diagnostics.relaxation``. ``spacing``: nbeta times the
    distance from the loss at w* to the next number of float32. ``example_spread``: nbeta times the standard deviation
    over examples of their losses less those at w*. ``gradients``: minibatch gradients that the estimate took in all.
    ``end``: where the mean of the chains that started at w* would end, see ``end_of_spread``. ``loss``: mean loss of
    the draws, and ``chance_loss`` that of a model that has learned nothing, nats per example. ``scatter``: share of the
    variance of the draws that is minibatch noise. ``chosen_step``: the step size, where a calibration chose it.
    ``expected``: the LLC by the curvatures at w*, of a run of this length; ``hidden``: directions whose curvature there
    is below the localization, and ``hides``: by how much it lowers the estimate, where the largest curvature set it.
    ``scatter_error``: standard error of the mean of the draws by minibatch noise alone.
    """

    virial: float = math.nan
    kinetic: float = math.nan
    acceptance: float = math.nan
    bias: Bias | None = None
    nbeta_slope: Slope = UNKNOWN
    localization_slope: Slope = UNKNOWN
    degree: Slope = UNKNOWN
    localized_share: float = math.nan
    hot: np.ndarray | None = field(default=None, repr=False)
    num_stopped: int = 0
    stopped_by: str = ""
    num_free: int = 1
    metric: bool = False
    heat: Slope = UNKNOWN
    rise: Rise = Rise()  # noqa: RUF009
    tilt: Slope = UNKNOWN
    unrelaxed_bias: float = math.nan
    times_longer: float = math.nan
    spacing: float = math.nan
    example_spread: float = math.nan
    gradients: float = math.nan
    end: Slope = UNKNOWN
    loss: float = math.nan
    chance_loss: float = math.nan
    scatter: float = 0.0
    chosen_step: float = math.nan
    expected: float = math.nan
    hidden: int = 0
    hides: float = math.nan
    scatter_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The draws nbeta (L_m(w_t) - L_m(w*)), (chain, draw), and numbers computed from them. NaN where unknown.

    ``mean``, ``error``: the raw estimate and its standard error. ``ess``: effective number of independent draws over
    all chains. ``rhat``: split R-hat. ``trend``: mean of the second half less mean of the first; ``trend_z``: the same
    over its standard error. ``bracket``: means of the chains started at w* and of those started hot;
    ``bracket_error``: of their difference.
    """

    draws: np.ndarray = field(repr=False)
    evidence: Evidence
    mean: float
    error: float
    ess: float
    rhat: float
    trend: float
    trend_z: float
    bracket: tuple[float, float]
    bracket_error: float

    @property
    def size(self) -> float:
        """Of the estimate, which a saddle can make negative."""
        return abs(self.mean)

    def share(self, part: float) -> float:
        """``part`` of the estimate; NaN of none."""
        return part / self.size if self.size > 0 else math.nan


def sample_of(draws: np.ndarray, evidence: Evidence) -> Sample:
    """The numbers of ``draws`` (chain, draw), of the chains that stayed finite."""
    ess, rhat = ess_and_rhat(draws)
    trend, trend_z = trend_of(draws)
    bracket, bracket_error = (math.nan, math.nan), math.nan
    if (hot := evidence.hot) is not None and hot.any() and not hot.all():
        bracket = float(draws[~hot].mean()), float(draws[hot].mean())
        bracket_error = math.hypot(*(standard_error(part, ess_and_rhat(part)[0]) for part in (draws[hot], draws[~hot])))
    return Sample(
        draws=draws, evidence=evidence, mean=float(draws.mean()) if draws.size else math.nan,
        error=error_of_mean(draws, ess, evidence.scatter) if draws.size else math.nan, ess=ess, rhat=rhat,
        trend=trend, trend_z=trend_z, bracket=bracket, bracket_error=bracket_error,
    )  # fmt: skip
