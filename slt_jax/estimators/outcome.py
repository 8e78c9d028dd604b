"""From a run at its end to results: last looks at its chains, and the record of what it was given and what it took."""

import math
from collections.abc import Callable

import jax
import numpy as np

from slt_jax.calibration.choose import Choice
from slt_jax.calibration.probe import Probe
from slt_jax.diagnostics.relaxation import Chain, debt, is_known
from slt_jax.engine.checkpoint import versions
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.memory import Need
from slt_jax.engine.mesh import gathered
from slt_jax.engine.plan import Schedule
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.tree import to_host
from slt_jax.results.llc import LLCResult
from slt_jax.samplers.base import Sampler

_PROBE_SHARE = 0.02  # of the steps' gradients, for looks at the chains' ends
_HESSIAN_SHARE = 0.04  # the same, for all curvatures at w*
_HESSIAN_BLOCKS = (2, 16)  # minibatches of examples that these are taken over, at least (or all there are) and at most


def _looks_at_end(engine: Engine, num_chains: int) -> bool:
    """Whether an estimate is long enough to pay for looks at its chains' ends, and they say something."""
    return engine.sampler.family != "exact" and _for_looks(num_chains, engine.plan) >= 8


def _for_looks(num_chains: int, plan: Schedule) -> float:
    """Minibatch gradients for looks at the chains' ends."""
    return _PROBE_SHARE * num_chains * plan.total_steps


def last_probe(engine: Engine, num_chains: int, key: jax.Array, posterior: LocalPosterior | None = None) -> Probe:
    """What the looks are taken with. ``key``: that of the estimate; ``posterior``: its own, default the engine's."""
    blocks = 1 if _for_looks(num_chains, engine.plan) < 80 else 4
    return Probe(engine, blocks, jax.random.fold_in(key, 2**31 - 9), posterior)


def look_bytes(engine: Engine, num_chains: int) -> list[int]:
    """Temporary bytes of the looks at the ends of an estimate of this many chains."""
    found = []
    if _looks_at_end(engine, num_chains):
        found = last_probe(engine, num_chains, engine.key).temporaries(calibrates=False)
    probe = _curvature_probe(engine, num_chains, engine.key)
    return found if probe is None else [*found, probe.hessian_temporaries()]


def _looks(
    engine: Engine, run: Run, posterior: LocalPosterior, chains: range, step_size: float, key: jax.Array
) -> dict[str, float]:
    """Gradient noise and acceptance where the chains ended; nothing when the run is too short to pay for it.

    Noise S in a step that takes the share t of the full time heats t times less: what counts is the mean of t S over
    time, E[t^2 S] / E[t] over steps. The chains end at equal steps.
    """
    alive = to_host(run.alive)
    kept = [c for c in chains if alive[c]][:4]
    if not kept or not _looks_at_end(engine, len(chains)):
        return {}
    probe = last_probe(engine, len(chains), key, posterior)
    repeats = int(np.clip(_for_looks(len(chains), engine.plan) / (4 * len(kept)), 1, 8))
    found = [probe.noise(engine.position(run, c), repeats)[0] for c in kept]
    values = np.array([n.controlled if engine.plan.control_variate else n.plain for n in found])
    shares = run.trace.time[list(chains), engine.plan.num_warmup : run.step].astype(np.float64)
    values *= run.trace.time[kept, run.step - 1].astype(np.float64) ** 2 / np.nanmean(shares)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else values.mean()
    accepted = [probe.acceptance(engine.position(run, c), step_size) for c in kept[:2]]
    return {
        "noise": float(values.mean()),
        "noise_stderr": float(error),
        "acceptance": float(np.mean(accepted)),
        "gradients": probe.gradients,
    }


def _debt(
    engine: Engine, posterior: LocalPosterior, num_chains: int, step_size: float, friction: float | None, time: float,
    key: jax.Array,
) -> dict[str, float]:  # fmt: skip
    """What slow directions owe the estimate, where all curvatures at w* are affordable and say how chains relax."""
    plan, probe = engine.plan, _curvature_probe(engine, num_chains, key, posterior)
    if probe is None:
        return {}
    curvatures = probe.curvatures(probe.center)
    spent = {"curvature_gradients": probe.gradients}
    if not np.isfinite(curvatures).all():
        return spent
    first, last = time * (plan.num_warmup + plan.thinning), time * plan.total_steps
    chain = Chain(engine.sampler.name, step_size, math.nan if friction is None else friction, first, last)
    owed, longer = debt(curvatures, posterior.localization, chain)
    return {"owed": owed, "longer": longer, **spent}


def _curvature_probe(
    engine: Engine, num_chains: int, key: jax.Array, posterior: LocalPosterior | None = None
) -> Probe | None:
    """What all curvatures at w* are found with; None where they cost too much or cannot be had or used."""
    plan, size = engine.plan, engine.posterior.num_free
    steps = _step_gradients(plan, num_chains)
    blocks = _curvature_blocks(engine.sampler, size, engine.source.num_data, plan.batch_size, steps)
    if not blocks:
        return None
    probe = Probe(engine, blocks, jax.random.fold_in(key, 2**31 - 11), posterior)
    return probe if probe.has_hessian else None


def _curvature_blocks(sampler: Sampler, num_free: int, num_data: int, batch_size: int, gradients: float) -> int:
    """Minibatches to find all curvatures at w* over, beside so many gradients in steps; 0 where they are not found."""
    least, most = (min(count, max(1, num_data // batch_size)) for count in _HESSIAN_BLOCKS)
    blocks = min(most, int(_HESSIAN_SHARE * gradients / (2 * num_free)))
    return blocks if blocks >= least and is_known(sampler.name) else 0


def curvature_gradients(sampler: Sampler, num_free: int, num_data: int, batch_size: int, gradients: float) -> float:
    """What finding all curvatures at w* will take of so many minibatch gradients, at most."""
    return 2.0 * num_free * _curvature_blocks(sampler, num_free, num_data, batch_size, gradients)


def _step_gradients(plan: Schedule, num_chains: int) -> int:
    return num_chains * plan.total_steps * (2 if plan.control_variate else 1)


def result_of(
    engine: Engine, run: Run, posterior: LocalPosterior, step_size: float, friction: float | None, *,
    chains: range | None = None, key: jax.Array | None = None, full_loss: float | None = None,
    choice: Choice | None = None, need: Need | None = None, names: tuple[str, ...] = (),
) -> LLCResult:  # fmt: skip
    """The result of a finished run, or of some of its chains.

    Args:
        posterior: what these chains sampled; the looks at their ends are taken with it.
        chains, key: consecutive ones and the key of their estimate; default all, and the engine's. full_loss: L_n(w*),
            where the baseline is that. names: of the further data sets.
    """
    plan = engine.plan
    chains = range(plan.num_chains) if chains is None else chains
    mine = slice(chains.start, chains.stop)
    kept = slice(plan.num_warmup + plan.thinning - 1, None, plan.thinning)
    times = run.trace.time[mine, kept]
    key = engine.key if key is None else key
    seen = _looks(engine, run, posterior, chains, step_size, key)
    mean_time = float(np.nanmean(times)) if np.isfinite(times).any() else 1.0
    seen |= _debt(engine, posterior, len(chains), step_size, friction, mean_time, key)
    probe = gathered(seen, engine.mesh)[0]
    steps = _step_gradients(plan, len(chains))
    passes = -(-engine.source.num_data // plan.batch_size) if plan.control_variate else 0
    spent = {"steps": steps, "calibration": choice.gradients if choice else 0.0, "control": passes}
    spent["probe"] = probe.get("gradients", 0.0) + probe.get("curvature_gradients", 0.0)
    evenly = _evenly(times)
    loss, baseline, *others = (evenly(t[mine, kept]) for t in run.trace[:-2])
    also = {name: evenly(run.trace.also[mine, kept, k]) for k, name in enumerate(names)}
    if full_loss is not None:
        baseline = np.full_like(loss, np.float32(full_loss), dtype=np.float64)
    finite = np.isfinite(run.trace.loss[mine]) & np.isfinite(run.trace.drift_sq[mine])
    finite[:, kept] &= np.isfinite(baseline)
    stopped = {c: int(np.argmin(ok)) for c, ok in enumerate(finite) if not ok.all()}
    settings = {
        **{k: v for k, v in vars(plan).items() if k != "chunk_size"},
        "num_chains": len(chains),
        "nbeta": posterior.nbeta,
        "localization": posterior.localization,
        "num_data": posterior.num_data,
        "num_free": posterior.num_free,
        "sampler": engine.sampler.name,
        "family": engine.sampler.family,
        "metric": engine.sampler.metric,
        "step_size": step_size,
        "friction": friction,
        "mean_time": mean_time,
        "gradients": spent,
        "calibration": choice.to_dict() if choice else {},
        "probe": probe,
        "devices": f"{engine.mesh.devices.size} x {engine.mesh.devices.flat[0].device_kind}",
        "versions": versions(),
        "cost": run.cost,
        "memory": gathered(need.to_dict() if need else {}, engine.mesh)[0],
    }
    warmup = run.trace.loss[mine, : plan.num_warmup]
    return LLCResult(loss, baseline, *others, warmup, stopped, settings, tuple(run.notes), also)


def _evenly(times: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From draws of steps that took ``times`` (chain, draw) to as many draws at equal times, in the same order.

    A step that took twice the time is there twice as often. Nothing changes where all took the same.
    """
    picks = np.broadcast_to(np.arange(times.shape[1]), times.shape).copy()
    for chain, each in enumerate(times.astype(np.float64)):
        if np.isfinite(each).all() and each.min() < each.max():
            ends = np.cumsum(each)
            picks[chain] = np.searchsorted(ends, (picks[chain] + 0.5) * (ends[-1] / len(ends)))
    rows = np.arange(len(times))[:, None]
    return lambda values: values[rows, picks]
