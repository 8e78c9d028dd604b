"""A decoder-only transformer, which loads GPT-2, GPT-NeoX, Llama and Qwen checkpoints."""

from slt_jax.models.config import DecoderConfig, RopeScaling
from slt_jax.models.decoder import Decoder

__all__ = ["Decoder", "DecoderConfig", "RopeScaling"]
