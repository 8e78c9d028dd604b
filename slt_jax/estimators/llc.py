"""One estimate: losses of local chains into a learning coefficient with an error bar."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from slt_jax._io import digest_of_json
from slt_jax.calibration.choose import Choice, calibrate, calibration_probe
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.loss_checks import check_loss
from slt_jax.engine.memory import (
    MemoryEstimate,
    estimate_memory,
    first_that_fits,
    layouts,
    needs_memory_check,
    observing_bytes,
)
from slt_jax.engine.mesh import allgather, is_main_process, spans_processes
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.run import (
    Timer,
    abandon,
    check_at_center,
    check_other_data,
    draws_of,
    full_loss_at_center,
    run_to_end,
)
from slt_jax.engine.screen import Screen
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.ends import curvature_gradients, end_temporaries
from slt_jax.estimators.lengths import lengths_of
from slt_jax.estimators.observing import Observing, observe_identity, watched
from slt_jax.estimators.outcome import partial_result, result_of
from slt_jax.estimators.precision import Rounds, first_round, most_gradients
from slt_jax.estimators.request import Request
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.samplers.base import Metric

_CALLBACK_SECONDS = 1.0


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
    progress: bool | None = None,
    micro_batches: int = 1,
    baseline: str = "paired",
    budget: int | None = None,
    target_error: float | None = None,
    minutes: float | None = None,
    control_variate: bool | None = None,
    hot: float | None = None,
    also: Mapping[str, Any] | None = None,
    observe: Mapping[str, Any] | None = None,
    callback: Callable[[int, LLCResult], Any] | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> LLCResult:
    """Estimate the local learning coefficient (LLC) at ``posterior.center``, the weights w*.

    The estimate is ``nbeta (E[L_m(w)] - L_m(w*))``, a mean over chains and draws. The chains start at w* (some of them
    hot, see ``hot``), and the first ``num_warmup`` steps are not used. Biases of step size and minibatch noise are
    subtracted where they are known.

    If the sampler has no step size or no friction, or the posterior has no localization, a calibration chooses them. It
    takes at most 15 % of the gradients, or 50 to 130 of them if that is more (about 230 with the Kronecker metric).

    Args:
        posterior: the distribution that is sampled.
        data: a pytree of arrays with one row per example, or ``token_file(...)``, ``hf_dataset(...)``.
        sampler: how the chains move. Default: ``underdamped()`` with a calibrated step size and friction. Any
            ``blackjax.SamplingAlgorithm`` is accepted too.
        num_chains: number of independent chains. Default: 4. With a ``budget`` below 4,000 it is 2, and below 500 it is
            1, unless ``mesh`` or ``chain_batch`` is given or there are several processes.
        num_draws: number of draws that each chain keeps.
        num_warmup: number of steps before the first draw. Default: 40 % of the steps of a budget, otherwise as many as
            ``num_draws``.
        thinning: number of steps from one draw to the next. Default: 1, or at least 4 if a budget allows long chains.
        batch_size: number of examples in the minibatch of a step, drawn with replacement, independently for each chain.
            With ``batch_size=num_data`` every step uses each example once, so there is no minibatch noise. Default:
            all of up to 2,048 examples in memory (of at most 16 MiB) for models of up to 10,000 weights, where a
            gradient over all of them costs less than the correction of minibatch noise; otherwise
            ``min(256, num_data)``.
        key: ``jax.random.key(...)`` or an integer seed.
        mesh: devices, with an axis ``chain`` (and ``model``, if the weights are sharded). Default: the largest number
            of devices that divides ``num_chains``. With several processes (``jax.distributed.initialize``) it has
            devices of all of them. Every process must make the same call with the same complete data, and gets the same
            result.
        chain_batch: number of chains that move at the same time on one device. It must divide the number of chains on a
            device; 1 needs the least memory. Default: 1 on a CPU and for large models, otherwise as many as fit into
            the device's memory.
        checkpoint_dir: folder for the state and the traces of the run. If the run is interrupted, the same call resumes
            it, and the result is bit for bit that of an uninterrupted run on the same mesh, versions and kind of
            device. Several processes need a disk that they share.
        progress: show what the call is doing and for how long already, the predicted memory of large models, the
            choices of the calibration, the time to go, steps/s and the running estimate. Default: in a terminal and in
            a notebook. Only the first process prints, on stderr.
        micro_batches: number of parts in which a minibatch passes through the model, to save memory. It must divide
            ``batch_size``.
        baseline: how the loss at w* is computed. ``"paired"``: on the minibatch of each draw. This has much less
            variance, and costs one more forward pass per draw. ``"full"``: once, over all data.
        budget: total number of gradients, including calibration, warm-up and all chains. It determines the
            lengths (``num_draws``, ``num_warmup``, ``thinning``) that are not given, and cannot be combined with
            ``num_draws``. Each gradient is over ``batch_size`` examples: where that is the whole data set, it takes up
            to num_data / 256 times as long as over a minibatch of 256. Default: 10,000 from 10,000 weights on, and more
            for fewer weights; num_data / 512 times fewer (if that is above 1) where ``batch_size`` is by default the
            whole data set. If nothing has to be calibrated, the default is 500 draws per chain instead of a budget.
        target_error: relative standard error at which to stop, e.g. 0.03 for 3 %. The run then goes on, up to twice as
            long each time, until the error is that small and no check asks for more steps; with 40 % of its steps as
            warm-up. ``budget`` and ``minutes`` are its limits; ``result.notes`` says so where one of them ended it.
            Default of ``budget`` with it: ten times what it is without.
        minutes: with ``target_error``, wall time of the whole call after which no further round is begun.
        control_variate: use g_m(w) - g_m(w*) + grad L_n(w*) as the gradient, where g_m is the gradient on a minibatch.
            It has no noise at w*, but a step costs twice as much, and there is one pass over the data. Default: chosen
            by the calibration.
        hot: every other chain starts at nbeta / hot, where it spreads further, and is cooled to nbeta during the first
            half of the warm-up. The estimate is then approached from both sides. 1 for no hot starts. Default: 10 if
            the step size is calibrated and the warm-up is long enough, otherwise 1.
        also: name -> data set, of the same kinds as ``data``, held in memory. For each, ``result.also[name]`` has
            nbeta (E[L'(w)] - L'(w*)), where L' is the loss on these data and w are the same draws. It costs two more
            forward passes per draw and data set, on minibatches of their own.
        observe: name -> examples, or an ``Observable`` of them, whose losses (or another function of them) are computed
            at every draw; ``result.observed[name]`` has them. It costs a forward pass of these examples per draw, which
            counts as a third of a gradient.
        callback: called as ``callback(step, result)`` while the chains run, with the number of steps that each has
            taken, and the result of the draws so far: once a draw is there, then about once a second, and after the
            last step. It lacks what is measured at the end, such as the bias of minibatch noise. ``observed`` lacks
            what is written to a path and, with several processes, moments. Only the first process calls it.
        chunk_size: largest number of steps between two updates of the host, in one compiled program. It does not change
            the result.
        checkpoint_seconds: shortest time between two saves to ``checkpoint_dir``.

    Returns:
        An LLCResult: the estimate ``llc`` with its standard error ``llc_stderr``, the ``verdict``, and all traces. The
        standard error contains the sampling noise and the uncertainty of the corrections, but no other errors; those
        that can be detected are named by the verdict. Ctrl-C after the first draw ends the sampling: the result is then
        that of the draws so far, and ``interrupted`` is true. Before the first draw it raises KeyboardInterrupt.

    Raises:
        TypeError, ValueError: an argument cannot be used. The message has its name, its value, and what to do.
        FloatingPointError: the loss is not finite at w*.
        MemoryError: the run would not fit into memory. This is raised before the sampling starts.

    Source: Lau et al., arXiv:2308.12108, equation 14.
    """
    began = time.perf_counter()
    request = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, key=key, mesh=mesh, chain_batch=chain_batch,
        checkpoint_dir=checkpoint_dir, progress=progress, micro_batches=micro_batches, baseline=baseline,
        budget=budget, target_error=target_error, minutes=minutes, control_variate=control_variate, hot=hot,
        also=also, observe=observe, callback=callback, chunk_size=chunk_size, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    with request.screen(began) as screen:
        return estimate(request, screen)


def estimate(asked: Request, screen: Screen) -> LLCResult:
    """The estimate of a checked request, shown on ``screen``."""
    request = asked if asked.target_error is None else first_round(asked)
    growth = 1.0 if asked.target_error is None else most_gradients(asked) / (request.budget or 1)
    engine, memory = _fitted(request, growth)
    problem, mesh = engine.problem, engine.problem.mesh
    if memory is not None:
        screen.say(*memory.lines())
    named = request.folder is not None or spans_processes(mesh)
    observed = observe_identity(request, problem.watches) if named else {}
    identity = request.checked_identity(engine.plan, mesh, _asked(request), observed)
    check_loss(problem)
    check_other_data(problem, request.other_data)
    full_loss = full_loss_at_center(problem) if request.baseline == "full" else None
    store = None if request.folder is None else RunStore(request.folder, identity, mesh)
    observing = _observing(request, engine, identity, store)
    posterior, choice = request.posterior, None
    sampler, nbeta = request.sampler, float(posterior.nbeta)
    if request.is_open:
        screen.phase("calibrating step size, friction and localization", "calibration")
        choice, metric = _calibrated(request, engine, store, memory)
        posterior = posterior.with_numbers(nbeta=nbeta, localization=choice.localization)
        spent = choice.gradients + _end_gradients(request, _total(request, engine.plan))
        lengths = lengths_of(request, spent, choice.control_variate)
        engine = engine.replanned(request.schedule(lengths, engine.plan.chain_batch, choice.control_variate))
        numbers = choice.numbers(nbeta, metric)
        screen.say(*choice.lines)
    else:
        assert sampler.step_size is not None
        assert posterior.localization is not None
        numbers = Numbers(nbeta, posterior.localization, sampler.step_size, sampler.friction)
    names, inputs = tuple(request.other_data), engine.inputs(numbers)

    def partial(engine: Engine, run: Run) -> LLCResult:
        return partial_result(
            engine, run, posterior, numbers, full_loss=full_loss, choice=choice, other_names=names, observing=observing
        )  # fmt: skip

    def read(engine: Engine, run: Run) -> LLCResult:
        screen.phase("final checks", "final checks")
        return result_of(
            engine, run, posterior, numbers, screen.clock, full_loss=full_loss, choice=choice, memory=memory,
            other_names=names, notes=request.notes, observing=observing,
        )  # fmt: skip

    def sampled(engine: Engine, store: RunStore | None, **options: Any) -> Run:
        return run_to_end(
            engine, inputs, store, screen, every=request.checkpoint_seconds, nbeta=nbeta, partial=True,
            on_chunk=_on_chunk(request, engine, functools.partial(partial, engine)),
            outlets=observing.outlets if observing else (), **options,
        )  # fmt: skip

    run = sampled(engine, store)
    if asked.target_error is None:
        return read(engine, run)
    return Rounds(asked, screen, engine, store, digest_of_json(identity), sampled, read).go_on(run)


def _observing(request: Request, engine: Engine, identity: dict[str, Any], store: RunStore | None) -> Observing | None:
    try:
        return Observing.begun(request, engine, identity) if request.observables else None
    except BaseException:
        abandon(store)
        raise


def _on_chunk(request: Request, engine: Engine, partial: Callable[[Run], LLCResult]) -> Callable[[Run], None] | None:
    """What calls the caller's ``callback``: from the first draw on, about once a second, and after the last step."""
    callback, plan = request.callback, engine.plan
    if callback is None or not is_main_process(engine.problem.mesh):
        return None
    timer, called = Timer(_CALLBACK_SECONDS), []

    def on_chunk(run: Run) -> None:
        if draws_of(plan, run) and (timer.due() or not called or run.step == plan.total_steps):
            called.append(run.step)
            callback(run.step, partial(run))

    return on_chunk


def _asked(request: Request) -> dict[str, Any]:
    """The numbers that the caller gave, by which a run is known again."""
    names = ("num_chains", "num_draws", "num_warmup", "thinning", "budget", "control_variate", "hot", "target_error")
    return {name: getattr(request, name) for name in names}


def _fitted(request: Request, growth: float) -> tuple[Engine, MemoryEstimate | None]:
    """An engine for the estimate, before anything is calibrated, laid out so that it fits into memory.

    ``growth``: how many times as many draws the run may have in the end.
    """
    control = bool(request.control_variate) and not request.is_open
    ends = 0.0 if request.is_open else _end_gradients(request, request.budget or 0)
    lengths = lengths_of(request, ends, control)
    chains, num_free = lengths.num_chains, request.posterior.num_free
    observed = watched(request, lengths, growth)

    def engines() -> Iterator[Engine]:
        for mesh, chain_batch in layouts(chains, request.given_mesh(chains), request.chain_batch, num_free):
            plan = request.schedule(lengths, chain_batch, control)
            yield Engine(request.problem(mesh, observed=observed), request.sampler, plan, request.key)

    def estimate(engine: Engine) -> MemoryEstimate | None:
        if not needs_memory_check(request.posterior, chains, observing_bytes(engine)):
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
    note = None if store is None else store.read_note("calibration", Choice.REQUIRED)
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
