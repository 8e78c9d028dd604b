"""The memory a teacher needs, told from its shape before anything is allocated."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import jax

from scaling.dln import devices
from scaling.dln.methods import Method
from scaling.dln.teachers import Shape, draw_shape
from slt_jax.machine import free_of_accelerator, free_of_process
from slt_jax.samplers.kronecker import LARGE_SIDE

# Fitted from above to the peaks of processes on a CPU: README.md, "Memory".
STATES = {
    "default": 2, "kronecker": 2, "sgld": 1, "leimkuhler-matthews": 2, "preconditioned": 2, "sghmc": 2, "sgnht": 2,
    "hmc": 3, "gibbs": 4,
}  # fmt: skip
PROGRAM = 750 * 2**20  # the interpreter, JAX, and what it compiles
METRIC_PROGRAM, METRIC_LAYER = 500 * 2**20, 45 * 2**20  # more for a metric's, and for each layer
MEASURING = 14  # copies of the weights on an accelerator, for a metric's products, sums and rotations
LIBRARIES = 3 * 2**27  # there, for what multiplies and decomposes matrices, and gaps between what is freed
TURNING = 11 * 8  # bytes there, times the square of a side that is taken apart there


class Need(NamedTuple):
    """Bytes that a process takes, by what takes them, and bytes of one of its accelerators (0 on a CPU)."""

    data: float
    weights: float
    activations: float
    program: float
    accelerator: float = 0.0

    @property
    def process(self) -> float:
        return self.data + self.weights + self.activations + self.program


def need_of(shape: Shape, method: Method, chains: int, devices: int, accelerated: bool = False) -> Need:
    """What sampling a teacher takes in one process, with D devices and C chains of its own.

        data         (3/2 + D) 4 n (H_0 + H_L);   4 n where inputs are drawn, the weights for their law
        weights      [2 + s C + D (1 + p + 2 + 3 s)] 4 sum_k H_{k-1} H_k;   for a metric 7 + 3 D more
        activations  4 D 4 (batch size) sum_k H_k;   twice the narrowest width in place of the batch for their law
                     and for displacements

    s: copies in a sampler's state (1 for SGLD, 2 with a momentum); p = min(4, C) for the chains' ends that a
    calibration keeps, on every device; 2 + 3 s for the chain that is moved. On a CPU all of it is the process's. An
    accelerator has its share of the terms with C and D, and moves its chains together when they are small; a metric
    takes 14 copies of the weights there, 384 MiB, and eleven matrices in float64 of the largest side from 1024 on. Its
    programs take 500 MiB of the process, and 45 a layer.

    Args:
      method: with its ``num_data``.
    """
    widths, s = shape.widths, STATES[method.sampler]
    weights = 4.0 * sum(a * b for a, b in pairwise(widths))
    end_to_end = 4.0 * widths[0] * widths[-1]
    target = {"drawn": end_to_end, "displaced": end_to_end + weights}.get(method.data, 0.0)
    per_example = {"stored": widths[0] + widths[-1], "drawn": 1, "displaced": 1}
    data = weights if method.data == "population" else 4.0 * method.num_data * per_example[method.data]
    rows = 2 * min(widths) if method.data in ("displaced", "population") else method.batch_size
    layers = 4 * 4.0 * rows * sum(widths)
    ends = min(4, chains) if method.protocol == "ours" else 0
    kept, moved = (1 + ends) * weights + target, (2 + 3 * s) * weights
    program = PROGRAM
    if method.sampler == "kronecker":  # scales and bases on each device, sums in float64, longer programs
        kept += 3 * weights
        target += 3.5 * weights
        program += METRIC_PROGRAM + METRIC_LAYER * (len(widths) - 1)
    if not accelerated:
        on_devices = devices * (kept + moved) + s * chains * weights
        return Need((1.5 + devices) * data, 2 * (weights + target) + on_devices, devices * layers, program)
    local = chains / devices
    together = local if weights * local <= 2**26 else 1
    measuring = 0.0
    if method.sampler == "kronecker":
        measuring = MEASURING * weights + LIBRARIES + (TURNING * max(widths) ** 2 if max(widths) >= LARGE_SIDE else 0)
    accelerator = data + kept + s * local * weights + together * (moved + layers) + measuring
    return Need(1.5 * data, 2 * (weights + target), 0, program, accelerator)


def fits(need: Need, process: float, accelerator: float) -> bool:
    return need.process <= process and need.accelerator <= accelerator


def sentence(what: str, need: Need, process: float, accelerator: float, remedies: list[str]) -> str:
    """Why a teacher is refused, and which of the remedies would be enough."""
    parts = {"data set": need.data, "weights": need.weights, "activations": need.activations, "program": need.program}
    told = ", ".join(f"{name} {size / 1e9:.2g} GB" for name, size in parts.items() if size)
    where, size, limit = "this process", need.process, process
    if need.process <= process:
        where, size, limit, told = "each accelerator", need.accelerator, accelerator, "data set, weights and chains"
    advice = f"Enough would be {', or '.join(remedies)}." if remedies else "Take a machine with more memory."
    return f"{what} needs about {size / 1e9:.3g} GB of {where} ({told}), and {limit / 1e9:.3g} GB are free. {advice}"


def check(size: str, kind: str, seed: int, method: Method, most_devices: int | None) -> None:
    """Raises MemoryError with what is needed and what would do; the same on every process."""
    shape, accelerated = draw_shape(kind, size, seed), jax.default_backend() != "cpu"
    free = free_of_process(), free_of_accelerator()

    def needs(m: Method) -> Need:
        used = devices.mesh_for(m.num_chains, most_devices).devices.size // jax.process_count()
        return need_of(shape, m, m.num_chains // jax.process_count(), used, accelerated)

    need = needs(method)
    if devices.most_of(not fits(need, *free)):
        what = f"type {kind}, class {size}, teacher {seed} (widths {'-'.join(map(str, shape.widths))})"
        enough = [text for text, other in _remedies(shape, method) if fits(needs(other), *free)]
        raise MemoryError(sentence(what, need, *free, enough))


def _remedies(shape: Shape, method: Method) -> Iterator[tuple[str, Method]]:
    """Cheaper ways to run this teacher, those that change least first."""
    drawable = method.data == "stored" and method.label_noise == 0 and method.sampler != "hmc"
    fewer = 100 * max(shape.widths)
    if drawable:
        yield "--data drawn", dataclasses.replace(method, data="drawn")
    if fewer < method.num_data:
        yield f"--num-data {fewer}", dataclasses.replace(method, num_data=fewer)
    if method.num_chains > 1 and method.protocol == "ours" and jax.process_count() == 1:
        yield "--chains 1", dataclasses.replace(method, num_chains=1)
        if drawable:
            yield "--data drawn --chains 1", dataclasses.replace(method, data="drawn", num_chains=1)
