"""Models that slt-jax brings: one small decoder-only transformer."""

from slt_jax.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
