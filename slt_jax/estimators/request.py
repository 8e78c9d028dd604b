"""What every front door checks and fixes before anything is sampled, and what makes a run the same run when resumed."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_count
from slt_jax.calibration.choose import calibrate
from slt_jax.engine.checkpoint import RunStore, digest_of, first_difference, versions
from slt_jax.engine.loop import Engine
from slt_jax.engine.mesh import automatic, chain_mesh, gathered, spans_processes
from slt_jax.engine.plan import Schedule
from slt_jax.engine.run import check_at_center
from slt_jax.posterior.data import ArrayData, Source, as_source, check_batch_size
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.tree import addressable
from slt_jax.samplers.base import Sampler
from slt_jax.samplers.exact import from_blackjax
from slt_jax.samplers.underdamped import underdamped


class Subject(NamedTuple):
    """What is to be sampled, and how; an Engine in the eyes of ``identity_of``."""

    posterior: LocalPosterior
    source: Source
    sampler: Sampler
    plan: Schedule
    mesh: Mesh


@dataclass(frozen=True)
class Notes:
    """What a first start decided and a resumed one reads, where there is a directory."""

    store: RunStore | None
    identity: str  # digest of everything that the numbers depend on

    def kept(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = None if self.store is None else self.store.read_note(name)
        if found is None:
            found = decide()
            if self.store is not None:
                self.store.write_note(name, found)
        return found


def subject_of(
    posterior: LocalPosterior, data: Any, sampler: Any, mesh: Mesh | None, num_chains: int, num_draws: int,
    num_warmup: int | None, thinning: int, batch_size: int | None, micro_batches: int, baseline: str, chunk_size: int,
) -> Subject:  # fmt: skip
    """What many estimates have in common; see ``sweep`` for the arguments. Raises TypeError, ValueError."""
    check_posterior(posterior)
    source, sampler = as_source(data), as_sampler(sampler)
    if sampler.metric:
        raise ValueError("a metric belongs to one setting at one checkpoint. Take underdamped() without a metric.")
    for name, value in {"num_chains": num_chains, "num_draws": num_draws, "thinning": thinning}.items():
        check_count(name, value, 1)
    num_warmup = num_draws * thinning if num_warmup is None else num_warmup
    check_count("num_warmup", num_warmup, 0)
    batch_size = checked_batch(source, sampler, batch_size, micro_batches, baseline, chunk_size)
    numbers = (num_chains, num_draws, num_warmup, thinning, batch_size, micro_batches)
    plan = Schedule(*(int(x) for x in numbers), baseline, 1, int(chunk_size))
    return Subject(posterior, source, sampler, plan, alone_layout(num_chains, mesh))


def opened(
    subject: Subject, key: jax.Array, more: dict[str, Any], request: dict[str, Any], folder: Path | None
) -> Notes:
    """The notes of a run of many estimates in its directory. ``more``: what it depends on beside ``subject``.

    Raises ValueError where the directory, or another process, has something else, and OSError.
    """
    identity = {**more, **identity_of(subject, key, request, {})}
    if spans_processes(subject.mesh):
        check_same_call({**identity, "checkpoint_dir is given": folder is not None}, subject.mesh)
    return Notes(None if folder is None else RunStore(folder, identity, subject.mesh), digest_of(identity))


def calibrated(engine: Engine, sampler: Sampler, localization: float | None) -> dict[str, Any]:
    """What is open in ``sampler`` and of the localization, measured at w*; without control variates."""
    total = engine.plan.num_chains * engine.plan.total_steps
    check = functools.partial(check_at_center, engine)
    choice = calibrate(engine, sampler, localization, False, total, check, alone=False)
    return gathered(choice.to_dict(), engine.mesh)[0]


def alone_layout(num_chains: int, mesh: Mesh | None) -> Mesh:
    """Where the chains of one estimate run alone: on the given devices if they divide them."""
    given = None if mesh is None else automatic(mesh)
    if given is None or num_chains % given.shape.get("chain", 1):
        return chain_mesh(num_chains)
    return given


def checked_batch(
    source: Source, sampler: Sampler, batch_size: int | None, micro_batches: int, baseline: str, chunk_size: int
) -> int:
    """The batch size, by default min(256, num_data) or all; see ``estimate_llc``. Raises TypeError, ValueError."""
    for name, value in {"chunk_size": chunk_size, "micro_batches": micro_batches}.items():
        check_count(name, value, 1)
    whole = sampler.family == "exact"
    if batch_size is None:
        batch_size = source.num_data if whole else min(256, source.num_data)
    check_batch_size(batch_size, source.num_data)
    if whole and (source.on_host or batch_size != source.num_data):
        raise ValueError(
            f"{sampler.name} takes every gradient over the whole data set: give the data as arrays in memory, and "
            "leave batch_size out."
        )
    if batch_size % micro_batches:
        raise ValueError(f"micro_batches = {micro_batches} does not divide batch_size = {batch_size}. Take a divisor.")
    if not isinstance(baseline, str) or baseline not in ("paired", "full"):
        raise ValueError(f"baseline must be 'paired' or 'full', got {baseline!r}. 'paired' has less variance.")
    return batch_size


def check_posterior(posterior: Any) -> None:
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(
            f"posterior must be a LocalPosterior, got a {type(posterior).__name__}. "
            "Pass slt_jax.LocalPosterior(loss_fn, center, num_data) first, then the data."
        )


def as_sampler(sampler: Any) -> Sampler:
    """A Sampler: as given, the default, or one around a ``blackjax.SamplingAlgorithm``. Raises TypeError."""
    if sampler is None:
        return underdamped()
    if isinstance(sampler, Sampler):
        return sampler
    if callable(getattr(sampler, "init", None)) and callable(getattr(sampler, "step", None)):
        return from_blackjax(sampler)
    raise TypeError(f"sampler must be a Sampler, got {sampler!r}. Call its constructor: slt_jax.sgld(step_size).")


def check_same_call(mine: dict[str, Any], mesh: Mesh) -> None:
    """Raise ValueError, on all processes, when one of them asks for something else than process 0."""
    first, *others = gathered(mine, mesh)
    for number, other in enumerate(others, start=1):
        if (differs := first_difference(other, first)) is not None:
            name, there, here = differs
            raise ValueError(
                f"process {number} samples with another {name} than process 0: {there!r} there, {here!r} here. Let "
                "every process make the same call on the same data, or give each a mesh of jax.local_devices()."
            )


def identity_of(
    engine: Engine, key: jax.Array, request: dict[str, Any], others: dict[str, ArrayData]
) -> dict[str, Any]:
    """Everything that a run's numbers depend on, for its directory."""
    plan, mesh = engine.plan, engine.mesh
    posterior = engine.posterior
    if spans_processes(mesh):
        posterior = dataclasses.replace(posterior, center=addressable(posterior.center))
    batch = engine.source.fetch(np.zeros(plan.batch_size, np.int64))
    # In this order a refusal names what was changed: the traced loss_fn, last, changes with most of the others.
    return {
        "versions": versions(),
        "sampler": {name: getattr(engine.sampler, name) for name in ("name", "step_size", "friction")},
        "schedule": {k: v for k, v in vars(plan).items() if k != "chunk_size"},
        "request": {k: None if v is None else np.asarray(v, float).tolist() for k, v in request.items()},
        "key": jax.random.key_data(key).tolist(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "device": mesh.devices.flat[0].device_kind,
        "data": {"examples": engine.source.num_data, "fingerprint": engine.source.fingerprint()},
        "also": {name: one.fingerprint() for name, one in others.items()},
        "posterior": posterior.fingerprint(batch),
    }
