"""The chunk program of a small decoder, compiled for devices that are not there; skipped where a compiler is missing.

`make plans` installs that for TPUs beside the others and runs this file.
"""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.engine.topology import has_compiler
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from tests.small import leaking

tpu = pytest.mark.skipif(not has_compiler("tpu"), reason="needs the compiler for TPUs: the extra tpu-compiler")
gpu = pytest.mark.skipif(not has_compiler("cuda"), reason="needs the compiler for GPUs: the extra gpu-compiler")

CONFIG = DecoderConfig(256, 64, 64, 2, 4)
TOKENS = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.int32)
SAMPLERS = {"sgld": slt.sgld(1e-5), "underdamped": slt.underdamped(1e-5)}


def planned(device, sampler="sgld", loss=sequence_loss, **more):
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    params, loss_fn = slt.from_nnx(model, loss)
    posterior = slt.LocalPosterior(loss_fn, params, len(TOKENS), 30.0, 300.0)
    observe = {"losses": slt.Observable(TOKENS[:8], level="token", keep="moments"), "probe": TOKENS[:16]}
    given = {"num_draws": 32, "num_warmup": 8, "batch_size": 8, "chain_batch": 1, "observe": observe, **more}
    return slt.plan(posterior, TOKENS, device=device, sampler=SAMPLERS[sampler], **given)


def assert_predicted(few, many):
    """The planner's prediction from a plan of few chains, against the compiler's account for many."""
    assert few.predicted(many.schedule.num_chains * few.groups // many.groups) == pytest.approx(
        many.account.total, rel=0.15
    )


@tpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chains_on_tpus_exchange_nothing_and_take_what_is_predicted(sampler):
    """Kills: a collective on the chain axis; a planner that is off by a third (256 chains are most of the memory)."""
    few, many, pod = (
        planned(device, sampler, num_chains=chains)
        for device, chains in (("v5e:2x2", 4), ("v5e:2x2", 256), ("v5e:16x16", 256))
    )
    assert [found.collectives for found in (few, many, pod)] == [{}, {}, {}]
    assert [found.memory.at_once for found in (few, many, pod)] == [4, 4, 256]
    assert_predicted(few, many)
    assert_predicted(few, pod)
    wrong = dataclasses.replace(few, memory=dataclasses.replace(few.memory, chain=few.memory.chain * 4 / 3))
    with pytest.raises(AssertionError):
        assert_predicted(wrong, many)


@tpu
def test_a_planted_collective_is_found_on_tpus():
    """Kills: a text of the TPU's compiler that is not read."""

    assert list(planned("v5e:2x2", loss=leaking(sequence_loss), observe={}).collectives) == ["chain"]


@gpu
def test_chains_on_gpus_exchange_nothing_and_take_what_is_predicted():
    """Kills: the same for GPUs."""
    few, many = planned("h100x8", num_chains=8), planned("h100x8", num_chains=512)
    assert (few.collectives, many.collectives) == ({}, {})
    assert_predicted(few, many)
