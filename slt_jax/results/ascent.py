"""How the chains of a run rose from w*, and the checks of a run at nbeta = 0."""

import math

import numpy as np
from jaxtyping import Float, Float64, Int

from slt_jax.diagnostics.end import end_of_spread, slowest_draws
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.sensitivity import UNKNOWN, Slope
from slt_jax.diagnostics.series import Rise, rise_of, since_start
from slt_jax.diagnostics.verdict import Health, assess
from slt_jax.engine.trace import Trace
from slt_jax.results.record import RunRecord
from slt_jax.samplers.base import Theory


def rise_and_end(
    settings: RunRecord, theory: Theory, warmup_loss: Float[np.ndarray, "chain step"],
    baseline: Float64[np.ndarray, "chain draw"], draws: Float64[np.ndarray, "chain draw"],
) -> tuple[Rise, Slope]:  # fmt: skip
    """(how these chains, which started at w*, rose; where they would end), in units of the LLC.

    ``baseline``: loss at w*, nats. ``draws``: nbeta (L(w) - L(w*)).
    """
    s = settings
    if not baseline.size:
        return Rise(), UNKNOWN
    warmup = s.nbeta * (warmup_loss - baseline.mean())
    error = s.nbeta * baseline.std() / math.sqrt(baseline.size)
    rise, relaxation = rise_of(warmup, draws, s.thinning, error), theory.relaxation
    if relaxation is None or s.metric:  # in a metric the localization is not a single number
        return rise, UNKNOWN
    friction = math.nan if s.friction is None else s.friction
    rates = s.mean_time * relaxation(np.array([s.localization]), s.step_size, friction)
    return rise, end_of_spread(*since_start(warmup, draws, s.thinning), slowest_draws(rates, s.thinning))


def health_of_control(settings: RunRecord, traces: Trace, kept: Int[np.ndarray, " kept"], num_stopped: int) -> Health:
    """Convergence and verdict at nbeta = 0, where the draws are those of L(w) - L(w*) itself."""
    gap = traces.loss[kept].astype(np.float64) - traces.baseline[kept]
    virial, kinetic = (float(x[kept].mean(dtype=np.float64)) for x in (traces.virial, traces.kinetic))
    evidence = Evidence(
        virial=virial / settings.num_free, kinetic=kinetic, num_free=settings.num_free, num_stopped=num_stopped,
        stopped_by=settings.probe.get("stopped_by", ""),
    )  # fmt: skip
    return assess(gap, evidence, control=True)
