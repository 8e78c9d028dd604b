"""The tensor of each parameter in the files of Hugging Face's architectures."""

from typing import NamedTuple


class Source(NamedTuple):
    """Where a parameter is: the name of a tensor, with ``{}`` for the layer, and the axes of each of its dimensions.

    ``width (3 heads head_width)`` has two dimensions, the second of which contains queries, keys and values one after
    the other, each with all its heads. ``part`` is the index of the parameter among the three. Where the parts differ
    in size, ``blocks`` has the axes of each along the first dimension.
    """

    name: str
    axes: str
    part: int = 0
    blocks: tuple[str, ...] = ()


Sources = dict[str, Source]


def _norm(path: str, name: str) -> Sources:
    return {f"{path}/scale": Source(f"{name}.weight", "width"), f"{path}/bias": Source(f"{name}.bias", "width")}


def _linear(path: str, name: str, out: str, into: str) -> Sources:
    return {path: Source(f"{name}.weight", f"{out} {into}"), f"{path}_bias": Source(f"{name}.bias", out)}


def _separate(name: str, letters: str = "{}_proj") -> Sources:
    """Queries, keys and values from a tensor each."""
    sources: Sources = {}
    for letter, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        projection = f"{name}.{letters.format(letter)}"
        sources |= _linear(f"blocks/attention/{letter}", projection, f"({heads} head_width)", "width")
    return sources


def _fused(name: str, axes: str, bias_axes: str) -> Sources:
    """Queries, keys and values from one tensor with 3 equal parts."""
    sources: Sources = {}
    for part, letter in enumerate("qkv"):
        for suffix, kind, kind_axes in (("", "weight", axes), ("_bias", "bias", bias_axes)):
            part_axes = kind_axes if letter == "q" else kind_axes.replace("heads", "kv_heads")
            sources[f"blocks/attention/{letter}{suffix}"] = Source(f"{name}.{kind}", part_axes, part)
    return sources


def _stacked(name: str) -> Sources:
    """Queries, keys and values one below the other in one tensor, the queries with more heads."""
    blocks = ("heads head_width", "kv_heads head_width", "kv_heads head_width")
    sources: Sources = {}
    for part, letter in enumerate("qkv"):
        sources[f"blocks/attention/{letter}"] = Source(f"{name}.weight", f"({blocks[part]}) width", part, blocks)
        sources[f"blocks/attention/{letter}_bias"] = Source(f"{name}.bias", f"({blocks[part]})", part, blocks)
    return sources


def _head(name: str) -> Sources:
    return {"head": Source(f"{name}.weight", "vocab width"), "head_bias": Source(f"{name}.bias", "vocab")}


GPT2 = {
    "embedding/tokens": Source("wte.weight", "vocab width"),
    "embedding/positions": Source("wpe.weight", "context width"),
    **_norm("blocks/norm1", "h.{}.ln_1"),
    **_fused("h.{}.attn.c_attn", "width (3 heads head_width)", "(3 heads head_width)"),
    "blocks/attention/o": Source("h.{}.attn.c_proj.weight", "(heads head_width) width"),
    "blocks/attention/o_bias": Source("h.{}.attn.c_proj.bias", "width"),
    **_norm("blocks/norm2", "h.{}.ln_2"),
    "blocks/mlp/up": Source("h.{}.mlp.c_fc.weight", "width mlp"),
    "blocks/mlp/up_bias": Source("h.{}.mlp.c_fc.bias", "mlp"),
    "blocks/mlp/down": Source("h.{}.mlp.c_proj.weight", "mlp width"),
    "blocks/mlp/down_bias": Source("h.{}.mlp.c_proj.bias", "width"),
    **_norm("norm", "ln_f"),
    **_head("lm_head"),
}

GPT_NEO = {
    **GPT2,
    **_separate("h.{}.attn.attention"),
    **_linear("blocks/attention/o", "h.{}.attn.attention.out_proj", "width", "(heads head_width)"),
    **_linear("blocks/mlp/up", "h.{}.mlp.c_fc", "mlp", "width"),
    **_linear("blocks/mlp/down", "h.{}.mlp.c_proj", "width", "mlp"),
}

GPTJ = {
    **GPT2,
    **_separate("h.{}.attn"),
    **_linear("blocks/attention/o", "h.{}.attn.out_proj", "width", "(heads head_width)"),
    **_linear("blocks/mlp/up", "h.{}.mlp.fc_in", "mlp", "width"),
    **_linear("blocks/mlp/down", "h.{}.mlp.fc_out", "width", "mlp"),
}

NEOX = {
    "embedding/tokens": Source("embed_in.weight", "vocab width"),
    **_norm("blocks/norm1", "layers.{}.input_layernorm"),
    **_fused("layers.{}.attention.query_key_value", "(heads 3 head_width) width", "(heads 3 head_width)"),
    **_linear("blocks/attention/o", "layers.{}.attention.dense", "width", "(heads head_width)"),
    **_norm("blocks/norm2", "layers.{}.post_attention_layernorm"),
    **_linear("blocks/mlp/up", "layers.{}.mlp.dense_h_to_4h", "mlp", "width"),
    **_linear("blocks/mlp/down", "layers.{}.mlp.dense_4h_to_h", "width", "mlp"),
    **_norm("norm", "final_layer_norm"),
    **_head("embed_out"),
}

FALCON = {
    "embedding/tokens": Source("word_embeddings.weight", "vocab width"),
    **_norm("blocks/norm1", "h.{}.input_layernorm"),
    **_stacked("h.{}.self_attention.query_key_value"),
    **_linear("blocks/attention/o", "h.{}.self_attention.dense", "width", "(heads head_width)"),
    **_norm("blocks/norm2", "h.{}.post_attention_layernorm"),
    **_linear("blocks/mlp/up", "h.{}.mlp.dense_h_to_4h", "mlp", "width"),
    **_linear("blocks/mlp/down", "h.{}.mlp.dense_4h_to_h", "width", "mlp"),
    **_norm("norm", "ln_f"),
    **_head("lm_head"),
}

LLAMA = {
    "embedding/tokens": Source("embed_tokens.weight", "vocab width"),
    **_norm("blocks/norm1", "layers.{}.input_layernorm"),
    **_separate("layers.{}.self_attn"),
    **_linear("blocks/attention/o", "layers.{}.self_attn.o_proj", "width", "(heads head_width)"),
    "blocks/attention/q_norm/scale": Source("layers.{}.self_attn.q_norm.weight", "q_norm"),
    "blocks/attention/k_norm/scale": Source("layers.{}.self_attn.k_norm.weight", "k_norm"),
    **_norm("blocks/norm2", "layers.{}.post_attention_layernorm"),
    **_linear("blocks/mlp/up", "layers.{}.mlp.up_proj", "mlp", "width"),
    **_linear("blocks/mlp/gate", "layers.{}.mlp.gate_proj", "mlp", "width"),
    **_linear("blocks/mlp/down", "layers.{}.mlp.down_proj", "width", "mlp"),
    **_norm("norm", "norm"),
    **_head("lm_head"),
}

# Gemma 2 and 3 have norms before and after; OLMo 2 and 3 only those after.
SANDWICH = {
    **LLAMA,
    **_norm("blocks/post_norm1", "layers.{}.post_attention_layernorm"),
    **_norm("blocks/norm2", "layers.{}.pre_feedforward_layernorm"),
    **_norm("blocks/post_norm2", "layers.{}.post_feedforward_layernorm"),
}

PHI = {
    **LLAMA,
    **_linear("blocks/attention/o", "layers.{}.self_attn.dense", "width", "(heads head_width)"),
    **_linear("blocks/mlp/up", "layers.{}.mlp.fc1", "mlp", "width"),
    **_linear("blocks/mlp/down", "layers.{}.mlp.fc2", "width", "mlp"),
    **_norm("norm", "final_layernorm"),
}

PHI3 = {
    **LLAMA,
    **_stacked("layers.{}.self_attn.qkv_proj"),
    "blocks/mlp/gate": Source("layers.{}.mlp.gate_up_proj.weight", "(2 mlp) width", 0),
    "blocks/mlp/up": Source("layers.{}.mlp.gate_up_proj.weight", "(2 mlp) width", 1),
}

STARCODER2 = {
    **LLAMA,
    **_linear("blocks/mlp/up", "layers.{}.mlp.c_fc", "mlp", "width"),
    **_linear("blocks/mlp/down", "layers.{}.mlp.c_proj", "width", "mlp"),
}

# The positions of OPT begin at the third row.
OPT = {
    "embedding/tokens": Source("embed_tokens.weight", "vocab width"),
    "embedding/positions": Source("embed_positions.weight", "context width", 1, ("2", "context")),
    **_norm("blocks/norm1", "layers.{}.self_attn_layer_norm"),
    **_separate("layers.{}.self_attn"),
    **_linear("blocks/attention/o", "layers.{}.self_attn.out_proj", "width", "(heads head_width)"),
    **_norm("blocks/norm2", "layers.{}.final_layer_norm"),
    **_linear("blocks/mlp/up", "layers.{}.fc1", "mlp", "width"),
    **_linear("blocks/mlp/down", "layers.{}.fc2", "width", "mlp"),
    **_norm("norm", "final_layer_norm"),
    **_head("lm_head"),
}
