"""Weights over the mesh's axis ``model``: the same numbers, each device its part, one layer gathered at a time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import slt_jax as slt
from slt_jax.engine.collectives import collectives_of, largest_result
from slt_jax.engine.plan import Schedule
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.posterior import split
from slt_jax.posterior.split import split_dimension
from tests.engines import engine_of, numbers_of

CONFIG = DecoderConfig(  # 61 tokens: the last device has fewer; few arrays, each of which takes long to compile
    61, 12, 32, 4, 2, positions="rotary", norm="rms", norm_scale=False, qkv_bias=False, out_bias=False, mlp_bias=False
)
TOKENS = np.random.default_rng(0).integers(0, 61, (64, 12)).astype(np.int32)
SAMPLERS = {"sgld": slt.sgld(1e-4), "underdamped": slt.underdamped(1e-4, friction=0.1)}
OTHER = DecoderConfig(
    61, 12, 32, 2, 4, num_kv_heads=2, positions="rotary", norm="rms", gated_mlp=True, head_bias=True, tied_head=False,
    logit_softcap=5.0, keep="all",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _small_arrays_are_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "LARGE", 1000)
        yield


def mesh_of(chains, model):
    axes, shape = (("chain", "model"), (chains, model)) if model > 1 else (("chain",), (chains,))
    devices = jax.devices()[: chains * model]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def posterior_of(config=CONFIG, **more):
    shapes, loss_fn = slt.from_nnx(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), sequence_loss)
    draws = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(draws.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return slt.LocalPosterior(loss_fn, params, len(TOKENS), 30.0, 100.0, **more)


@pytest.fixture(scope="module")
def posterior():
    return posterior_of()


def engine_on(mesh, posterior, sampler="sgld", num_chains=8, batch_size=8, micro_batches=1):
    plan = Schedule(num_chains, 6, 2, 1, batch_size, micro_batches, "paired", 1, 8)
    return engine_of(posterior, TOKENS, SAMPLERS[sampler], plan, jax.random.key(0), mesh)


def moved(engine, posterior):
    """The run after all its steps."""
    inputs = engine.inputs(numbers_of(posterior, engine.sampler))
    run = engine.start(inputs)
    engine.advance(run, inputs, engine.plan.total_steps)
    return run


def llc(run, posterior):
    kept = slice(2, None)
    return posterior.nbeta * float(np.mean(run.trace.loss[:, kept] - run.trace.baseline[:, kept], dtype=np.float64))


@pytest.mark.parametrize("sampler", ["sgld", pytest.param("underdamped", marks=pytest.mark.slow)])
def test_chains_move_as_on_one_device_each_and_gather_one_layer(sampler, posterior):
    """Kills: another noise in each part; a gradient that is summed twice over the axis, or over a part of the batch. A
    collective on the chain axis; all layers gathered before the scan; a table that is gathered; noise or a gradient
    that is made whole on every device.

    The LLC is nbeta = 30 times a difference of losses near 4, each right to a few units of the last place.
    """
    whole = moved(engine_on(mesh_of(8, 1), posterior, sampler), posterior)
    for chains, model in ((4, 2), (2, 4)):
        engine = engine_on(mesh_of(chains, model), posterior, sampler)
        split = moved(engine, posterior)
        for name in ("loss", "baseline", "drift_sq", "distance_sq", "virial"):
            a, b = getattr(whole.trace, name), getattr(split.trace, name)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{name}, {model}")
        assert llc(split, posterior) == pytest.approx(llc(whole, posterior), abs=30 * 4 * 1e-6)
        text = engine.lower(split).compile().as_text() or ""
        assert collectives_of(text, engine.problem.mesh).keys() == {"model"}
        assert 0 < largest_result(text, "all-gather") <= 4 * 32 * 128  # bytes of the largest array of a layer
        arrays = {tuple(int(n) for n in dims.split(",")) for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)}
        stacks = {(4, 32, 128), (4, 128, 32), (4, 32, 2, 16), (4, 2, 16, 32), (61, 32)}
        assert not stacks & {tuple(n for n in dims if n > 1) for dims in arrays}


def test_each_device_holds_its_part_of_the_state(posterior):
    """Kills: momentum, or w*, that every device has whole; state that is described otherwise than it is."""
    engine = engine_on(mesh_of(2, 4), posterior, "underdamped")
    run = engine.start(engine.inputs(numbers_of(posterior, engine.sampler)))
    described = jax.tree.leaves(engine.described()[0])
    for x, shape in zip(jax.tree.leaves(run.state), described, strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)
        parts = 8 if x.size >= 8 * 1000 else 2
        assert {shard.data.nbytes * parts for shard in x.addressable_shards} == {x.nbytes}
    own = [w for w in engine.problem.center if w.size >= 1000]
    assert len(own) == 7  # q, k, v, o, up, down and the embedding
    assert all(shard.data.nbytes * 4 == w.nbytes for w in own for shard in w.addressable_shards)


@pytest.mark.parametrize(
    ("config", "batch"),
    [(OTHER, 8), (dataclasses.replace(OTHER, keep="input", tied_head=True), 3)],
    ids=["all", "input"],
)
def test_a_decoder_in_parts_has_the_same_losses_and_gradients(config, batch):
    """Kills: logits of the last device's missing tokens; a softcap or bias that is left out; examples that count twice
    where all devices have all of them (3 on 4 devices).
    """
    posterior, mesh = posterior_of(config), mesh_of(2, 4)
    engine = engine_on(mesh, posterior, batch_size=batch)
    whole = posterior.program
    there, here = (engine.problem.center, engine.problem.frozen), whole.split(posterior.center)

    def values(program, position, frozen):
        losses = program.losses(position, frozen, TOKENS[:batch])
        weights = jnp.arange(1, batch + 1) / batch  # which examples' losses these are matters
        return jnp.sum(weights * losses), losses

    found = [
        jax.jit(jax.value_and_grad(lambda p, f, program=program: values(program, p, f), has_aux=True))(*at)
        for program, at in ((whole, here), (engine.problem.program, there))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), *found)


def test_mixed_precision_has_no_second_float32_copy():
    """Kills: weights that are gathered before they are rounded to bfloat16."""
    mesh, posterior = mesh_of(2, 4), posterior_of(forward_dtype=jnp.bfloat16)
    engine = engine_on(mesh, posterior, num_chains=2)
    state, _, _ = engine.described()
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    lowered = engine.lower().as_text()
    gathers = [line for line in lowered.splitlines() if "all_gather" in line]
    assert gathers
    assert all("bf16" in line or "i32" in line for line in gathers)


def test_weights_that_are_in_their_places_are_not_copied(posterior):
    """Kills: a second copy of w* beside the caller's."""
    mesh = mesh_of(2, 4)
    first = engine_on(mesh, posterior).problem
    placed = jax.tree.unflatten(jax.tree.structure(posterior.center), first.center)
    again = engine_on(mesh, dataclasses.replace(posterior, center=placed)).problem
    for a, b in zip(first.center, again.center, strict=True):
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert x.data.unsafe_buffer_pointer() == y.data.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("shape", "parts", "dimension"),
    [
        ((4, 32, 2, 16), 4, 1),  # the width, not the layers
        ((4, 32, 128), 4, 2), ((4, 128, 32), 4, 1), ((4, 64, 64), 2, 2),
        ((61, 32), 4, 1), ((1024, 3), 4, 0), ((61, 33), 4, None), ((4, 3, 3), 2, None), ((32, 128), 1, None),
    ],
)  # fmt: skip
def test_where_arrays_are_cut(shape, parts, dimension):
    """Kills: a cut between layers where another dimension would do; small arrays that are split."""
    assert split_dimension(shape, parts) == dimension


def test_what_is_not_split_is_said(posterior):
    """Kills: an axis that does nothing, in silence."""
    with pytest.raises(ValueError, match=r"axis 'model' of 7 devices splits none of the 7 arrays .* \(4, 128, 32\)"):
        engine_on(mesh_of(1, 7), posterior, num_chains=1)
    odd = {"w": jnp.ones((32, 40)), "v": jnp.ones((37, 31))}
    odd_posterior = slt.LocalPosterior(lambda p, x: x[:, 0] * jnp.sum(p["w"]) * jnp.sum(p["v"]), odd, 64, 30.0, 1.0)
    engine = engine_on(mesh_of(2, 4), odd_posterior, batch_size=6, num_chains=2)
    whole, examples = engine.problem.notes
    assert "'v' (37, 31), which have no dimension that 4 divides" in whole
    assert examples.startswith("6 examples")


def test_the_callers_own_placement_stays(posterior):
    mesh = mesh_of(2, 4)
    center = jax.tree.map(lambda x: x, posterior.center)
    own = NamedSharding(mesh, PartitionSpec("model"))
    center["blocks"]["mlp"]["up"] = jax.device_put(center["blocks"]["mlp"]["up"], own)
    engine = engine_on(mesh, dataclasses.replace(posterior, center=center))
    up = posterior.free_names.index("blocks/mlp/up")
    assert engine.problem.center[up].sharding.spec[0] == "model"
