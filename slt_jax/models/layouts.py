"""Hugging Face's architectures: the decoder that a ``config.json`` describes, and the tensor of each parameter."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from slt_jax.models import architectures as arch
from slt_jax.models import sources
from slt_jax.models.config import DecoderConfig
from slt_jax.models.fields import Fields
from slt_jax.models.sources import Source


class Layout(NamedTuple):
    """One architecture.

    ``prefix``: before the names of all tensors but the head's, in some files. ``buffers``: pattern of tensors in older
    files that are not parameters.
    """

    prefix: str
    to_config: Callable[[Fields], DecoderConfig]
    sources: dict[str, Source]
    head_names: tuple[str, ...] = ("lm_head.weight",)
    buffers: str = "$^"

    def is_buffer(self, name: str) -> bool:
        return re.fullmatch(self.buffers, name) is not None


def read_config(record: dict[str, Any], where: str) -> tuple[Layout, DecoderConfig]:
    """The architecture and the decoder that a ``config.json`` describes.

    Raises:
        ValueError: an architecture or a field that is not known, is missing, or changes the mathematics; the message
            names it.
    """
    kind, fields = record.get("model_type"), Fields(record)
    if kind not in LAYOUTS:
        named = f"{kind!r} (architectures {record.get('architectures')})"
        raise ValueError(f"{where}: model_type {named} is not known. Known: {', '.join(LAYOUTS)}. {OTHERWISE}")
    try:
        config = LAYOUTS[kind].to_config(fields)
        fields.check_rest()
    except KeyError as error:
        raise ValueError(f"{where}: a {kind} needs the field {error}, which is missing.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error} {OTHERWISE}") from error
    return LAYOUTS[kind], config


OTHERWISE = (
    "Other models of transformers run through torch: --backend torch, or slt_jax.from_torch (pip install "
    "'slt-jax[torch]')."
)


_MASKS, _ROTATIONS = "(bias|masked_bias)", r"rotary_emb\.inv_freq"
_HEAD, _MODEL_BUFFERS = ("lm_head.weight",), rf"layers\.\d+\.self_attn\.{_ROTATIONS}"


def _like_llama(to_config: Callable[[Fields], DecoderConfig], tensors: dict[str, Source] = sources.LLAMA) -> Layout:
    return Layout("model.", to_config, tensors, _HEAD, _MODEL_BUFFERS)


LAYOUTS = {
    "gpt2": Layout("transformer.", arch.gpt2, sources.GPT2, _HEAD, rf"h\.\d+\.attn\.{_MASKS}"),
    "gpt_neo": Layout("transformer.", arch.gpt_neo, sources.GPT_NEO, _HEAD, rf"h\.\d+\.attn\.attention\.{_MASKS}"),
    "gptj": Layout("transformer.", arch.gptj, sources.GPTJ, _HEAD, rf"h\.\d+\.attn\.({_MASKS}|embed_positions)"),
    "gpt_neox": Layout(
        "gpt_neox.", arch.neox, sources.NEOX, ("embed_out.weight", "lm_head.weight"),
        rf"layers\.\d+\.attention\.({_MASKS}|{_ROTATIONS})",
    ),
    "opt": Layout("model.decoder.", arch.opt, sources.OPT),
    "falcon": Layout("transformer.", arch.falcon, sources.FALCON, _HEAD, rf"h\.\d+\.self_attention\.{_ROTATIONS}"),
    "llama": _like_llama(arch.llama),
    "mistral": _like_llama(arch.mistral),
    "qwen2": _like_llama(arch.qwen2),
    "qwen3": _like_llama(arch.qwen3),
    "olmo": _like_llama(arch.olmo),
    "olmo2": _like_llama(arch.olmo2, sources.SANDWICH),
    "olmo3": _like_llama(arch.olmo3, sources.SANDWICH),
    "gemma": _like_llama(arch.gemma),
    "gemma2": _like_llama(arch.gemma2, sources.SANDWICH),
    "gemma3_text": _like_llama(arch.gemma3, sources.SANDWICH),
    "phi": _like_llama(arch.phi, sources.PHI),
    "phi3": _like_llama(arch.phi3, sources.PHI3),
    "granite": _like_llama(arch.granite),
    "smollm3": _like_llama(arch.smollm3),
    "stablelm": _like_llama(arch.stablelm),
    "starcoder2": _like_llama(arch.starcoder2, sources.STARCODER2),
    "cohere": _like_llama(arch.cohere),
}  # fmt: skip
