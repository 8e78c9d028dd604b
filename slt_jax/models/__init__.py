"""A decoder-only transformer, which loads the checkpoints of the architectures in ``layouts``."""

from slt_jax.models.config import DecoderConfig, RopeScaling
from slt_jax.models.decoder import Decoder, sequence_loss

__all__ = ["Decoder", "DecoderConfig", "RopeScaling", "sequence_loss"]
