"""A run on devices that are not there: compiled for them, not run; what it would take of their memory and time."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_positive
from slt_jax.engine.chunk import Static, loss_and_grad_on
from slt_jax.engine.collectives import collectives_of
from slt_jax.engine.loop import Engine
from slt_jax.engine.memory import layouts, planned_memory
from slt_jax.engine.observe import values_at
from slt_jax.engine.operations import Operations, operations_of
from slt_jax.engine.problem import DescribedProblem
from slt_jax.engine.topology import Devices, described_mesh, devices_named
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.lengths import CHAINS, WARMUP_SHARE, lengths_of
from slt_jax.estimators.observing import watched
from slt_jax.estimators.precision import first_round, most_gradients
from slt_jax.estimators.request import Request
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.planned import Account, Part, Plan
from slt_jax.samplers.base import Hyper, Sampler
from slt_jax.samplers.kronecker import blank_factor

UTILIZATION = 0.4  # of a device's peak, which well-tuned training of transformers reaches
_NO_ROOM = ("RESOURCE_EXHAUSTED", "Ran out of memory")  # a TPU's compiler refuses a program that does not fit


@in_own_context
def plan(
    posterior: LocalPosterior, data: Any, *, device: str, sampler: Sampler | None = None,
    num_chains: int | None = None, num_draws: int | None = None, num_warmup: int | None = None,
    thinning: int | None = None, batch_size: int | None = None, budget: int | None = None,
    target_error: float | None = None, micro_batches: int = 1, baseline: str = "paired",
    control_variate: bool | None = None, also: Mapping[str, Any] | None = None,
    observe: Mapping[str, Any] | None = None, chain_batch: int | None = None, chunk_size: int = 512, model: int = 1,
    utilization: float = UTILIZATION,
) -> Plan:  # fmt: skip
    """Memory, communication and time of an estimate on accelerators that are not at hand.

    The program that would move the chains is compiled here, on a CPU, for a description of these devices. Nothing is
    sampled. The compilers are the extras ``tpu-compiler`` and ``gpu-compiler``; they need no accelerator.

    Args:
        posterior: as for ``estimate_llc``; its ``center`` may hold shapes (``jax.ShapeDtypeStruct``), so that the
            weights of a large model need not be read.
        data: as for ``estimate_llc``.
        device: kind and number: ``"v5e:2x2"``, ``"v5p:2x2x1"``, ``"v6e:4x4"`` (TPUs, by their topology), ``"h100"``,
            ``"h100x8"``, ``"h200"``.
        num_chains: a multiple of the devices; default 4, or one on each device if those are more.
        model: devices that share the weights of a chain, on the second axis of the mesh.
        utilization: share of the peak arithmetic of the data sheet that is assumed for the time, above 0, at most 1.
        sampler, num_draws, num_warmup, thinning, batch_size, budget, target_error, micro_batches, baseline,
            control_variate, also, observe, chain_batch, chunk_size: as for ``estimate_llc``.

    Returns:
        A Plan. The times are those of products of matrices at ``utilization`` and of reading and writing the state of
        the chains; for a small model, whose operations are shorter than they take to start, they are too short.

    Raises:
        TypeError, ValueError: an argument cannot be used. ImportError: the compiler for these devices is not installed.
        MemoryError: the compiler refuses the program because one chain does not fit.
    """
    devices = devices_named(device)
    check_positive("utilization", utilization, "It is a share of the peak: 0.4 for 40 %.")
    if utilization > 1:
        raise ValueError(f"utilization must be at most 1, got {utilization}. It is a share of the peak: 0.4 for 40 %.")
    asked = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, budget=budget, target_error=target_error,
        micro_batches=micro_batches, baseline=baseline, control_variate=control_variate, also=also, observe=observe,
        chain_batch=chain_batch, chunk_size=chunk_size, described=True,
    )  # fmt: skip
    mesh = described_mesh(devices, model)
    return planned(asked, devices, mesh, utilization)


def planned(asked: Request, devices: Devices, mesh: Mesh, utilization: float) -> Plan:
    """The plan of a checked request on the mesh of these devices."""
    request = asked if asked.target_error is None else first_round(asked)
    request = _with_chains(request, devices, mesh.shape["chain"])
    growth = 1.0 if asked.target_error is None else most_gradients(asked) / (request.budget or 1)
    engine, compiled, seconds = _compiled(_engines(request, mesh, growth), devices)
    account = account_of(compiled)
    return Plan(
        devices=devices, schedule=engine.plan, num_free=request.posterior.num_free, account=account,
        memory=planned_memory(engine, compiled.memory_analysis(), devices.kind.memory),
        collectives=collectives_of(compiled.as_text(), mesh), step=_of_step(engine), draw=_of_draw(engine),
        moved=_moved(engine), utilization=float(utilization), parts=tuple(_parts(asked, engine)),
        compile_seconds=seconds, notes=tuple(_notes(request, devices)),
    )  # fmt: skip


def account_of(compiled: Any) -> Account:
    """The compiler's account of a program's memory."""
    found = compiled.memory_analysis()
    return Account(
        arguments=found.argument_size_in_bytes, outputs=found.output_size_in_bytes, aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes, code=found.generated_code_size_in_bytes,
    )  # fmt: skip


def _with_chains(request: Request, devices: Devices, groups: int) -> Request:
    """With a number of chains that ``groups`` share equally."""
    chains = request.num_chains
    if chains is None:
        return dataclasses.replace(request, num_chains=max(groups, -(-CHAINS // groups) * groups))
    if chains % groups:
        raise ValueError(
            f"num_chains = {chains} cannot be shared out equally on {devices.name}, where {groups} move at once. Take "
            f"{-(-chains // groups) * groups}."
        )
    return request


def _engines(request: Request, mesh: Mesh, growth: float) -> Iterator[Engine]:
    """Laid out in different ways, from the fastest to the one that takes least. ``growth``: as for ``watched``."""
    control = bool(request.control_variate)
    lengths = lengths_of(request, 0.0, control)
    observed = watched(request, lengths, growth)
    problem = DescribedProblem(
        request.posterior, request.source, mesh, int(request.batch_size), request.micro_batches,
        tuple(request.other_data.values()), observed, packs=request.sampler.entrywise,
    )  # fmt: skip
    for _, group in layouts(lengths.num_chains, mesh, request.chain_batch, problem.num_free):
        yield Engine(problem, request.sampler, request.schedule(lengths, group, control), request.key)


def _compiled(engines: Iterator[Engine], devices: Devices) -> tuple[Engine, Any, float]:
    """(the first engine that fits, else the last one; its program; seconds of its compilation)."""
    best, refusal = None, None
    for engine in engines:
        began = time.perf_counter()
        try:
            program = engine.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not any(words in str(error) for words in _NO_ROOM):
                raise
            refusal = error
            continue
        best = engine, program, time.perf_counter() - began
        if planned_memory(engine, program.memory_analysis(), devices.kind.memory).fits:
            break
    if best is None:
        raise MemoryError(
            f"{devices.kind.label}'s compiler refuses the program for lack of memory: {_first_line(refusal)} Take more "
            "micro-batches or shorter examples, bfloat16 for the forward pass, a part of the model, sgld, or devices "
            "with more memory."
        ) from refusal
    return best


def _first_line(error: Exception | None) -> str:
    return str(error).strip().split("\n")[0][:300].rstrip(".") + "."


def _bare(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _batch(engine: Engine) -> Any:
    row = engine.problem.source.fetch(np.zeros(1, np.int64))
    size = engine.plan.batch_size
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)), row
    )


def _state(engine: Engine) -> Any:
    """Of one chain."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), engine.described()[0])


def _on_one_device(engine: Engine) -> Static:
    """Its program for whole weights: what the devices of a chain do together."""
    return engine.static._replace(program=engine.static.program.on_mesh(None))


def _of_step(engine: Engine) -> Operations:
    static, problem = _on_one_device(engine), engine.problem
    metric = _bare(tuple(map(blank_factor, problem.center))) if engine.sampler.metric else ()

    def step(key, state, center, frozen, batch, metric):
        evaluate = loss_and_grad_on(static, frozen, batch)
        moved = static.sampler_step(key, state, evaluate, center, Hyper(1.0, 1.0, 1.0, metric=metric))
        return moved, evaluate(center) if static.control_variate else None

    center, frozen = _bare(problem.center), _bare(problem.frozen)
    return operations_of(step, _bare(engine.key), _state(engine), center, frozen, _batch(engine), metric)


def _of_draw(engine: Engine) -> Operations:
    """The loss at w*, those of further data at both ends, and what is observed."""
    static, problem = _on_one_device(engine), engine.problem
    center, frozen, batch = _bare(problem.center), _bare(problem.frozen), _batch(engine)
    loss = operations_of(static.program.losses, center, frozen, batch)
    paired = static.paired and not static.control_variate
    total = loss.times(paired + 2 * len(problem.also))
    for watch, data in zip(problem.watches, problem.observed, strict=True):
        total = total + operations_of(lambda *at, watch=watch: values_at(watch, *at), center, frozen, _bare(data))
    return total


def _moved(engine: Engine) -> float:
    """Bytes: the state is read and written, the gradient too, w* read."""
    size = lambda tree: sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return float(2 * size(_state(engine)) + 3 * size(engine.problem.center))


def _parts(asked: Request, engine: Engine) -> Iterator[Part]:
    schedule = engine.plan
    first = Part("run", schedule.total_steps, schedule.num_draws, schedule.step_gradients())
    if asked.target_error is None:
        yield first
        return
    yield dataclasses.replace(first, name="first round")
    most = most_gradients(asked)
    steps = int(most / (schedule.step_gradients() / schedule.total_steps))
    draws = int((1 - WARMUP_SHARE) * steps) // schedule.thinning
    yield Part(f"at most, for an error of {asked.target_error:.1%}", steps, draws, most)


def _notes(request: Request, devices: Devices) -> Iterator[str]:
    yield "the calibration and the final checks run programs of their own, which are not in these numbers."
    forward = request.posterior.program.forward_dtype
    if devices.kind.platform == "cuda":
        if forward is not None and forward.itemsize == 2:
            yield "attention is XLA's: cuDNN's kernel, which the device has, is not compiled here and takes less."
        yield "75 % of a GPU's memory is for programs, unless XLA_PYTHON_CLIENT_MEM_FRACTION gives JAX another share."
