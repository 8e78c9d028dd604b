"""What a run would take on devices that are not there."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slt_jax.engine.memory import MemoryEstimate
from slt_jax.engine.operations import Operations
from slt_jax.engine.plan import Schedule
from slt_jax.engine.progress import span
from slt_jax.engine.topology import Devices
from slt_jax.machine import size_text


@dataclass(frozen=True)
class Account:
    """The compiler's account of the chunk program, in bytes on one device; donated arguments are also outputs."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """With what is donated counted once, and without the code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True)
class Part:
    """A part of the run's length: its ``steps`` and ``draws`` of each chain, and minibatch ``gradients`` of all."""

    name: str
    steps: int
    draws: int
    gradients: int


@dataclass(frozen=True, repr=False)
class Plan:
    """What ``plan`` returns: a run that was compiled for its devices, and not run.

    Attributes:
        devices: for which it was compiled. schedule: how chains and steps are laid out. num_free: weights that move.
        account: the compiler's. memory: of the run, as it is predicted from that.
        collectives: axis of the mesh -> kind of operation -> number in the program's text. Empty where the devices
            exchange nothing.
        step, draw: operations of one chain in a step, and in what each draw costs beside it (the loss at w*, further
            data, observables).
        moved: bytes that one step of one chain at least reads and writes, to update its state.
        utilization: share of the devices' peak arithmetic that is assumed.
        parts: lengths of the run: one, or the first round and the most that a ``target_error`` may take.
        compile_seconds: that the chunk program took to compile here.
        notes: on what the numbers do not contain.
    """

    devices: Devices
    schedule: Schedule
    num_free: int
    account: Account
    memory: MemoryEstimate
    collectives: Mapping[str, Mapping[str, int]]
    step: Operations
    draw: Operations
    moved: float
    utilization: float
    parts: tuple[Part, ...]
    compile_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """Devices, or groups of them that share the weights, among which the chains are distributed."""
        return self.memory.at_once // self.schedule.chain_batch

    @property
    def chains_that_fit(self) -> int:
        """On all devices together."""
        return self.memory.room * self.groups

    def predicted(self, num_chains: int) -> float:
        """Bytes on one device that the program of so many chains should take by the compiler's account."""
        return self.account.total + (num_chains - self.schedule.num_chains) / self.groups * self.memory.chain

    @property
    def step_seconds(self) -> float:
        """One step of one chain on its device, at the assumed utilization: arithmetic, then memory traffic."""
        kind, own = self.devices.kind, self.devices.count / self.groups
        traffic = self.moved / (own * kind.bandwidth)
        return self.step.seconds(kind.peak) / (own * self.utilization) + traffic

    @property
    def draw_seconds(self) -> float:
        """What a draw takes beside its step."""
        return self.draw.seconds(self.devices.kind.peak) * self.groups / (self.devices.count * self.utilization)

    def seconds(self, part: Part) -> float:
        """Of all chains: those of one device move one after another, or in groups at the same rate."""
        each = self.schedule.num_chains // self.groups
        return each * (part.steps * self.step_seconds + part.draws * self.draw_seconds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes and seconds."""
        kind, plan = self.devices.kind, self.schedule
        return {
            "device": self.devices.name, "kind": kind.label, "devices": self.devices.count,
            "weights_free": self.num_free, "chains": plan.num_chains, "chains_at_once": self.memory.at_once,
            "chains_that_fit": self.chains_that_fit, "batch_size": plan.batch_size,
            "micro_batches": plan.micro_batches, "fits": self.memory.fits,
            "device_bytes": {**vars(self.account), "total": self.account.total},
            "predicted_bytes": self.memory.total, "bytes_per_chain": self.memory.chain,
            "usable_bytes": kind.memory, "collectives": {k: dict(v) for k, v in self.collectives.items()},
            "step_products": dict(self.step.products), "step_other_operations": self.step.others,
            "draw_products": dict(self.draw.products), "utilization": self.utilization,
            "step_seconds": self.step_seconds, "draw_seconds": self.draw_seconds,
            "lengths": [{**vars(part), "seconds": self.seconds(part)} for part in self.parts],
            "compile_seconds": self.compile_seconds, "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        fits = "" if self.memory.fits else ", does not fit"
        chains, size = f"{self.schedule.num_chains:,} chains", size_text(self.account.total)
        return f"<Plan: {chains} on {self.devices.name}, {size} a device{fits}>"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        plan, kind, account = self.schedule, self.devices.kind, self.account
        many = f"{self.devices.count} devices" if self.devices.count > 1 else "one device"
        yield f"{self.devices.name}: {kind.label}, {many} with {size_text(kind.memory)} for programs each"
        if self.memory.fits:
            yield f"chains: {self.chains_that_fit:,} fit; {plan.num_chains:,} planned, {self.memory.at_once:,} at once"
        else:
            yield f"chains: {plan.num_chains:,} do not fit: {self.memory.refusal()}"
        yield (
            f"memory of a device, by its compiler: {size_text(account.total)} (arguments "
            f"{size_text(account.arguments)}, temporaries {size_text(account.temporaries)}); "
            f"{size_text(self.memory.chain)} a chain"
        )
        yield f"collectives: {self._exchanges()}"
        yield (
            f"operations: {_flop(self.step.total)} a step of a chain in products of {_types(self.step)}, "
            f"{_flop(self.draw.total)} more at a draw"
        )
        yield (
            f"time: {_seconds(self.step_seconds)} a step of a chain at {self.utilization:.0%} of the peak "
            f"({max(map(kind.peak, self.step.products), default=kind.float32) / 1e12:,.0f} TFLOP/s)"
        )
        for part in self.parts:
            yield (
                f"{part.name}: {part.steps:,} steps of each chain, {part.gradients:,} gradients: "
                f"{span(self.seconds(part))}"
            )
        yield f"compilation: {self.compile_seconds:.0f} s on this machine"
        yield from (f"note: {note}" for note in self.notes)

    def _exchanges(self) -> str:
        if not self.collectives:
            return "none"
        return "; ".join(
            f"{axis}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            for axis, kinds in self.collectives.items()
        )


def _flop(number: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number / 1e6:,.3g} MFLOP"


def _types(found: Operations) -> str:
    return " and ".join(sorted(found.products, key=lambda kind: -found.products[kind])) or "none"


def _seconds(value: float) -> str:
    if not math.isfinite(value) or value >= 1:
        return f"{value:,.3g} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"
