"""The memory that a run will take, estimated before it starts: what is in use now, and what XLA plans for its programs.

The programs are compiled for it ahead of time, and the run uses the same compilations: the estimate costs no time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from slt_jax._checks import check_count
from slt_jax.engine.loop import Engine
from slt_jax.engine.mesh import allgather, chain_mesh
from slt_jax.machine import size_text, taken_and_free
from slt_jax.posterior.local import LocalPosterior
from slt_jax.samplers.kronecker import largest_side

HEAP = 300 * 2**20  # for each of a CPU's devices: what the allocator keeps of what was freed, at 14M to 162M weights
_EIGEN = 8  # matrices in float64 that a decomposition holds, as fitted to peaks at sides of 1000 to 3000
_EIGEN_THERE = 11  # the same on an accelerator, at a side of 2987
_SLACK = 1.05  # of what a run is estimated to take, for what is not seen from here
_TOGETHER = 2**26  # weights of chains that an accelerator moves together: a fifth faster than 2**24 on an H100
MUCH = 2**28  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: of the whole process on a CPU (``where`` says so), else of its fullest device.

    ``peak``: the most that was in use so far. ``in_use``: now, by w* on every device of the mesh and by the data among
    others. ``available``: beyond that. ``chain``: what one chain holds between steps. ``chains``: all of them, here.
    ``batches``: those of a chunk from the host, and the next ones. ``step``: what moving chains takes beside that,
    ``measurement`` a measurement at one position (calibration, the end), ``save`` a checkpoint on its way to disk.
    ``control``: control variates, in no sum, since they are not taken up where they do not fit.
    """

    where: str
    peak: float
    in_use: float
    available: float
    chain: float
    chains: float
    batches: float
    step: float
    measurement: float
    save: float
    control: float
    num_chains: int
    at_once: int
    devices: int

    @property
    def additional(self) -> float:
        """Beyond ``in_use``, at most."""
        return self.chains + self.batches + self.save + max(self.step, self.measurement)

    @property
    def total(self) -> float:
        return max(self.peak, self.in_use + self.additional)

    @property
    def fits(self) -> bool:
        return _SLACK * self.additional <= self.available

    @property
    def fits_with_control(self) -> bool:
        return _SLACK * (self.additional + self.control) <= self.available

    def to_dict(self) -> dict[str, Any]:
        """In MiB, for the record of a run."""
        sizes = {
            "total": self.total, "now": self.in_use, "chain": self.chain, "step": self.step, "look": self.measurement,
        }  # fmt: skip
        return {"of": self.where, **{f"{name}_mib": round(size / 2**20) for name, size in sizes.items()}}

    def lines(self) -> list[str]:
        """For a person, before the run."""
        free = "" if math.isinf(self.available) else f", of {size_text(self.in_use + self.available)}"
        spread = f" on {self.devices} devices" if self.devices > 1 else ""
        return [
            f"memory: {size_text(self.chain)} a chain, {self.at_once} of {self.num_chains} chains at once{spread}; at "
            f"most {size_text(self.total)} of {self.where}{free}"
        ]

    @property
    def room(self) -> int:
        """Chains that one device, or this process, has room for."""
        left = self.available / _SLACK - self.batches - max(self.step, self.measurement)
        return max(0, math.floor(left / (self.chain * (2 if self.save else 1))))

    def refusal(self) -> str:
        """Why it is not begun, and what would help."""
        most = max((self.step, "a step"), (self.measurement, "measuring one chain's curvature"))
        taken = [
            (self.in_use, "in use already"), (self.chains, f"{self.num_chains} chains of {size_text(self.chain)}"),
            (self.batches, "batches"), (self.save, "a checkpoint being written"), most,
        ]  # fmt: skip
        parts = ", ".join(f"{what} {size_text(size)}" for size, what in taken if size)
        fewer = f"at most {self.room} chains, " if 1 <= self.room < self.num_chains else ""
        return (
            f"the run needs about {size_text(self.total)} of {self.where} ({parts}), and "
            f"{size_text(self.in_use + self.available)} are available. Take {fewer}more micro-batches or "
            "shorter examples, bfloat16 for the forward pass, a part of the model, sgld (its chains hold one copy of "
            "the weights, most others two), or a machine with more memory."
        )


def layouts(num_chains: int, mesh: Mesh | None, chain_batch: int | None, num_free: int) -> Iterator[tuple[Mesh, int]]:
    """(mesh, chains advanced together on one device): what was given, or from the fastest to the one that takes least.

    A CPU's devices are its cores, which share its memory: fewer of them take less.
    """
    widest = chain_mesh(num_chains) if mesh is None else mesh
    on_cpu, meshes = widest.devices.flat[0].platform == "cpu", [widest]
    if mesh is None and jax.process_count() == 1 and on_cpu:
        fewer = range(widest.devices.size - 1, 0, -1)
        meshes += [chain_mesh(num_chains, jax.devices()[:k]) for k in fewer if num_chains % k == 0]
    if chain_batch is not None:
        check_count("chain_batch", chain_batch, 1)
        if chain_batch not in (divisors := _divisors(num_chains // widest.shape["chain"])):
            raise ValueError(
                f"chain_batch = {chain_batch} does not divide the {divisors[0]} chains of one device. "
                f"Take one of {divisors[::-1]}."
            )
    for one in meshes:
        for group in _divisors(num_chains // one.shape["chain"]):
            # Past that many weights a single chain keeps an accelerator busy.
            good = group == 1 or (not on_cpu and group * num_free <= _TOGETHER)
            if group == chain_batch or (chain_batch is None and good):
                yield one, group


def _divisors(count: int) -> list[int]:
    """From the largest, ``count`` itself, down to 1."""
    return [k for k in range(count, 0, -1) if count % k == 0]


def needs_memory_check(posterior: LocalPosterior, num_chains: int, observing: float = 0.0) -> bool:
    """Whether the weights, free and frozen, are large enough for memory to matter: estimating it compiles programs.

    ``observing``: bytes of what observables take on the devices.
    """
    devices = jax.local_device_count()
    whole = sum(x.size for x in jax.tree.leaves(posterior.center))
    return 4 * (posterior.num_free * (8 * devices + 2 * num_chains) + whole * devices) + observing > MUCH


def observing_bytes(engine: Engine) -> float:
    """Bytes that observables take on all devices: moments between steps, and the values of a chunk."""
    watches, static = engine.problem.watches, engine.static
    rows = [3 * watch.parts if watch.parts else static.slots + 1 for watch in watches]
    return engine.plan.num_chains * sum(n * watch.num_bytes for n, watch in zip(rows, watches, strict=True))


def estimate_memory(
    engine: Engine, measurements: Sequence[int], *, saves: bool, control: bool = False
) -> MemoryEstimate:
    """What a run of this engine takes.

    Args:
        measurements: temporary bytes of the programs that measure at single positions, see ``Probe.temporaries``.
        saves: whether checkpoints are written. control: whether control variates are asked for.
    """
    plan, problem, mesh = engine.plan, engine.problem, engine.problem.mesh
    local = plan.num_chains // mesh.shape["chain"]
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    on_cpu = here[0].platform == "cpu"
    many = len(here) if on_cpu else 1
    step = _beside_arguments(engine.lower().compile().memory_analysis())
    state, _, batches = map(_on_device, engine.described())
    moments = _on_device(engine.described_sums())
    position = sum(x.addressable_data(0).nbytes for x in problem.center)
    measurement = (2 * position + max(measurements)) * (1 if problem.has_first_device else many) if measurements else 0
    heap = HEAP * many if on_cpu and measurements else 0
    at_center = position if engine.needs_center_grad else 0  # at w*, not there yet
    more = 0 if plan.control_variate or engine.static.full_batch else 2 * position - at_center  # two gradients
    step += at_center
    step, spare = (step + more, 0) if control else (step, many * more)
    if engine.sampler.metric:  # scales and bases on each device; while they are measured, sums and what turns them
        turning = (_EIGEN if on_cpu else _EIGEN_THERE) * 8 * largest_side(problem.center) ** 2
        step, measurement = step + 3 * position, measurement + (3 * many + 3.5) * position + turning
        heap += 2 * HEAP if on_cpu else 0  # its programs, and more that comes back late
    chains = many * (state + moments)
    peak, in_use, available = taken_and_free(here)
    return MemoryEstimate(
        where="this process" if on_cpu else "each device", peak=peak, in_use=in_use, available=available,
        chain=(state + moments) / local, chains=chains, save=chains if saves else 0.0,
        batches=(3 if on_cpu else 2) * many * batches,  # on a CPU the next ones are also in memory as they were read
        step=many * step + heap, measurement=measurement + heap, control=spare,
        num_chains=plan.num_chains, at_once=plan.chain_batch * mesh.shape["chain"], devices=mesh.devices.size,
    )  # fmt: skip


def planned_memory(engine: Engine, account: Any, limit: float) -> MemoryEstimate:
    """What a run takes of devices that are not there, each of ``limit`` bytes; without its measurements and saves.

    A chain counts with what a chunk records of it, and as it is laid out there: a TPU fills small arrays up.

    Args:
        account: the compiler's, of the chunk program for these devices; what it donates is the state of the chains.
    """
    plan, mesh = engine.plan, engine.problem.mesh
    state, _, batches = map(_on_device, engine.described())
    held = account.alias_size_in_bytes or state + _on_device(engine.described_sums())
    shared = account.argument_size_in_bytes - held - batches
    chains = max(held, account.output_size_in_bytes)
    return MemoryEstimate(
        where="each device", peak=0.0, in_use=shared, available=limit - shared,
        chain=chains * mesh.shape["chain"] / plan.num_chains, chains=chains, save=0.0,
        batches=2 * batches, step=account.temp_size_in_bytes, measurement=0.0, control=0.0, num_chains=plan.num_chains,
        at_once=plan.chain_batch * mesh.shape["chain"], devices=mesh.devices.size,
    )  # fmt: skip


def first_that_fits(
    engines: Iterable[Engine], estimate: Callable[[Engine], MemoryEstimate | None], refusal: str = ""
) -> tuple[Engine, MemoryEstimate | None]:
    """The first engine that fits into memory, and its estimate; the processes of a mesh agree.

    Args:
        engines: laid out in different ways, from the fastest to the one that takes least.
        estimate: of an engine; None where it is too small to ask.
        refusal: what to say where there is no engine at all.

    Raises:
        MemoryError: none fits.
    """
    last = None
    for engine in engines:
        last = estimate(engine)
        if last is None or all(allgather(last.fits, engine.problem.mesh)):
            return engine, last
    raise MemoryError(last.refusal() if last else refusal)


def state_bytes(engine: Engine) -> int:
    """Bytes that the chains hold between steps, on all of a CPU's devices or on one other; nothing is compiled."""
    here = [d for d in engine.problem.mesh.devices.flat if d.process_index == jax.process_index()]
    return (len(here) if here[0].platform == "cpu" else 1) * _on_device(engine.described()[0])


def _on_device(described: Any) -> int:
    """Bytes of shapes on a mesh that one device holds."""
    leaves = jax.tree.leaves(described)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _beside_arguments(analysis: Any) -> int:
    """Bytes on one device, of which donated arguments take none again; 0 where the compiler gives no numbers."""
    if analysis is None:
        return 0
    return analysis.temp_size_in_bytes + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
