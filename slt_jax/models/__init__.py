"""Models that slt-jax brings: one small decoder-only transformer."""

from slt_jax.models.config import DecoderConfig, RopeScaling
from slt_jax.models.decoder import Decoder

__all__ = ["Decoder", "DecoderConfig", "RopeScaling"]
