"""The LLC over many checkpoints of one model: one setting and one compiled program for all of them."""

import dataclasses
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slt_jax.batches import Source, as_source, check_key
from slt_jax.calibrate import calibrate
from slt_jax.checkpoint import RunStore, digest_of
from slt_jax.engine import Engine, Run, Schedule
from slt_jax.estimate import as_sampler, check_same_call, identity_of
from slt_jax.memory import layouts, need_of, weighs
from slt_jax.mesh import automatic, check_mesh, gathered, leads, spans_processes
from slt_jax.outcome import last_probe, looks_at_end, result_of
from slt_jax.plateau import SETTLED
from slt_jax.posterior import LocalPosterior, check_positive, path_of
from slt_jax.probe import Probe
from slt_jax.reading import estimate_text
from slt_jax.results import LLCResult, load_result
from slt_jax.running import abandon, check_at_center, check_first_loss, full_loss_at_center, restored, run_to_end
from slt_jax.samplers.base import Sampler
from slt_jax.setting import Notes, Subject, alone_layout, schedule_of
from slt_jax.training import WHOLE, Trajectory

_CALIBRATION, _SHARPNESS = 2**31 - 22, 2**31 - 23  # folded into the key
_ROUNDS = 8  # of a power iteration at each checkpoint

Part = Callable[[LocalPosterior], LocalPosterior]


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
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    micro_batches: int = 1,
    baseline: str = "paired",
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool = False,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> Trajectory:
    """Estimate the LLC at many checkpoints of one training run, and find the stages of training.

    Every checkpoint is sampled with the same nbeta, localization, step size, friction and lengths, and so they compare.
    What is not given is chosen by a calibration at the checkpoint whose loss is most sharply curved: a step that is
    short enough there is so for all. Whether the setting serves each of them, its verdict says.

    Args:
        posterior: loss, data size, nbeta, localization and mask for all; its own center is not sampled.
        centers: training step -> parameters, or a function without arguments that loads them. In any order.
        parts: further estimates at each checkpoint with only a part of the weights free (refined LLCs): names that a
            decoder understands (``"layer 0"``, ``"layer 1 head 2"``), or name -> function of the posterior.
        warm_start: chains begin as far from w* as those of the checkpoint before ended, with their momenta, where those
            had settled; else at w*. The warm-up is the same; it only has less to do.
        checkpoint_dir: where to keep results and states; the same call resumes, and ends bit for bit equal.
        sampler, num_chains, num_draws, num_warmup, thinning, batch_size, key, mesh, chain_batch, micro_batches,
            baseline, progress, chunk_size, checkpoint_seconds: as for ``sweep``. The key of a checkpoint is
            ``fold_in(key, step)``, that of its part number k (from 1) ``fold_in(fold_in(key, step), k)``; without a
            warm start the result then equals that of ``estimate_llc``.

    Returns:
        a Trajectory: ``dataset`` (xarray), ``results``, ``stages``, ``plot``, ``save``.

    Raises:
        TypeError, ValueError: an argument that cannot be used. FloatingPointError: the loss is not finite at some w*.
        MemoryError: the chains do not fit.
    """
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(f"posterior must be a LocalPosterior, got a {type(posterior).__name__}. Make one first.")
    source, sampler, key = as_source(data), as_sampler(sampler), check_key(key)
    if sampler.metric:
        raise ValueError("a metric belongs to one checkpoint. Take underdamped() without a metric.")
    steps, chosen = _steps(centers), _parts(parts)
    check_positive("checkpoint_seconds", checkpoint_seconds, "0 saves after every chunk.", zero=True)
    num_warmup = num_draws * thinning if num_warmup is None else num_warmup
    counts = (num_chains, num_draws, num_warmup, thinning, batch_size, micro_batches, baseline, chunk_size)
    plan = schedule_of(source, sampler, *counts)
    layout = alone_layout(num_chains, mesh)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    identity = identity_of(Subject(posterior, source, sampler, plan, layout), key, {"warm_start": warm_start}, {})
    identity = {"steps": steps, "parts": list(chosen), **identity}
    if spans_processes(layout):
        check_same_call({**identity, "checkpoint_dir is given": folder is not None}, layout)
    notes = Notes(None if folder is None else RunStore(folder, identity, layout))
    given = None if mesh is None else check_mesh(automatic(mesh), num_chains)
    work = _Work(posterior, centers, source, sampler, plan, key, layout, folder, digest_of(identity))
    try:
        work = _fitted(_settled(work, steps, notes), steps[0], given, chain_batch)
    finally:
        abandon(notes.store)
    found: dict[str, list[LLCResult]] = {name: [] for name in chosen}
    for number, (name, part) in enumerate(chosen.items()):
        before: _End | None = None
        for step in steps:
            result, end = _one(work, name, part, number, step, before, (progress, checkpoint_seconds))
            found[name].append(result)
            _tidy(work, name, step, before)
            before = end if warm_start and result.verdict in SETTLED else None  # a chain that got lost stays lost
            if progress and leads(layout):
                value = estimate_text(result.llc, result.llc_stderr, "±")
                print(f"  step {step}, {name}: LLC {value}, {result.verdict}", file=sys.stderr)
    return Trajectory(tuple(steps), {name: tuple(results) for name, results in found.items()})


@dataclass(frozen=True)
class _End:
    """Where the chains of a checkpoint ended."""

    step: int
    center: tuple
    run: Run | None  # None when it has to be read from its directory


@dataclass(frozen=True)
class _Work:
    posterior: LocalPosterior
    centers: Mapping[int, Any]
    source: Source
    sampler: Sampler
    plan: Schedule
    key: jax.Array
    layout: Mesh
    folder: Path | None
    identity: str

    def at(self, step: int) -> LocalPosterior:
        """The posterior around the checkpoint of this step."""
        center = self.centers[step]
        center = center() if callable(center) else center
        try:
            posterior = dataclasses.replace(self.posterior, center=center)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the checkpoint of step {step}: {error}") from error
        mine, wanted = _shapes(center), _shapes(self.posterior.center)
        for name in [*wanted, *mine]:
            if mine.get(name) != wanted.get(name):
                raise ValueError(
                    f"the checkpoint of step {step} is of another model than posterior.center: '{name}' has shape "
                    f"{mine.get(name)} there, {wanted.get(name)} here. Give checkpoints of one training run."
                )
        return posterior

    def engine(self, posterior: LocalPosterior, key: jax.Array) -> Engine:
        return Engine(posterior, self.source, self.sampler, self.plan, key, self.layout)

    def identity_at(self, name: str, step: int) -> dict[str, Any]:
        return {"trajectory": self.identity, "part": name, "step": step, "mesh": dict(self.layout.shape)}

    def place_of(self, name: str, step: int) -> Path:
        return (self.folder or Path()) / name.replace(" ", "-") / f"step-{step}"


def _steps(centers: Any) -> list[int]:
    if not isinstance(centers, Mapping) or not centers:
        raise TypeError(f"centers must map training steps to parameters, {{100: params}}, got {_brief(centers)}.")
    for step in centers:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**31:
            raise ValueError(f"centers has the step {step!r}; a training step is a whole number from 0 to 2^31.")
    return sorted(centers)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(path_of(path)): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _brief(value: Any) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _parts(parts: Any) -> dict[str, Part]:
    """name -> restriction, the whole first."""
    if isinstance(parts, str):
        raise TypeError(f"parts must be a list of names, got {parts!r}. Write parts=[{parts!r}].")
    if isinstance(parts, Mapping):
        named = dict(parts)
    else:
        from slt_jax.models.restrict import restricted

        named = {name: functools.partial(restricted, name=name) for name in parts}
    if WHOLE in named:
        raise ValueError(f"a part is called '{WHOLE}', which is the name of the whole. Give it another.")
    return {WHOLE: lambda posterior: posterior, **named}


def _settled(work: _Work, steps: list[int], notes: Notes) -> _Work:
    """With every number of the setting given or chosen."""
    posterior, sampler = work.posterior, work.sampler
    if None in (sampler.step_size, sampler.friction, posterior.localization):
        found = notes.kept("calibration", lambda: _calibrated(work, steps))
        sampler = sampler._replace(step_size=found["step_size"], friction=found["friction"])
        posterior = dataclasses.replace(posterior, localization=found["localization"])
    return dataclasses.replace(work, posterior=posterior, sampler=sampler)


def _fitted(work: _Work, step: int, mesh: Mesh | None, chain_batch: int | None) -> _Work:
    """With a layout that fits into memory, by the checkpoint of this step."""
    first, need = work.at(step), None
    for layout, group in layouts(work.plan.num_chains, mesh, chain_batch, first.num_free):
        plan = dataclasses.replace(work.plan, chain_batch=group)
        fitted = dataclasses.replace(work, layout=layout, plan=plan)
        if not weighs(first, plan.num_chains):
            return fitted
        engine = fitted.engine(first, work.key)
        looked = looks_at_end(work.sampler.family, plan)
        looks = last_probe(engine, plan.num_chains, work.key).temporaries(calibrates=False) if looked else []
        need = need_of(engine, looks, saves=work.folder is not None)
        if all(gathered(need.fits, layout)):
            return fitted
    raise MemoryError(need.refusal() if need else "")


def _calibrated(work: _Work, steps: list[int]) -> dict[str, Any]:
    """The calibration's choice at the checkpoint whose loss is most sharply curved."""
    sharp = {}
    for step in steps:
        engine = work.engine(work.at(step), jax.random.fold_in(work.key, _SHARPNESS))
        probe = Probe(engine, 2, jax.random.fold_in(engine.key, step))
        sharp[step] = gathered(probe.sharpness(probe.center, _ROUNDS), work.layout)[0]
    at = max(sharp, key=lambda step: sharp[step])
    engine = work.engine(work.at(at), jax.random.fold_in(work.key, _CALIBRATION))
    total = work.plan.num_chains * work.plan.total_steps
    check = functools.partial(check_at_center, engine)
    choice = calibrate(engine, work.sampler, work.posterior.localization, False, total, check)
    return {**gathered(choice.to_dict(), work.layout)[0], "at": at}


def _one(
    work: _Work, name: str, part: Part, number: int, step: int, before: _End | None, show: tuple
) -> tuple[LLCResult, _End | None]:
    """The result at one checkpoint, and where its chains ended."""
    posterior = part(work.at(step))
    key = jax.random.fold_in(work.key, step)
    engine = work.engine(posterior, jax.random.fold_in(key, number) if number else key)
    place = work.place_of(name, step)
    done = place.with_suffix(".zarr")
    if work.folder is not None and done.exists():
        return load_result(done), _End(step, engine.center, None)
    store = None
    if work.folder is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        store = RunStore(place, work.identity_at(name, step), engine.mesh)
    progress, seconds = show
    full = gathered(full_loss_at_center(engine), engine.mesh)[0] if work.plan.baseline == "full" else None
    start = None if before is None else _carried(work, name, engine, before)
    run = run_to_end(engine, store, progress, seconds, f"step {step}, {name}: ", start)
    sampler = work.sampler
    result = result_of(engine, run, posterior, sampler.step_size, sampler.friction, full_loss=full)  # pyright: ignore
    if store is not None and leads(engine.mesh):
        result.save(done)
    return result, _End(step, engine.center, run)


def _carried(work: _Work, name: str, engine: Engine, before: _End) -> Run | None:
    """A start as far from w* as the chains of the checkpoint before ended; None where one of them was lost."""
    run = before.run
    if run is None:
        store = RunStore(work.place_of(name, before.step), work.identity_at(name, before.step), engine.mesh)
        run = restored(engine, store)
        abandon(store)
    if run is None or not engine.all_alive(run):
        return None
    begun = engine.start()
    begun.state = run.state._replace(position=_shifted(run.state.position, engine.center, before.center))
    check_first_loss(engine)
    losses = (engine.first_loss(position=engine.position(begun, c)) for c in range(engine.plan.num_chains))
    return begun if all(map(math.isfinite, losses)) else None


@jax.jit
def _shifted(positions: tuple, center: tuple, old: tuple) -> tuple:
    return tuple(w + (new - was) for w, new, was in zip(positions, center, old, strict=True))


def _tidy(work: _Work, name: str, step: int, before: _End | None) -> None:
    """The state of a checkpoint is needed until the next one is done."""
    if work.folder is not None and before is not None and leads(work.layout):
        shutil.rmtree(work.place_of(name, before.step), ignore_errors=True)
