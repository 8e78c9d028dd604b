"""The decoder: its mathematics in every layout, what it may see, what it loses, what it keeps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig, RopeScaling, losses
from slt_jax.models.attention import causal_attention, device_attention, rotary_frequencies, rotary_table, rotate
from tests.models import decoder_reference as reference

CONFIG = DecoderConfig(vocab_size=37, context_length=12, width=24, num_layers=2, num_heads=3)
TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, 37)
NEOX = dataclasses.replace(
    CONFIG, num_heads=2, num_kv_heads=2, head_width=12, positions="rotary", rotary_width=4, activation="gelu",
    parallel_residual=True, tied_head=False, norm_epsilon=0.1,
)  # fmt: skip
LLAMA = DecoderConfig(
    37, 12, 24, 2, 6, norm_epsilon=0.03, num_kv_heads=2, mlp_width=20, positions="rotary", rope_theta=100.0, norm="rms",
    activation="silu", gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False,
)  # fmt: skip
LAYOUTS = {
    "gpt2": CONFIG,
    "gpt2 without scale": dataclasses.replace(CONFIG, attention_scale=1.0, norm_epsilon=0.05, activation="relu"),
    "neox": NEOX,
    "neox sequential": dataclasses.replace(NEOX, parallel_residual=False),
    "llama": LLAMA,
    "llama with all biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tied_head=False),
    "qwen3": dataclasses.replace(LLAMA, head_width=6, rotary_width=6, qk_norm=True),
    "phi3": dataclasses.replace(LLAMA, windows=(5, 5)),
    "gpt2 scaled by layer": dataclasses.replace(CONFIG, scale_by_layer=True),
    "gpt-neo": dataclasses.replace(CONFIG, windows=(0, 3), attention_scale=1.0, qkv_bias=False),
    "gptj": dataclasses.replace(NEOX, rotary_pairs="neighbours", shared_norm=True, head_bias=True),
    "olmo": dataclasses.replace(LLAMA, norm="layer", norm_scale=False, norm_bias=False),
    "olmo3": dataclasses.replace(
        LLAMA, norm_placement="after", qk_norm=True, joint_qk_norm=True, windows=(4, 0), local_rope_theta=100.0
    ),
    "gemma3": dataclasses.replace(
        LLAMA, norm_placement="around", norm_offset=1.0, qk_norm=True, windows=(4, 0), local_rope_theta=7.0,
        embedding_scale=4.9,
    ),
    "gemma2": dataclasses.replace(
        LLAMA, norm_placement="around", norm_offset=1.0, windows=(0, 4), attention_softcap=2.0, logit_softcap=9.0,
    ),
    "granite": dataclasses.replace(LLAMA, embedding_scale=3.0, residual_scale=0.4, logit_scale=2.0),
    "smollm3": dataclasses.replace(LLAMA, unrotated_layers=(1,)),
}  # fmt: skip


def random_decoder(config, seed=0):
    """Every parameter random, biases and norms too, and far from a uniform guess."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1 if "scale" in jax.tree_util.keystr(path) else 0
        return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@nnx.jit
def logits_of(decoder, tokens=TOKENS):
    return decoder(tokens)


@nnx.jit
def losses_of(decoder, tokens=TOKENS):
    return decoder.losses(tokens)


def params_of(decoder):
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


@pytest.fixture(scope="module")
def model():
    return random_decoder(CONFIG)


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_against_numpy(layout):
    """Kills: a rotation the other way, heads that read another's keys, a norm's epsilon or mean, the other GELU,
    the MLP reading the wrong residual, a bias forgotten, a scale forgotten, layers in another order; a window one token
    too wide, or of the other layer; a softcap or a scale left out or at another place; a norm before for one after."""
    decoder = random_decoder(LAYOUTS[layout])
    want = reference.logits(params_of(decoder), LAYOUTS[layout], TOKENS)
    np.testing.assert_allclose(logits_of(decoder), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_a_quarter_turn_by_hand():
    """Position 1 at one radian per token turns (1, 0) to (cos 1, sin 1); the third and fourth number stay."""
    config = DecoderConfig(5, 4, 4, 1, 1, positions="rotary", rotary_width=2)
    x = jnp.array([1.0, 0.0, 7.0, 9.0])[None, None, None].repeat(2, axis=1)
    turned = rotate(x, rotary_table(config, 2))[0, :, 0]
    np.testing.assert_allclose(turned, [[1, 0, 7, 9], [math.cos(1), math.sin(1), 7, 9]], rtol=1e-6)


def test_scaled_frequencies_by_hand():
    """Linear: all slower. llama3: long wavelengths slower, short ones untouched, a blend between."""
    linear = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(rotary_frequencies(linear), rotary_frequencies(LLAMA) / 4, rtol=1e-12)
    base = DecoderConfig(5, 4, 6, 1, 1, positions="rotary", rope_theta=1000.0)
    scaled = dataclasses.replace(base, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 100))
    # frequencies 1, 0.1, 0.01 make 15.9, 1.59 and 0.159 turns in 100 tokens
    share = (100 * 0.1 / (2 * math.pi) - 1) / 3
    want = [1.0, 0.1 * (share + (1 - share) / 8), 0.01 / 8]
    np.testing.assert_allclose(rotary_frequencies(scaled), want, rtol=1e-12)


def test_the_future_is_not_seen(model):
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 37)
    before, after = logits_of(model), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("config", [CONFIG, NEOX], ids=["tied", "untied"])
def test_losses_against_numpy(config):
    """Kills: targets off by one, a sum for a mean, the last position counted, the embedding for the head."""
    decoder = random_decoder(config)
    logits = np.asarray(logits_of(decoder), np.float64)[:, :-1]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses_of(decoder), -np.log(chosen).mean(1), rtol=1e-5)


def test_loss_and_gradient_equal_the_plain_ones(model):
    """Also kills: a gradient that depends on what a block keeps."""

    def gradient(loss, keep):
        graphdef, params = nnx.split(random_decoder(dataclasses.replace(CONFIG, keep=keep)))
        return jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p), TOKENS).mean()))(params)

    plain, plain_grad = gradient(slt.next_token_loss, "all")
    for keep in ("products", "input"):
        own, own_grad = gradient(Decoder.losses, keep)
        np.testing.assert_allclose(own, plain, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(own_grad), jax.tree.leaves(plain_grad), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_a_block_keeps():
    def size(keep):
        graphdef, params = nnx.split(random_decoder(dataclasses.replace(NEOX, keep=keep)))
        kept = jax.eval_shape(lambda p: jax.vjp(lambda q: nnx.merge(graphdef, q).losses(TOKENS).mean(), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(kept))

    assert size("all") > size("products") > size("input")


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        graphdef, params = nnx.split(random_decoder(dataclasses.replace(CONFIG, num_layers=num_layers)))
        gradient = jax.grad(lambda p: nnx.merge(graphdef, p).losses(TOKENS).mean())
        return jax.jit(gradient).lower(params).as_text().count("\n")

    assert lines(2) == lines(12)


@pytest.mark.parametrize("bad", [37, -1, 10_000])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_an_id_outside_the_vocabulary_spoils_its_sequence_alone(model, bad, place):
    losses = np.asarray(losses_of(model, TOKENS.at[2, place].set(bad)))
    assert np.isnan(losses[2])
    np.testing.assert_allclose(np.delete(losses, 2), np.delete(losses_of(model), 2), rtol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, LAYOUTS["qwen3"]], ids=["gpt2", "qwen3"])
def test_bfloat16_weights_give_float32_losses(config):
    model = random_decoder(config)
    half = nnx.clone(model)
    nnx.update(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(half)))
    assert jax.eval_shape(half.hidden, TOKENS).dtype == jnp.bfloat16
    losses = losses_of(half)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, losses_of(model), rtol=0.05)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_attention_is_jax_own(kv_heads):
    q = jax.random.normal(jax.random.key(0), (2, 10, 6, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 10, kv_heads, 8))
    jax_own = jax.jit(functools.partial(jax.nn.dot_product_attention, scale=0.2, is_causal=True))(q, k, v)
    own = jax.jit(functools.partial(causal_attention, scale=0.2))(q, k, v)
    np.testing.assert_allclose(own, jax_own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_device_without_cudnn_takes_the_plain_kernel(dtype, window):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8), dtype)
    window = None if window is None else jnp.asarray(window)
    own = jax.jit(functools.partial(device_attention, scale=0.2))(q, k, v, window)
    want = causal_attention(q, k, v, 0.2, window)
    rounding = 1e-5 if dtype == jnp.float32 else 2**-6  # bfloat16 has 8 bits, and values up to about 2
    np.testing.assert_allclose(own.astype(jnp.float32), want.astype(jnp.float32), rtol=rounding, atol=2 * rounding)


def test_parameters_have_their_names_and_axes():
    shapes = {"/".join(path): x.shape for path, x in nnx.to_flat_state(nnx.state(random_decoder(LAYOUTS["qwen3"])))}
    assert shapes == {
        "embedding/tokens": (37, 24), "norm/scale": (24,), "blocks/norm1/scale": (2, 24), "blocks/norm2/scale": (2, 24),
        "blocks/attention/q": (2, 24, 6, 6), "blocks/attention/k": (2, 24, 2, 6), "blocks/attention/v": (2, 24, 2, 6),
        "blocks/attention/o": (2, 6, 6, 24), "blocks/attention/q_norm/scale": (2, 6),
        "blocks/attention/k_norm/scale": (2, 6), "blocks/mlp/up": (2, 24, 20), "blocks/mlp/gate": (2, 24, 20),
        "blocks/mlp/down": (2, 20, 24),
    }  # fmt: skip


def test_a_sequence_past_the_context_is_refused(model):
    with pytest.raises(ValueError, match="13 tokens do not fit context_length = 12"):
        model.losses(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("num_layers", 0, "num_layers must be .* got 0"),
        ("num_kv_heads", 2, "num_kv_heads = 2 does not divide num_heads = 3"),
        ("activation", "tanh", "activation must be one of .* got 'tanh'"),
        ("norm", "batch", "norm must be one of layer, rms, got 'batch'"),
        ("keep", "some", "keep must be one of"),
        ("norm_epsilon", 0.0, "norm_epsilon must be"),
        ("rope_theta", -1.0, "rope_theta must be"),
        ("mlp_width", 0, "mlp_width must be"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(field, value, text):
    with pytest.raises(ValueError, match=text):
        DecoderConfig(**{**CONFIG.to_dict(), field: value})


def test_shapes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="num_heads = 3 does not divide width = 25"):
        DecoderConfig(37, 12, 25, 2, 3)
    for wrong in (3, 10):
        with pytest.raises(ValueError, match=f"rotary_width must be even and at most head_width = 8, got {wrong}"):
            DecoderConfig(37, 12, 24, 2, 3, positions="rotary", rotary_width=wrong)
    with pytest.raises(ValueError, match="low_frequency_factor = 4"):
        RopeScaling("llama3", 8.0, 4.0, 1.0)
    with pytest.raises(ValueError, match="kind must be one of linear, llama3, got 'yarn'"):
        RopeScaling("yarn", 8.0)  # pyright: ignore


@pytest.mark.parametrize("more", [{}, {"head_bias": True}, {"head_bias": True, "logit_softcap": 2.0}])
def test_losses_do_not_depend_on_how_the_logits_are_made(more, monkeypatch):
    """All at once, or some rows at a time as for a large vocabulary."""
    model = random_decoder(DecoderConfig(31, 8, 12, 2, 4, **more))
    params, loss_fn = slt.from_nnx(model, lambda m, tokens: m.losses(tokens))
    tokens = np.random.default_rng(0).integers(0, 31, (5, 8)).astype(np.int32)
    tokens[2, 3] = 31
    # a new function each time: jit would keep the first program
    run = lambda rows: jax.jit(jax.value_and_grad(lambda p: loss_fn(p, rows).mean()))(params)  # noqa: E731
    plain, whole = run(tokens[:2]), jax.jit(lambda p: loss_fn(p, tokens))(params)
    monkeypatch.setattr(losses, "MANY_LOGITS", 0)
    for a, b in zip(*map(jax.tree.leaves, (run(tokens[:2]), plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda p: loss_fn(p, tokens))(params), whole, rtol=1e-5)
    assert np.flatnonzero(np.isnan(whole)).tolist() == [2]


@pytest.mark.parametrize(("sequences", "held"), [(1, True), (8, False)])
def test_many_logits_are_never_held_together(sequences, held):
    """Traced, not run: 1024 tokens of a vocabulary of 4096 at once, eight times as many in parts."""
    params, loss_fn = slt.from_nnx(
        Decoder(DecoderConfig(4096, 1025, 4, 1, 1), rngs=nnx.Rngs(0)), lambda m, tokens: m.losses(tokens)
    )
    tokens = jax.ShapeDtypeStruct((sequences, 1025), jnp.int32)
    program = str(jax.make_jaxpr(jax.grad(lambda p, x: loss_fn(p, x).mean()))(params, tokens))
    assert (f"f32[{sequences * 1024},4096]" in program) == held
