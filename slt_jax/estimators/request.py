"""The one front door: what a caller asked for, checked before anything is sampled, and what identifies it on disk."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_count, check_key, check_positive, shown
from slt_jax._io import digest_of_json, user_path
from slt_jax.calibration.effort import default_budget
from slt_jax.engine.checkpoint import RunStore, check_directory, first_difference
from slt_jax.engine.mesh import allgather, chain_mesh, check_mesh, spans_processes
from slt_jax.engine.observe import Watch
from slt_jax.engine.plan import Lengths, Schedule
from slt_jax.engine.problem import Problem
from slt_jax.engine.screen import Screen, shows_progress
from slt_jax.estimators.arguments import (
    check_control,
    check_dynamics,
    check_observables,
    check_posterior,
    check_target,
    checked_batch,
)
from slt_jax.estimators.rows import check_rows
from slt_jax.machine import free_of_process, size_text, versions
from slt_jax.posterior.data import ArrayData, Source, as_source, check_same_structure, named_data
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.observable import Observable, checked_observables
from slt_jax.posterior.split import automatic
from slt_jax.posterior.tree import addressable
from slt_jax.results.llc import LLCResult
from slt_jax.samplers.base import Sampler
from slt_jax.samplers.exact import from_blackjax
from slt_jax.samplers.underdamped import underdamped

_LEAST = {"num_chains": 1, "num_draws": 1, "num_warmup": 0, "thinning": 1, "budget": 1}
_STEP_BYTES, _LARGE_RECORD = 44, 2**28  # of a chain's traces; bytes from which their room is looked at


@dataclass(frozen=True)
class Request:
    """What a caller asked for, checked; a length, ``control_variate``, ``hot`` or a mesh of None is open.

    The arguments are those of ``estimate_llc``. ``other_data``: its ``also``, in memory; ``observables``: its
    ``observe``, each with its examples in memory. ``price``: of a gradient, see ``default_batch``. ``notes``: for the
    result.
    """

    posterior: LocalPosterior
    source: Source
    sampler: Sampler
    key: jax.Array
    batch_size: int
    price: float = 1.0
    micro_batches: int = 1
    baseline: str = "paired"
    chunk_size: int = 512
    num_chains: int | None = None
    num_draws: int | None = None
    num_warmup: int | None = None
    thinning: int | None = None
    budget: int | None = None
    target_error: float | None = None
    minutes: float | None = None
    control_variate: bool | None = None
    hot: float | None = None
    mesh: Mesh | None = None
    chain_batch: int | None = None
    checkpoint_dir: str | os.PathLike | None = None
    checkpoint_seconds: float = 60.0
    progress: bool | None = None
    callback: Callable[[int, LLCResult], Any] | None = None
    other_data: dict[str, ArrayData] = dataclasses.field(default_factory=dict)
    observables: dict[str, tuple[Observable, ArrayData]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls, posterior: Any, data: Any, *, sampler: Any = None, key: Any = 0, batch_size: int | None = None,
        micro_batches: int = 1, baseline: str = "paired", chunk_size: int = 512, num_chains: int | None = None,
        num_draws: int | None = None, num_warmup: int | None = None, thinning: int | None = None,
        budget: int | None = None, target_error: float | None = None, minutes: float | None = None,
        control_variate: bool | None = None, hot: float | None = None,
        mesh: Mesh | None = None, chain_batch: int | None = None,
        checkpoint_dir: str | os.PathLike | None = None, checkpoint_seconds: float = 60.0,
        progress: bool | None = None, callback: Any = None, also: Mapping[str, Any] | None = None,
        observe: Mapping[str, Any] | None = None, described: bool = False,
    ) -> "Request":  # fmt: skip
        """Of the arguments as they were given; ``described``: the weights may be shapes alone.

        Raises TypeError and ValueError that name the argument.
        """
        check_posterior(posterior, described=described)
        source, sampler = as_source(data), as_sampler(sampler)
        notes = check_rows(posterior, data, source)
        lengths = {
            "num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup, "thinning": thinning,
            "budget": budget,
        }  # fmt: skip
        for name, value in lengths.items():
            if value is not None:
                check_count(name, value, _LEAST[name])
        check_dynamics(control_variate, hot)
        if budget is not None and num_draws is not None:
            raise ValueError(f"budget = {budget} and num_draws = {num_draws} both set the length. Give one of them.")
        check_target(target_error, minutes, num_draws)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function callback(step, partial_result), got {shown(callback)}.")
        if checkpoint_dir is not None:
            check_directory(checkpoint_dir)
        check_positive("checkpoint_seconds", checkpoint_seconds, "0 saves after every chunk.", zero=True)
        num_weights = sum(np.size(w) for w in jax.tree.leaves(posterior.center))
        batch_size, price = checked_batch(
            source, sampler, num_weights, batch_size, micro_batches, baseline, chunk_size
        )  # fmt: skip
        other_data = named_data(also)
        for name, other in other_data.items():
            check_same_structure(f"also['{name}']", other, source)
        if posterior.nbeta == 0:
            check_control(sampler, target_error)
        observables = checked_observables(observe, source)
        check_observables(observables, other_data, target_error)
        return cls(
            posterior=posterior,
            source=source,
            sampler=sampler,
            batch_size=batch_size,
            price=price,
            key=check_key(key),
            micro_batches=int(micro_batches),
            baseline=baseline,
            chunk_size=int(chunk_size),
            **lengths,
            target_error=target_error,
            minutes=minutes,
            control_variate=control_variate,
            hot=hot,
            mesh=mesh,
            chain_batch=chain_batch,
            checkpoint_dir=checkpoint_dir,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
            callback=callback,
            other_data=other_data,
            observables=observables,
            notes=notes,
        )

    @property
    def is_open(self) -> bool:
        """Whether a calibration has to choose something."""
        sampler = self.sampler
        return sampler.step_size is None or sampler.friction is None or self.posterior.localization is None

    @property
    def may_have_few_chains(self) -> bool:
        """Whether the caller left open how chains are laid out, so that a small budget may have fewer of them."""
        return self.mesh is None and self.chain_batch is None and jax.process_count() == 1

    @property
    def default_budget(self) -> int:
        """Gradients of an estimate without a budget."""
        return default_budget(self.posterior.num_free, self.price)

    @property
    def passes(self) -> int:
        """Minibatches of a pass over the data."""
        return -(-self.source.num_data // self.batch_size)

    @property
    def observing(self) -> float:
        """Minibatch gradients that observing takes at a draw of one chain: a forward pass is a third of one."""
        return sum(data.num_data for _, data in self.observables.values()) / self.batch_size / 3

    @property
    def folder(self) -> Path | None:
        return None if self.checkpoint_dir is None else user_path(self.checkpoint_dir)

    def screen(self, began: float | None = None) -> Screen:
        """Where this process shows what the call, which ``began`` then, is doing."""
        own = jax.process_count() == 1 or (self.mesh is not None and not spans_processes(self.mesh))
        return Screen(enabled=shows_progress(self.progress) and (own or jax.process_index() == 0), began=began)

    def given_mesh(self, num_chains: int) -> Mesh | None:
        """The caller's devices with automatic axes; raises where these chains cannot be laid out on them."""
        return None if self.mesh is None else check_mesh(automatic(self.mesh), num_chains)

    def mesh_of_one(self, num_chains: int) -> Mesh:
        """Where the chains of one of many estimates run: on the given devices if they divide the chains."""
        given = None if self.mesh is None else automatic(self.mesh)
        if given is None or num_chains % given.shape.get("chain", 1):
            return chain_mesh(num_chains)
        return given

    def schedule(self, lengths: Lengths, chain_batch: int = 1, control_variate: bool = False) -> Schedule:
        """Raises ValueError, or MemoryError, for more steps than can be numbered, or recorded."""
        plan = Schedule(
            **lengths._asdict(), batch_size=int(self.batch_size), micro_batches=self.micro_batches,
            baseline=self.baseline, chain_batch=chain_batch, chunk_size=self.chunk_size,
            control_variate=control_variate,
        )  # fmt: skip
        steps, chains = plan.total_steps, plan.num_chains
        if steps >= 2**31:
            raise ValueError(
                f"num_draws = {lengths.num_draws}, thinning = {lengths.thinning} and num_warmup = {lengths.num_warmup} "
                f"are {steps:,} steps of a chain; at most {2**31 - 1:,} can be taken."
            )
        if (size := _STEP_BYTES * steps * chains) > _LARGE_RECORD and size > free_of_process():
            raise MemoryError(
                f"the record of {steps:,} steps of num_chains = {chains:,} chains takes {size_text(size)}, and "
                f"{size_text(free_of_process())} are free. Take fewer chains or draws."
            )
        return plan

    def problem(
        self, mesh: Mesh, posterior: LocalPosterior | None = None, observed: tuple[tuple[Watch, ArrayData], ...] = ()
    ) -> Problem:
        """Its posterior, or another over the same data, on these devices."""
        return Problem(
            self.posterior if posterior is None else posterior, self.source, mesh, int(self.batch_size),
            self.micro_batches, tuple(self.other_data.values()), observed, packs=self.sampler.entrywise,
        )  # fmt: skip

    def checked_identity(
        self, plan: Schedule, mesh: Mesh, asked: Mapping[str, Any], more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Everything that a run's numbers depend on, for its directory; {} where it is not needed.

        Args:
            asked: numbers that the caller gave. more: what the run depends on beside this request.

        Raises:
            ValueError: on all processes, when the call of one of them differs from that of process 0.
        """
        if self.folder is None and not spans_processes(mesh):
            return {}  # it takes a pass over the data, and a trace of the loss
        identity = {**(more or {}), **self._identity(plan, mesh, asked)}
        if spans_processes(mesh):
            self._check_same_call(identity, mesh)
        return identity

    def _identity(self, plan: Schedule, mesh: Mesh, asked: Mapping[str, Any]) -> dict[str, Any]:
        posterior = self.posterior
        if spans_processes(mesh):
            posterior = dataclasses.replace(posterior, center=addressable(posterior.center))
        batch = self.source.fetch(np.zeros(plan.batch_size, np.int64))
        # In this order a refusal names what was changed: the traced loss_fn, last, changes with most of the others.
        return {
            "versions": versions(),
            "sampler": {name: getattr(self.sampler, name) for name in ("name", "step_size", "friction")},
            "schedule": {k: v for k, v in vars(plan).items() if k != "chunk_size"},
            "request": {k: None if v is None else np.asarray(v, float).tolist() for k, v in asked.items()},
            "key": jax.random.key_data(self.key).tolist(),
            "mesh": {name: int(size) for name, size in mesh.shape.items()},
            "device": mesh.devices.flat[0].device_kind,
            "data": {"examples": self.source.num_data, "fingerprint": self.source.fingerprint()},
            "also": {name: data.fingerprint() for name, data in self.other_data.items()},
            "posterior": posterior.fingerprint(batch),
        }

    def _check_same_call(self, identity: dict[str, Any], mesh: Mesh) -> None:
        here = {**identity, "chunk_size": self.chunk_size, "checkpoint_dir is given": self.checkpoint_dir is not None}
        first, *others = allgather(here, mesh)
        for number, other in enumerate(others, start=1):
            if (differs := first_difference(other, first)) is not None:
                name, theirs, ours = differs
                raise ValueError(
                    f"process {number} samples with another {name} than process 0: {theirs!r} there, {ours!r} here. "
                    "Let every process make the same call on the same data, or give each a mesh of "
                    "jax.local_devices()."
                )


@dataclass(frozen=True)
class Notes:
    """What a first start decided and a resumed one reads, where there is a directory."""

    store: RunStore | None
    identity: str  # digest of everything that the numbers depend on

    @classmethod
    def opened(
        cls, request: Request, plan: Schedule, mesh: Mesh, more: dict[str, Any], asked: dict[str, Any]
    ) -> "Notes":
        """Those of a run of many estimates in its directory. ``more``: what it depends on beside the request.

        Raises ValueError where the directory, or another process, has something else, and OSError.
        """
        identity = request.checked_identity(plan, mesh, asked, more)
        store = None if request.folder is None else RunStore(request.folder, identity, mesh)
        return cls(store, digest_of_json(identity))

    def kept(self, name: str, fields: Collection[str], decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The note of this name, with at least ``fields``: as it was written before, else what ``decide`` returns."""
        note = None if self.store is None else self.store.read_note(name, fields)
        if note is None:
            note = decide()
            if self.store is not None:
                self.store.write_note(name, note)
        return note


def lengths_of_each(request: Request) -> Lengths:
    """Of one of many estimates: by default as many warm-up steps as go into the draws."""
    chains, draws, thinning = request.num_chains, request.num_draws, request.thinning
    for name, value in {"num_chains": chains, "num_draws": draws, "thinning": thinning}.items():
        check_count(name, value, 1)
    assert chains is not None
    assert draws is not None
    assert thinning is not None
    warmup = draws * thinning if request.num_warmup is None else request.num_warmup
    return Lengths(int(chains), int(draws), int(warmup), int(thinning))


def check_no_metric(request: Request) -> None:
    if request.sampler.metric:
        raise ValueError("a metric belongs to one setting at one checkpoint. Take underdamped() without a metric.")


def as_sampler(sampler: Any) -> Sampler:
    """A Sampler: as given, the default, or one around a ``blackjax.SamplingAlgorithm``. Raises TypeError."""
    if sampler is None:
        return underdamped()
    if isinstance(sampler, Sampler):
        return sampler
    if callable(getattr(sampler, "init", None)) and callable(getattr(sampler, "step", None)):
        return from_blackjax(sampler)
    raise TypeError(f"sampler must be a Sampler, got {shown(sampler)}. Call its constructor: slt_jax.sgld(step_size).")
