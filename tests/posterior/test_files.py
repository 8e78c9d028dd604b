"""Token ids that no model or file can hold: refused, or the chain that meets one is stopped and named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.engine.loop import chunk_indices
from slt_jax.models import Decoder, DecoderConfig
from tests.small import estimate, refuses

# Token ids past the vocabulary

VOCABULARY = 11
TOKEN_PLAN = {"num_chains": 4, "num_draws": 30, "num_warmup": 5, "batch_size": 2, "key": 6}  # one: it compiles once


@functools.cache
def decoder():
    return Decoder(DecoderConfig(VOCABULARY, 6, 8, 1, 2), rngs=nnx.Rngs(0))


def tokens_with(bad, rows=slice(None)):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (64, 6)).astype(np.int32)
    tokens[rows, -1] = bad
    return tokens


TOKEN_LOSSES = {"next_token_loss": slt.next_token_loss, "Decoder.losses": lambda model, tokens: model.losses(tokens)}


@functools.cache
def token_posterior(loss):
    params, loss_fn = slt.from_nnx(decoder(), TOKEN_LOSSES[loss])
    return slt.LocalPosterior(loss_fn, params, 64)


@pytest.mark.parametrize("bad", [VOCABULARY, 10**6, -1])
@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_token_ids_past_the_vocabulary(loss, bad):
    """Kills: a gather that clips to the last row, and estimates the LLC of other data."""
    words = ("the loss at w* is nan", "are all token ids inside the model's vocabulary?")
    refuses(FloatingPointError, lambda: estimate(token_posterior(loss), tokens_with(bad), **TOKEN_PLAN), *words)
    last = estimate(token_posterior(loss), tokens_with(VOCABULARY - 1), **TOKEN_PLAN)
    assert np.isfinite(last.loss_trace).all()


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_a_token_id_past_the_vocabulary_in_a_later_batch_stops_the_chain(loss):
    """The step at which row 40 is first drawn, from the index stream. Kills: an estimate without that row."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(6), jnp.arange(4))
    drawn = (np.asarray(chunk_indices(keys, 0, 35, 64, 2)) == 40).any(-1)
    expected = {chain: int(np.argmax(hit)) for chain, hit in enumerate(drawn) if hit.any()}
    assert expected
    assert min(expected.values()) > 0
    result = estimate(token_posterior(loss), tokens_with(VOCABULARY, 40), **TOKEN_PLAN)
    assert result.stopped == expected
    assert result.verdict == "diverged"
    chain, step = next(iter(expected.items()))
    assert f"chain {chain} at step {step}" in str(result)
    assert np.isfinite(result.llc) == (len(expected) < 4)


def test_token_file_with_a_vocabulary(tmp_path):
    np.save(tmp_path / "t.npy", tokens_with(VOCABULARY, 40).reshape(-1))
    words = (f"token id {VOCABULARY} at position {40 * 6 + 5}", "t.npy", "vocabulary of 11", "right tokenizer")
    refuses(ValueError, lambda: slt.token_file(tmp_path / "t.npy", 6, vocab_size=VOCABULARY), *words)


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.quick
def test_tokens_of_a_wrong_kind():
    target = token_posterior("next_token_loss")
    for bad in (tokens_with(0).astype(np.float32), tokens_with(0)[:, 0], tokens_with(0)[:, :1]):
        refuses(ValueError, lambda bad=bad: estimate(target, bad), "tokens must be whole numbers of shape (m, T)")
