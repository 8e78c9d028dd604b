"""The LLC over many checkpoints of one model: one setting and one compiled program for all of them."""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import shown
from slt_jax.calibration.probe import Probe
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine, Inputs, Run
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
from slt_jax.engine.progress import span
from slt_jax.engine.run import abandon, begun, check_first_loss, full_loss_at_center, restored, run_to_end
from slt_jax.engine.screen import Screen
from slt_jax.engine.values import Outlets
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.course import Course, Ways
from slt_jax.estimators.ends import end_temporaries
from slt_jax.estimators.observing import observe_identity, watched
from slt_jax.estimators.outcome import result_of
from slt_jax.estimators.request import Notes, Request, check_no_metric, lengths_of_each
from slt_jax.estimators.shared import shared_calibration
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.program import leaf_masks
from slt_jax.posterior.tree import path_of
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.plateau import SETTLED
from slt_jax.results.text import estimate_text
from slt_jax.results.trajectory import WHOLE, Trajectory

_ROUNDS = 8  # of a power iteration at each checkpoint
_SHARPNESS_BLOCKS = 2

Part = Callable[[LocalPosterior], LocalPosterior]


@in_own_context
def trajectory(
    posterior: LocalPosterior,
    centers: Mapping[int, Any],
    data: Any,
    *,
    parts: Sequence[str] | Mapping[str, Part] = (),
    sampler: Any = None,
    num_chains: int = 4,
    num_draws: int = 200,
    num_warmup: int | None = None,
    thinning: int = 1,
    batch_size: int | None = None,
    key: Any = 0,
    warm_start: bool = True,
    observe: Mapping[str, Any] | None = None,
    common_noise: bool = False,
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    micro_batches: int = 1,
    baseline: str = "paired",
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> Trajectory:
    """Estimate the LLC at many checkpoints of one training run, and find the stages of training.

    Every checkpoint is sampled with the same nbeta, localization, step size, friction and lengths, and so they compare.
    What is not given is chosen by a calibration at the checkpoint whose loss is most sharply curved: a step that is
    short enough there is so for all. The verdict of each says whether the setting is right for it.

    Args:
        posterior: loss, data size, nbeta, localization and mask for all; its own center is not sampled.
        centers: training step -> parameters (also an ``nnx.State`` or an NNX model), or a function without arguments
            that loads them. In any order.
        parts: further estimates at each checkpoint with only a part of the weights free (refined LLCs): names that a
            decoder understands (``"layer 0"``, ``"layer 1 head 2"``), or name -> function of the posterior, or of a
            leaf's path as for ``mask``.
        warm_start: chains begin as far from w* as those of the checkpoint before ended, with their momenta, where those
            had settled; else at w*. The warm-up is the same; it only has less to do.
        observe: as for ``estimate_llc``, at each checkpoint, with all weights free. ``Trajectory.observed`` has the
            losses over training, and ``results["all"][k].observed`` everything of one checkpoint. The ``path`` of an
            ``Observable`` gets a folder for each step.
        common_noise: all checkpoints take the same random numbers, those of step 0, so that differences between them
            have less noise.
        checkpoint_dir: where to keep results and states; the same call resumes, and ends bit for bit equal.
        data: as for ``estimate_llc``.
        key: as for ``estimate_llc``. The key of a checkpoint is ``fold_in(key, step)``, that of its part number k
            (from 1) ``fold_in(fold_in(key, step), k)``; without a warm start the result then equals that of
            ``estimate_llc``.
        sampler, num_chains, num_draws, num_warmup, thinning, batch_size, mesh: as for ``sweep``.
        chain_batch, micro_batches, baseline, progress, chunk_size, checkpoint_seconds: as for ``sweep``.

    Returns:
        a Trajectory: ``dataset`` (xarray), ``results``, ``stages``, ``plot``, ``save``. Ctrl-C gives that of the
        checkpoints that are done, with ``interrupted`` set, if there is one; else it raises KeyboardInterrupt.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        FloatingPointError: the loss is not finite at some w*.
        MemoryError: the chains do not fit.
    """
    request = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, key=key, mesh=mesh, chain_batch=chain_batch,
        checkpoint_dir=checkpoint_dir, progress=progress, micro_batches=micro_batches, baseline=baseline,
        observe=observe, chunk_size=chunk_size, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    check_no_metric(request)
    for name, value in (("warm_start", warm_start), ("common_noise", common_noise)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    ways = Ways(warm_start, common_noise)
    with request.screen() as screen:
        return _trajectory(request, screen, centers, _steps(centers), _parts(parts), ways)


def _trajectory(
    request: Request, screen: Screen, centers: Mapping[int, Any], steps: list[int], parts: dict[str, Part],
    ways: Ways,
) -> Trajectory:  # fmt: skip
    plan = request.schedule(lengths_of_each(request))
    mesh = request.mesh_of_one(plan.num_chains)
    watches = tuple(watch for watch, _ in watched(request, lengths_of_each(request), len(steps)))
    more = {"steps": steps, "parts": list(parts), **observe_identity(request, watches)}
    asked = {name: value for name, value in ways._asdict().items() if name == "warm_start" or value}
    notes = Notes.opened(request, plan, mesh, more, asked)
    course = Course(request, screen, centers, plan, mesh, notes.identity, ways)
    screen.phase("calibrating what is not given, at the checkpoint whose loss is most sharply curved", "calibration")
    try:
        course = _fitted(_filled(course, steps, notes), steps[0])
    finally:
        abandon(notes.store)
    done: dict[str, list[LLCResult]] = {name: [] for name in parts}
    try:
        for name, result in _estimates(course, steps, parts):
            done[name].append(result)
            _tell(course, steps, name, done)
    except KeyboardInterrupt:
        complete = min(map(len, done.values()))
        if not complete or spans_processes(mesh):
            raise
        cut = {name: tuple(row[:complete]) for name, row in done.items()}
        return Trajectory(tuple(steps[:complete]), cut, interrupted=len(steps))
    return Trajectory(tuple(steps), {name: tuple(row) for name, row in done.items()})


def _estimates(course: Course, steps: list[int], parts: dict[str, Part]) -> Iterator[tuple[str, LLCResult]]:
    """(part, result) of each step in turn."""
    ends: dict[str, _End] = {}
    for step in steps:
        whole = course.posterior_at(step)
        for number, (name, part) in enumerate(parts.items()):
            last = ends.get(name) if course.ways.warm_start else None
            course.screen.clock.restart()
            result, end = _at_checkpoint(course, name, part(whole), number, step, last)
            _remove_state(course, name, ends.get(name))
            ends[name] = end
            yield name, result


def _tell(course: Course, steps: list[int], name: str, done: dict[str, list[LLCResult]]) -> None:
    """The last result, of this part; and after the first step how long all will take."""
    step, result = steps[len(done[name]) - 1], done[name][-1]
    where = f"step {step}" if len(done) == 1 else f"step {step}, {name}"
    course.screen.say(f"{where}: LLC {estimate_text(result.llc, result.llc_stderr, '±')}, {result.verdict}")
    if len(steps) > 1 and all(len(row) == 1 for row in done.values()):
        seconds = (len(steps) - 1) * sum(row[0].settings.cost.get("seconds", 0.0) for row in done.values())
        course.screen.say(f"{len(steps) - 1} more checkpoints, about {span(seconds)} to go")


@dataclass(frozen=True)
class _End:
    """Where the chains of a checkpoint ended."""

    step: int
    center: tuple
    settled: bool
    run: Run | None  # None when it has to be read from its directory


def _steps(centers: Any) -> list[int]:
    if not isinstance(centers, Mapping) or not centers:
        raise TypeError(f"centers must map training steps to parameters, {{100: params}}, got {_brief(centers)}.")
    for step in centers:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**31:
            raise ValueError(f"centers has the step {step!r}; a training step is a whole number from 0 to 2^31.")
    return sorted(centers)


def _brief(value: Any) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _parts(parts: Any) -> dict[str, Part]:
    """name -> restriction, the whole first."""
    if isinstance(parts, str):
        raise TypeError(f"parts must be a list of names, got {shown(parts)}. Write parts=[{shown(parts)}].")
    if isinstance(parts, Mapping):
        named = {name: functools.partial(_part_of, name, rule) for name, rule in parts.items()}
    else:
        from slt_jax.models.restrict import restricted

        named = {name: functools.partial(restricted, name=name) for name in parts}
    if WHOLE in named:
        raise ValueError(f"a part is called '{WHOLE}', which is the name of the whole. Give it another.")
    return {WHOLE: lambda posterior: posterior, **named}


def _part_of(name: str, rule: Callable[[Any], Any], posterior: LocalPosterior) -> LocalPosterior:
    """What the caller's ``rule`` makes of the posterior; or, if it is a rule for paths like a mask, its restriction."""
    if not callable(rule):
        raise TypeError(
            f"parts[{name!r}] must be a function of a path, like a mask, or of the posterior, got {shown(rule)}. For a "
            "tree of booleans give lambda posterior: dataclasses.replace(posterior, mask=tree)."
        )
    flat, treedef = jax.tree_util.tree_flatten_with_path(posterior.center)
    try:
        said = rule(path_of(flat[0][0]))
    except Exception:  # a function of the posterior
        said = None
    if said is None or np.asarray(said).dtype != np.bool_:
        return rule(posterior)
    own = leaf_masks(posterior.mask, flat, treedef)
    masks = [np.logical_and(mask, rule(path_of(path))) for (path, _), mask in zip(flat, own, strict=True)]
    return dataclasses.replace(posterior, mask=jax.tree.unflatten(treedef, masks))


def _filled(course: Course, steps: list[int], notes: Notes) -> Course:
    """With every number of the setting given or chosen."""
    posterior, sampler = course.request.posterior, course.request.sampler
    if not course.request.is_open:
        return course
    note = notes.kept(
        "calibration", ["step_size", "friction", "localization"], lambda: _calibrated_at_the_sharpest(course, steps)
    )
    sampler = sampler._replace(step_size=note["step_size"], friction=note["friction"])
    posterior = posterior.with_numbers(nbeta=float(posterior.nbeta), localization=note["localization"])
    return dataclasses.replace(
        course, request=dataclasses.replace(course.request, posterior=posterior, sampler=sampler)
    )


def _fitted(course: Course, step: int) -> Course:
    """With a layout that fits into memory, by the checkpoint of this step."""
    first, num_chains, request = course.posterior_at(step), course.plan.num_chains, course.request

    def engines() -> Iterator[Engine]:
        for mesh, group in layouts(num_chains, request.given_mesh(num_chains), request.chain_batch, first.num_free):
            plan = dataclasses.replace(course.plan, chain_batch=group)
            yield dataclasses.replace(course, plan=plan, mesh=mesh).engine(first, request.key, observes=True)

    def estimate(engine: Engine) -> MemoryEstimate | None:
        if not needs_memory_check(first, num_chains, observing_bytes(engine)):
            return None
        return estimate_memory(engine, end_temporaries(engine, num_chains), saves=request.folder is not None)

    engine, _ = first_that_fits(engines(), estimate)
    check_loss(engine.problem)
    return dataclasses.replace(course, plan=engine.plan, mesh=engine.problem.mesh)


def _calibrated_at_the_sharpest(course: Course, steps: list[int]) -> dict[str, Any]:
    """The calibration's choice at the checkpoint whose loss is most sharply curved."""
    key, nbeta = course.request.key, float(course.request.posterior.nbeta)
    sharpness = {}
    for step in steps:
        engine = course.engine(course.posterior_at(step), jax.random.fold_in(key, KeyTag.SHARPNESS))
        probe = Probe(engine.problem, nbeta, _SHARPNESS_BLOCKS, jax.random.fold_in(engine.key, step))
        sharpness[step] = allgather(probe.sharpness(probe.center, _ROUNDS), course.mesh)[0]
    sharpest = max(sharpness, key=lambda step: sharpness[step])
    posterior = course.posterior_at(sharpest)
    engine = course.engine(posterior, jax.random.fold_in(key, KeyTag.SHARED_CALIBRATION))
    return {**shared_calibration(engine, posterior), "at": sharpest}


def _at_checkpoint(
    course: Course, name: str, posterior: LocalPosterior, number: int, step: int, last: _End | None
) -> tuple[LLCResult, _End]:
    """The result at one checkpoint, and where its chains ended. ``number``: of the part, 0 for the whole."""
    request, key = course.request, jax.random.fold_in(course.request.key, 0 if course.ways.common_noise else step)
    observes = bool(request.observables) and number == 0
    engine = course.engine(posterior, jax.random.fold_in(key, number) if number else key, observes=observes)
    folder = course.folder_of(name, step)
    saved, run, store = folder.with_suffix(".zarr"), None, None
    if request.folder is not None and saved.exists():
        result = load_result(saved)
    else:
        if request.folder is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            store = course.store_at(name, step)
        full_loss = full_loss_at_center(engine.problem) if request.baseline == "full" else None
        inputs, observing = engine.inputs(course.numbers), course.observing(engine, step) if observes else None
        outlets = observing.outlets if observing else ()
        start = _carried(course, name, engine, inputs, last, outlets) if last is not None and last.settled else None
        part = f"step {step}, {name}: "
        run = run_to_end(
            engine, inputs, store, course.screen, every=request.checkpoint_seconds, part=part, start=start,
            outlets=outlets,
        )  # fmt: skip
        course.screen.phase(f"{part}final checks", "final checks")
        clock = course.screen.clock
        result = result_of(
            engine, run, posterior, course.numbers, clock, full_loss=full_loss, notes=request.notes, observing=observing
        )
        if store is not None and is_main_process(course.mesh):
            result.save(saved)
    return result, _End(step, engine.problem.center, result.verdict in SETTLED, run)


def _carried(
    course: Course, name: str, engine: Engine, inputs: Inputs, last: _End, outlets: Outlets
) -> Run | None:  # fmt: skip
    """A start as far from w* as the chains of the checkpoint before ended.

    None where one of them was lost, or would begin at a loss that is not finite.
    """
    run = last.run
    if run is None:
        store = course.store_at(name, last.step)
        run = restored(engine, inputs, store, course.observing(engine, last.step).outlets if outlets else ())
        abandon(store)
    if run is None or not engine.all_alive(run):
        return None
    new, problem = begun(engine, inputs, outlets), engine.problem
    new.state = run.state._replace(position=_shifted(run.state.position, problem.center, last.center))
    check_first_loss(problem)
    losses = (problem.first_loss(position=engine.position(new, c)) for c in range(engine.plan.num_chains))
    return new if all(map(math.isfinite, losses)) else None


@jax.jit
def _shifted(positions: tuple, center: tuple, old: tuple) -> tuple:
    return tuple(w + (new - was) for w, new, was in zip(positions, center, old, strict=True))


def _remove_state(course: Course, name: str, last: _End | None) -> None:
    """The state of a checkpoint is needed until the next one is done."""
    if course.request.folder is not None and last is not None and is_main_process(course.mesh):
        shutil.rmtree(course.folder_of(name, last.step), ignore_errors=True)
