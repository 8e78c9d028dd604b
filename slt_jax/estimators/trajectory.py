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

from slt_jax._checks import check_key, check_positive
from slt_jax.calibration.probe import Probe
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.memory import layouts, need_of, weighs
from slt_jax.engine.mesh import automatic, check_mesh, gathered, leads
from slt_jax.engine.run import abandon, check_first_loss, full_loss_at_center, restored, run_to_end
from slt_jax.estimators.outcome import look_bytes, result_of
from slt_jax.estimators.request import Notes, Subject, calibrated, opened, subject_of
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.tree import path_of
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.plateau import SETTLED
from slt_jax.results.text import estimate_text
from slt_jax.results.trajectory import WHOLE, Trajectory

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
    lengths = (num_chains, num_draws, num_warmup, thinning, batch_size, micro_batches, baseline, chunk_size)
    subject, key = subject_of(posterior, data, sampler, mesh, *lengths), check_key(key)
    steps, chosen = _steps(centers), _parts(parts)
    check_positive("checkpoint_seconds", checkpoint_seconds, "0 saves after every chunk.", zero=True)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    more = {"steps": steps, "parts": list(chosen)}
    notes = opened(subject, key, more, {"warm_start": warm_start}, folder)
    given = None if mesh is None else check_mesh(automatic(mesh), num_chains)
    work = _Work(subject, centers, key, folder, notes.identity)
    try:
        work = _fitted(_filled(work, steps, notes), steps[0], given, chain_batch)
    finally:
        abandon(notes.store)
    found: dict[str, list[LLCResult]] = {name: [] for name in chosen}
    ends: dict[str, _End] = {}
    for step in steps:
        whole = work.at(step)
        for number, (name, part) in enumerate(chosen.items()):
            last = ends.get(name) if warm_start else None
            result, end = _one(work, name, part(whole), number, step, last, (progress, checkpoint_seconds))
            found[name].append(result)
            _tidy(work, name, ends.get(name))
            ends[name] = end
            if progress and leads(work.subject.mesh):
                value = estimate_text(result.llc, result.llc_stderr, "±")
                print(f"  step {step}, {name}: LLC {value}, {result.verdict}", file=sys.stderr)
    return Trajectory(tuple(steps), {name: tuple(results) for name, results in found.items()})


@dataclass(frozen=True)
class _End:
    """Where the chains of a checkpoint ended."""

    step: int
    center: tuple
    settled: bool
    run: Run | None  # None when it has to be read from its directory


@dataclass(frozen=True)
class _Work:
    subject: Subject
    centers: Mapping[int, Any]
    key: jax.Array
    folder: Path | None
    identity: str

    def at(self, step: int) -> LocalPosterior:
        """The posterior around the checkpoint of this step."""
        center = self.centers[step]
        center = center() if callable(center) else center
        try:
            posterior = dataclasses.replace(self.subject.posterior, center=center)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the checkpoint of step {step}: {error}") from error
        mine, wanted = _shapes(center), _shapes(self.subject.posterior.center)
        for name in [*wanted, *mine]:
            if mine.get(name) != wanted.get(name):
                raise ValueError(
                    f"the checkpoint of step {step} is of another model than posterior.center: '{name}' has shape "
                    f"{mine.get(name)} there, {wanted.get(name)} here. Give checkpoints of one training run."
                )
        return posterior

    def engine(self, posterior: LocalPosterior, key: jax.Array) -> Engine:
        _, source, sampler, plan, mesh = self.subject
        return Engine(posterior, source, sampler, plan, key, mesh)

    def identity_at(self, name: str, step: int) -> dict[str, Any]:
        return {"trajectory": self.identity, "part": name, "step": step, "mesh": dict(self.subject.mesh.shape)}

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


def _filled(work: _Work, steps: list[int], notes: Notes) -> _Work:
    """With every number of the setting given or chosen."""
    posterior, sampler = work.subject.posterior, work.subject.sampler
    if None in (sampler.step_size, sampler.friction, posterior.localization):
        found = notes.kept("calibration", lambda: _at_the_sharpest(work, steps))
        sampler = sampler._replace(step_size=found["step_size"], friction=found["friction"])
        posterior = posterior.with_numbers(nbeta=posterior.nbeta, localization=found["localization"])
    return dataclasses.replace(work, subject=work.subject._replace(posterior=posterior, sampler=sampler))


def _fitted(work: _Work, step: int, mesh: Mesh | None, chain_batch: int | None) -> _Work:
    """With a layout that fits into memory, by the checkpoint of this step."""
    first, num_chains, need = work.at(step), work.subject.plan.num_chains, None
    for layout, group in layouts(num_chains, mesh, chain_batch, first.num_free):
        plan = dataclasses.replace(work.subject.plan, chain_batch=group)
        fitted = dataclasses.replace(work, subject=work.subject._replace(plan=plan, mesh=layout))
        if not weighs(first, num_chains):
            return fitted
        engine = fitted.engine(first, work.key)
        need = need_of(engine, look_bytes(engine, num_chains), saves=work.folder is not None)
        if all(gathered(need.fits, layout)):
            return fitted
    raise MemoryError(need.refusal() if need else "")


def _at_the_sharpest(work: _Work, steps: list[int]) -> dict[str, Any]:
    """The calibration's choice at the checkpoint whose loss is most sharply curved."""
    sharp = {}
    for step in steps:
        engine = work.engine(work.at(step), jax.random.fold_in(work.key, _SHARPNESS))
        probe = Probe(engine, 2, jax.random.fold_in(engine.key, step))
        sharp[step] = gathered(probe.sharpness(probe.center, _ROUNDS), engine.mesh)[0]
    at = max(sharp, key=lambda step: sharp[step])
    engine = work.engine(work.at(at), jax.random.fold_in(work.key, _CALIBRATION))
    return {**calibrated(engine, work.subject.sampler, work.subject.posterior.localization), "at": at}


def _one(
    work: _Work, name: str, posterior: LocalPosterior, number: int, step: int, last: _End | None, show: tuple
) -> tuple[LLCResult, _End]:
    """The result at one checkpoint, and where its chains ended."""
    key = jax.random.fold_in(work.key, step)
    engine = work.engine(posterior, jax.random.fold_in(key, number) if number else key)
    place = work.place_of(name, step)
    done, run, store = place.with_suffix(".zarr"), None, None
    if work.folder is not None and done.exists():
        result = load_result(done)
    else:
        if work.folder is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            store = RunStore(place, work.identity_at(name, step), engine.mesh)
        progress, seconds = show
        full = gathered(full_loss_at_center(engine), engine.mesh)[0] if engine.plan.baseline == "full" else None
        start = _carried(work, name, engine, last) if last is not None and last.settled else None
        run = run_to_end(engine, store, progress, seconds, f"step {step}, {name}: ", start)
        step_size, friction = engine.sampler.step_size, engine.sampler.friction
        assert step_size is not None
        result = result_of(engine, run, posterior, step_size, friction, full_loss=full)
        if store is not None and leads(engine.mesh):
            result.save(done)
    return result, _End(step, engine.center, result.verdict in SETTLED, run)


def _carried(work: _Work, name: str, engine: Engine, last: _End) -> Run | None:
    """A start as far from w* as the chains of the checkpoint before ended.

    None where one of them was lost, or would begin at a loss that is not finite.
    """
    run = last.run
    if run is None:
        store = RunStore(work.place_of(name, last.step), work.identity_at(name, last.step), engine.mesh)
        run = restored(engine, store)
        abandon(store)
    if run is None or not engine.all_alive(run):
        return None
    begun = engine.start()
    begun.state = run.state._replace(position=_shifted(run.state.position, engine.center, last.center))
    check_first_loss(engine)
    losses = (engine.first_loss(position=engine.position(begun, c)) for c in range(engine.plan.num_chains))
    return begun if all(map(math.isfinite, losses)) else None


@jax.jit
def _shifted(positions: tuple, center: tuple, old: tuple) -> tuple:
    return tuple(w + (new - was) for w, new, was in zip(positions, center, old, strict=True))


def _tidy(work: _Work, name: str, last: _End | None) -> None:
    """The state of a checkpoint is needed until the next one is done."""
    if work.folder is not None and last is not None and leads(work.subject.mesh):
        shutil.rmtree(work.place_of(name, last.step), ignore_errors=True)
