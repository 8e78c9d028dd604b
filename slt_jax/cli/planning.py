"""``slt-jax plan``: what a run on accelerators that are not at hand would take."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from slt_jax._checks import check_count
from slt_jax.cli.language import LOCALIZATION, NBETA
from slt_jax.cli.options import Planned
from slt_jax.models.decoder import Decoder, sequence_loss
from slt_jax.models.hub import describe_checkpoint
from slt_jax.models.restrict import restricted
from slt_jax.posterior.data import HostData

_PRECISION = 0.03


class Sequences(HostData):
    """As many sequences of tokens as a plan needs to know of: their number and length, read on the host."""

    def __init__(self, num_data: int, length: int):
        self.num_data, self._length = num_data, length

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """Zeros."""
        return np.zeros((*indices.shape, self._length), np.int32)

    def fingerprint(self) -> str:
        """Of their shape."""
        return f"{self.num_data} x {self._length}"


def planned(command: Planned) -> slt.Plan:
    """The plan of a checkpoint, of which only config.json is read."""
    model = describe_checkpoint(command.checkpoint, revision=command.revision)
    data = Sequences(command.examples, _length(command, model))
    params, loss_fn = slt.from_nnx(model, sequence_loss)
    posterior = slt.LocalPosterior(
        loss_fn, params, data.num_data, NBETA, LOCALIZATION, forward_dtype=jnp.bfloat16 if command.bfloat16 else None
    )
    free = posterior if command.only is None else restricted(posterior, command.only)
    if not command.quiet:
        weights = sum(x.size for x in jax.tree.leaves(posterior.center))
        print(f"model: {weights:,} weights, {free.num_free:,} of them free", file=sys.stderr)
        told = f"{command.examples:,} examples of {_length(command, model)} tokens, {command.batch_size} a step"
        print(f"data: {told}", file=sys.stderr)
        print(f"compiling for {command.device} ...", file=sys.stderr)
    return slt.plan(
        free, data, device=command.device, utilization=command.utilization, model=command.model,
        num_chains=command.chains, batch_size=command.batch_size, micro_batches=command.micro_batches,
        num_warmup=command.warmup, **_sampler_and_length(command),
    )  # fmt: skip


def show(command: Planned, found: slt.Plan) -> None:
    """Print it."""
    print(json.dumps(found.to_dict(), indent=1) if command.json else found)


def _length(command: Planned, model: Decoder) -> int:
    limit = model.config.context_length
    if command.seq_len is None:
        return limit
    check_count("--seq-len", command.seq_len, 2)
    if command.seq_len > limit:
        raise ValueError(f"--seq-len {command.seq_len} is more than the model's context of {limit}.")
    return command.seq_len


def _sampler_and_length(command: Planned) -> dict[str, Any]:
    """As for ``llc``: until it is precise, unless --draws or another sampler than underdamped is given."""
    samplers = {"sgld": slt.sgld, "preconditioned": slt.preconditioned_sgld, "underdamped": slt.underdamped}
    open_length = command.draws is None and command.sampler in (None, "underdamped")
    if command.draws is None and (open_length or command.precision is not None):
        target = _PRECISION if command.precision is None else command.precision
        length = {"target_error": target, "budget": command.budget, "thinning": command.thinning}
    else:
        for name, value in {"precision": command.precision, "budget": command.budget}.items():
            if value is not None:
                raise ValueError(f"--{name} is for a run of no fixed length. Leave --draws out with it.")
        draws, thinning = 200 if command.draws is None else command.draws, command.thinning
        length = {"num_draws": draws, "thinning": 1 if thinning is None else thinning}
    name = command.sampler or ("underdamped" if open_length else "sgld")
    return {"sampler": samplers[name](), **length}
