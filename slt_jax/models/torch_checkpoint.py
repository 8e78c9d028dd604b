"""Checkpoints of layouts that the reader does not know, through transformers and torch."""

import importlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from slt_jax.models.hub import name_and_revision
from slt_jax.models.losses import mean_of_first
from slt_jax.posterior.flax import next_token_loss
from slt_jax.posterior.pytorch import Forward, LossFn, from_torch

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


class TorchCheckpoint(NamedTuple):
    """Weights and next-token loss of a language model, and the limits of its data (None where it names none)."""

    params: PyTree
    loss_fn: LossFn
    vocab_size: int | None
    context_length: int | None


def load_torch_checkpoint(path: str | os.PathLike, *, revision: str | None = None) -> TorchCheckpoint:
    """A causal language model that ``transformers`` reads, from a folder or the Hugging Face Hub.

    Raises:
        ImportError: torch, torchax or transformers is not installed.
        FileNotFoundError, ValueError: transformers cannot load it. Code that comes with a checkpoint is not run.
    """
    try:
        auto = importlib.import_module("transformers").AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("--backend torch needs the extra: pip install 'slt-jax[torch]'.") from error
    name, revision = name_and_revision(path, revision)
    try:
        model: Any = auto.from_pretrained(name, revision=revision or "main", dtype="float32")
    except OSError as error:
        raise FileNotFoundError(f"transformers cannot load {os.fspath(path)!r}: {str(error).strip()[:300]}") from error
    params, loss_fn = from_torch(model, sequence_losses)
    lengths = (getattr(model.config, field, None) for field in _CONTEXT_FIELDS)
    context = next((length for length in lengths if isinstance(length, int) and length > 0), None)
    return TorchCheckpoint(params, loss_fn, getattr(model.config, "vocab_size", None), context)


def sequence_losses(forward: Forward, batch: PyTree) -> Array:
    """``next_token_loss``; of ``{"tokens", "count"}``, over the first ``count`` tokens of each row."""
    if not isinstance(batch, Mapping):
        return next_token_loss(forward, batch)
    tokens, count = jnp.asarray(batch["tokens"]), jnp.asarray(batch["count"])
    logits = forward(tokens)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return mean_of_first(jax.nn.logsumexp(logits, axis=-1) - chosen, count)
