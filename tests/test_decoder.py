"""The decoder: what it may see, what it loses, and how it comes back from disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.decoder import causal_attention
from slt_jax.models.hub import load_decoder, save_decoder

CONFIG = DecoderConfig(vocab_size=37, context_length=12, width=24, num_layers=2, num_heads=3)
TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, 37)


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    scale = jax.tree.map(lambda x: x * 8, nnx.state(decoder))  # far from uniform, so that a wrong target shows
    nnx.update(decoder, scale)
    return decoder


def test_the_future_is_not_seen(model):
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 37)
    before, after = model(TOKENS), model(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 0).all()


@pytest.mark.quick
def test_losses_against_numpy(model):
    """Kills: targets off by one, a sum for a mean, the last position counted."""
    logits = np.asarray(model(TOKENS), np.float64)[:, :-1]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(model.losses(TOKENS), -np.log(chosen).mean(1), rtol=1e-5)


def test_loss_and_gradient_equal_the_plain_ones(model):
    graphdef, params = nnx.split(model)
    own, own_grad = jax.value_and_grad(lambda p: nnx.merge(graphdef, p).losses(TOKENS).mean())(params)
    plain, plain_grad = jax.value_and_grad(lambda p: slt.next_token_loss(nnx.merge(graphdef, p), TOKENS).mean())(params)
    np.testing.assert_allclose(own, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(own_grad), jax.tree.leaves(plain_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [37, -1, 10_000])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_an_id_outside_the_vocabulary_spoils_its_sequence_alone(model, bad, place):
    losses = np.asarray(model.losses(TOKENS.at[2, place].set(bad)))
    assert np.isnan(losses[2])
    np.testing.assert_allclose(np.delete(losses, 2), np.delete(model.losses(TOKENS), 2), rtol=1e-6)


def test_bfloat16_weights_give_float32_losses(model):
    half = nnx.clone(model)
    nnx.update(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(half)))
    losses = half.losses(TOKENS)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, model.losses(TOKENS), rtol=0.1)


def test_attention_is_jax_own():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 3, 8))
    np.testing.assert_allclose(
        causal_attention(q, k, v), jax.nn.dot_product_attention(q, k, v, is_causal=True), rtol=1e-5, atol=1e-6
    )


def test_a_sequence_past_the_context_is_refused(model):
    with pytest.raises(ValueError, match="13 tokens do not fit context_length = 12"):
        model.losses(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [("width", 25, "num_heads = 3 does not divide width = 25"), ("num_layers", 0, "num_layers must be .* got 0")],
)
def test_a_shape_that_cannot_be_is_refused(field, value, text):
    with pytest.raises(ValueError, match=text):
        DecoderConfig(**{**CONFIG.to_dict(), field: value})


@pytest.mark.quick
def test_disk_gives_back_the_same_model(model, tmp_path):
    save_decoder(tmp_path / "ck", model, {"step": 7})
    loaded, record = load_decoder(tmp_path / "ck")
    assert record["step"] == 7
    np.testing.assert_array_equal(loaded.losses(TOKENS), model.losses(TOKENS))


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"decoder": {"vocab_size": 3}}', '{"decoder": {"width": "wide"}}', "[]"])
def test_a_foreign_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is truncated or foreign"):
        load_decoder(tmp_path)


def test_weights_of_another_shape_are_refused(model, tmp_path):
    save_decoder(tmp_path / "ck", model)
    config = tmp_path / "ck" / "config.json"
    record = json.loads(config.read_text())
    record["decoder"]["width"] = 48
    config.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not match its config"):
        load_decoder(tmp_path / "ck")


def test_truncated_weights_are_refused(model, tmp_path):
    save_decoder(tmp_path / "ck", model)
    files = [p for p in (tmp_path / "ck" / "params").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert files
    with pytest.raises(ValueError, match="params is truncated"):
        load_decoder(tmp_path / "ck")
