"""One setting for many estimates: its lengths checked, and what a first start decided kept for those that resume it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.sharding import Mesh

from slt_jax.batches import Source, check_batch_size
from slt_jax.checkpoint import RunStore
from slt_jax.engine import Schedule
from slt_jax.mesh import automatic, chain_mesh
from slt_jax.posterior import LocalPosterior, check_count
from slt_jax.samplers.base import Sampler


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

    def kept(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = None if self.store is None else self.store.read_note(name)
        if found is None:
            found = decide()
            if self.store is not None:
                self.store.write_note(name, found)
        return found


def alone_layout(num_chains: int, mesh: Mesh | None) -> Mesh:
    """Where the chains of one estimate run alone: on the given devices if they divide them."""
    given = None if mesh is None else automatic(mesh)
    if given is None or num_chains % given.shape.get("chain", 1):
        return chain_mesh(num_chains)
    return given


def schedule_of(
    source: Source, sampler: Sampler, num_chains: int, num_draws: int, num_warmup: int, thinning: int,
    batch_size: int | None, micro_batches: int, baseline: str, chunk_size: int,
) -> Schedule:  # fmt: skip
    """The lengths of one estimate; see ``estimate_llc`` for the arguments. Raises TypeError, ValueError."""
    counts = {"num_chains": num_chains, "num_draws": num_draws, "thinning": thinning}
    for name, value in {**counts, "micro_batches": micro_batches, "chunk_size": chunk_size}.items():
        check_count(name, value, 1)
    check_count("num_warmup", num_warmup, 0)
    whole = sampler.family == "exact"
    if batch_size is None:
        batch_size = source.num_data if whole else min(256, source.num_data)
    check_batch_size(batch_size, source.num_data)
    if whole and (source.on_host or batch_size != source.num_data):
        raise ValueError(f"{sampler.name} takes whole gradients: give arrays in memory, and leave batch_size out.")
    if batch_size % micro_batches:
        raise ValueError(f"micro_batches = {micro_batches} does not divide batch_size = {batch_size}. Take a divisor.")
    if not isinstance(baseline, str) or baseline not in ("paired", "full"):
        raise ValueError(f"baseline must be 'paired' or 'full', got {baseline!r}. 'paired' has less variance.")
    numbers = (num_chains, num_draws, num_warmup, thinning, batch_size, micro_batches)
    return Schedule(*(int(x) for x in numbers), baseline, 1, int(chunk_size))
