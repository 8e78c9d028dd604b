"""One estimate: losses of local chains into a learning coefficient with an error bar."""

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from slt_jax.calibration.choose import Choice, calibrate, calibration_probe
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine
from slt_jax.engine.memory import MemoryEstimate, estimate_memory, first_that_fits, layouts, needs_memory_check
from slt_jax.engine.mesh import allgather, is_main_process
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.run import abandon, check_at_center, check_other_data, full_loss_at_center, run_to_end
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.ends import curvature_gradients, end_temporaries
from slt_jax.estimators.lengths import lengths_of
from slt_jax.estimators.outcome import result_of
from slt_jax.estimators.request import Request
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.samplers.base import Metric


@in_own_context
def estimate_llc(
    posterior: LocalPosterior,
    data: Any,
    *,
    sampler: Any = None,
    num_chains: int | None = None,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    thinning: int | None = None,
    batch_size: int | None = None,
    key: Any = 0,
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool = False,
    micro_batches: int = 1,
    baseline: str = "paired",
    budget: int | None = None,
    control_variate: bool | None = None,
    hot: float | None = None,
    also: Mapping[str, Any] | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> LLCResult:
    """Estimate the local learning coefficient at ``posterior.center``.

    The estimate is ``nbeta (E[L_m(w)] - L_m(w*))`` over chains and draws, after ``num_warmup`` steps from w*, less the
    bias of step size and minibatch noise where that is known. What is not given is chosen: a sampler without a step
    size, or a posterior without a localization, starts a calibration, which spends at most 15 % of the gradients,
    or 50 to 130 where that is more (a Kronecker metric some 230).

    Args:
        posterior: what is sampled.
        data: a pytree of arrays with one row per example, or ``token_file(...)``, ``hf_dataset(...)``.
        sampler: how one step moves; default ``underdamped()``, calibrated. Also any ``blackjax.SamplingAlgorithm``.
        num_chains, num_draws, thinning: each chain keeps ``num_draws`` draws, one every ``thinning`` steps. Four chains
            by default; with a ``budget`` below 4,000 two, and below 500 one, unless ``mesh``, ``chain_batch`` or
            several processes say how chains are laid out.
        num_warmup: steps before the first draw.
        batch_size: examples in one step's minibatch, drawn with replacement, its own for each chain; default
            ``min(256, num_data)``. As many as there are: all of them in every step, and no noise.
        key: ``jax.random.key(...)`` or an integer seed.
        mesh: devices, with an axis ``chain`` (and ``model``); default as many devices as divide ``num_chains``. With
            several processes (``jax.distributed.initialize``) those of all; every process makes the same call on the
            same data, which each holds whole, and gets the same result.
        chain_batch: chains advanced together on one device; 1 uses least memory. Must divide the chains of a device.
            Default: 1 on a CPU and for large models, else as many as fit into the device's memory.
        checkpoint_dir: where to keep state and traces; the same call with the same directory resumes an interrupted run
            and ends bit for bit equal to an unbroken one on the same mesh, versions and device kind. Several processes
            need a disk that they share.
        progress: show the memory that large models will take, what the calibration chose, the time to go, and a bar
            with steps/s and the running estimate; on the first process.
        micro_batches: parts in which a minibatch goes through the model, to save memory; must divide ``batch_size``.
        baseline: ``"paired"`` subtracts L_m(w*) on the same batch at each draw (one more forward pass a draw, much less
            variance); ``"full"`` subtracts L_n(w*) over all data, computed once.
        budget: minibatch gradients for all of this, calibration and every chain counted; sets the lengths that are not
            given. Default: 10,000, more for fewer than 10,000 weights; without a calibration, 500 draws a chain.
        control_variate: take g_m(w) - g_m(w*) + grad L_n(w*) as the gradient: no minibatch noise at w*, at twice the
            cost a step and one pass over the data. Default: where the calibration finds that it pays.
        hot: every other chain starts at nbeta / hot and is cooled over half of the warm-up, so that the answer is met
            from both sides; 1 for none. Default: 10 when the step size was calibrated and the warm-up allows it.
        also: name -> data set, like ``data``. Their losses are read at every draw, on a batch of their own at w and at
            w* (two more forward passes each): ``result.also`` has nbeta (E[L'(w)] - L'(w*)) for each, with w still from
            the posterior of ``data``. Held in memory.
        chunk_size: most steps in one compiled chunk, between two updates of the host. Changes no number.
        checkpoint_seconds: least time between two saves.

    Raises:
        TypeError, ValueError: an argument that cannot be used; the message names it, its value, and what to do.
        FloatingPointError: the loss is not finite at w*.
        MemoryError: the run would take more memory than there is; said before it starts.

    Error: the standard error counts sampling noise and that of the corrections; ``verdict`` names other problems.

    Source: Lau et al., arXiv:2308.12108, equation 14.
    """
    request = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, key=key, mesh=mesh, chain_batch=chain_batch,
        checkpoint_dir=checkpoint_dir, progress=progress, micro_batches=micro_batches, baseline=baseline,
        budget=budget, control_variate=control_variate, hot=hot, also=also, chunk_size=chunk_size,
        checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    return _estimate(request)


def _estimate(request: Request) -> LLCResult:
    engine, memory = _fitted(request)
    problem, mesh = engine.problem, engine.problem.mesh
    if memory is not None:
        _show(request, engine, memory.lines())
    identity = request.checked_identity(engine.plan, mesh, _asked(request))
    check_other_data(problem, request.other_data)
    full_loss = full_loss_at_center(problem) if request.baseline == "full" else None
    store = None if request.folder is None else RunStore(request.folder, identity, mesh)
    posterior, choice = request.posterior, None
    sampler, nbeta = request.sampler, float(posterior.nbeta or 0.0)
    if request.is_open:
        choice, metric = _calibrated(request, engine, store, memory)
        posterior = posterior.with_numbers(nbeta=nbeta, localization=choice.localization)
        spent = choice.gradients + _end_gradients(request, _total(request, engine.plan))
        lengths = lengths_of(request, spent, choice.control_variate)
        engine = engine.replanned(request.schedule(lengths, engine.plan.chain_batch, choice.control_variate))
        numbers = choice.numbers(nbeta, metric)
        _show(request, engine, choice.lines)
    else:
        assert sampler.step_size is not None
        assert posterior.localization is not None
        numbers = Numbers(nbeta, posterior.localization, sampler.step_size, sampler.friction)
    run = run_to_end(
        engine, engine.inputs(numbers), store, progress=request.progress, every=request.checkpoint_seconds, nbeta=nbeta
    )
    return result_of(
        engine, run, posterior, numbers, full_loss=full_loss, choice=choice, memory=memory,
        other_names=tuple(request.other_data),
    )  # fmt: skip


def _asked(request: Request) -> dict[str, Any]:
    """The numbers that the caller gave, by which a run is known again."""
    names = ("num_chains", "num_draws", "num_warmup", "thinning", "budget", "control_variate", "hot")
    return {name: getattr(request, name) for name in names}


def _fitted(request: Request) -> tuple[Engine, MemoryEstimate | None]:
    """An engine for the estimate, before anything is calibrated, laid out so that it fits into memory."""
    control = bool(request.control_variate) and not request.is_open
    ends = 0.0 if request.is_open else _end_gradients(request, request.budget or 0)
    lengths = lengths_of(request, ends, control)
    chains, num_free = lengths.num_chains, request.posterior.num_free

    def engines() -> Iterator[Engine]:
        for mesh, chain_batch in layouts(chains, request.given_mesh(chains), request.chain_batch, num_free):
            plan = request.schedule(lengths, chain_batch, control)
            yield Engine(request.problem(mesh), request.sampler, plan, request.key)

    def estimate(engine: Engine) -> MemoryEstimate | None:
        if not needs_memory_check(request.posterior, chains):
            return None
        sizes = end_temporaries(engine, chains)
        if request.is_open:
            probe = calibration_probe(engine.problem, 1.0, engine.key, _total(request, engine.plan))
            sizes += probe.temporaries(calibrates=True, metric=request.sampler.metric)
        saves = request.folder is not None
        return estimate_memory(engine, sizes, saves=saves, control=bool(request.control_variate))

    return first_that_fits(engines(), estimate)


def _calibrated(
    request: Request, engine: Engine, store: RunStore | None, memory: MemoryEstimate | None
) -> tuple[Choice, Metric]:
    """The calibration's choice; a resumed run reads that of its first start. Control variates only where they fit."""
    note = None if store is None else store.read_note("calibration")
    if note is not None and not request.sampler.metric:
        return Choice.from_dict(note), ()  # a metric is not kept: it is measured again, a function of the key
    mesh, control = engine.problem.mesh, request.control_variate
    roomy = memory is None or all(allgather(memory.fits_with_control, mesh))
    if request.sampler.theory.full_batch or (control is None and not roomy):
        control = False
    try:
        check = functools.partial(check_at_center, engine.problem)
        choice, metric = calibrate(engine, request.posterior, control, _total(request, engine.plan), check)
        choice = Choice.from_dict(allgather(choice.to_dict(), mesh)[0])
    except BaseException:
        abandon(store)
        raise
    if store is not None:
        store.write_note("calibration", choice.to_dict())
    return choice, metric


def _total(request: Request, plan: Schedule) -> float:
    """Minibatch gradients of the whole estimate."""
    return request.budget or plan.num_chains * plan.total_steps


def _end_gradients(request: Request, total: float) -> float:
    """Of ``total``, those that measuring all curvatures at w* will take."""
    num_data, num_free = request.source.num_data, request.posterior.num_free
    return curvature_gradients(request.sampler, num_free, num_data, request.batch_size, total)


def _show(request: Request, engine: Engine, lines: Iterable[str]) -> None:
    if request.progress and is_main_process(engine.problem.mesh):
        print(*(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
