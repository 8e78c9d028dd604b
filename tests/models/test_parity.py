"""Logits, losses and gradient norms equal those of transformers, from the files that it writes itself.

Skipped without torch and transformers.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slt_jax.models.decoder import ACTIVATIONS
from slt_jax.models.fields import ACTIVATION_NAMES
from slt_jax.models.hub import load_pretrained

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")

# Warnings of the other library are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 1e-2}
GPT2 = {
    "vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0,
    "layer_norm_epsilon": 1e-2,
}  # fmt: skip
NEOX = {**SHAPE, "hidden_size": 64, "layer_norm_eps": 1e-2}


def rope(kind="default", theta=100.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


PAD = {"pad_token_id": 0}
NEO = {
    **{name: SHAPE[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings")}, "num_layers": 3,
    "num_heads": 4, "layer_norm_epsilon": 1e-2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPTJ = {**GPT2, "n_positions": 24}
FALCON = {**SHAPE, "layer_norm_epsilon": 1e-2}
OPT = {**SHAPE, **PAD, "ffn_dim": 31}
FULL = ["full_attention"]
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 n_inner, unscaled, exact gelu": (
        "GPT2", {**GPT2, "n_inner": 30, "scale_attn_weights": False, "activation_function": "gelu"}
    ),
    "gpt2 untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "neox parallel, a quarter rotary": ("GPTNeoX", {**NEOX, **rope(partial_rotary_factor=0.25)}),
    "neox sequential, a quarter rotary": (
        "GPTNeoX", {**NEOX, **rope(partial_rotary_factor=0.25), "use_parallel_residual": False}
    ),
    "neox whole rotary, tied, no bias": (
        "GPTNeoX", {**NEOX, **rope(partial_rotary_factor=1.0), "tie_word_embeddings": True, "attention_bias": False}
    ),
    "llama tied": ("Llama", {**GROUPED, **rope(), "tie_word_embeddings": True}),
    "llama untied": ("Llama", {**GROUPED, **rope(), "tie_word_embeddings": False}),
    "llama biases, wide heads": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama linear rope": ("Llama", {**GROUPED, **rope("linear", factor=3.0)}),
    "llama llama3 rope": ("Llama", {**GROUPED, **LLAMA3}),
    "qwen2": ("Qwen2", {**GROUPED, **rope(theta=1000.0)}),
    "qwen3": ("Qwen3", {**GROUPED, **rope(), "head_dim": 10}),
    "qwen3 tied, biases": ("Qwen3", {**GROUPED, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2 scaled by layer": ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "qwen2 windows from layer 1 on": (
        "Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3 windows by layer types": (
        "Qwen3",
        {**GROUPED, "head_dim": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral, a window": ("Mistral", {**GROUPED, **rope(), "sliding_window": 5}),
    "mistral tied, no window, wide heads": (
        "Mistral", {**GROUPED, **rope(theta=1e4), "sliding_window": None, "head_dim": 10, "tie_word_embeddings": True}
    ),
    "gpt neo": ("GPTNeo", {**NEO, "attention_types": [[["global", "local", "global"], 1]], "window_size": 4}),
    "gpt neo untied, narrow, local only": (
        "GPTNeo",
        {**NEO, "attention_types": [[["local"], 3]], "window_size": 7, "intermediate_size": 31,
         "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "gptj": ("GPTJ", {**GPTJ, "rotary_dim": 4}),
    "gptj tied, other width": ("GPTJ", {**GPTJ, "rotary_dim": 6, "n_inner": 31, "tie_word_embeddings": True}),
    "olmo": ("Olmo", {**SHAPE, **rope()}),
    "olmo tied, grouped, biases": (
        "Olmo", {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "olmo2": ("Olmo2", {**GROUPED, **rope()}),
    "olmo2 tied, biases": ("Olmo2", {**GROUPED, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo3, windows": ("Olmo3", {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + FULL}),
    "olmo3 tied, default layers": ("Olmo3", {**GROUPED, "sliding_window": 3, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**GROUPED, **rope(), "head_dim": 6}),
    "gemma untied, biases, wide heads": (
        "Gemma", {**GROUPED, "head_dim": 10, "attention_bias": True, "tie_word_embeddings": False}
    ),
    "gemma2, softcaps that bite": (
        "Gemma2",
        {**GROUPED, **rope(), "head_dim": 10, "sliding_window": 5, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 9.0, "query_pre_attn_scalar": 3},
    ),
    "gemma2 untied, no softcaps": (
        "Gemma2",
        {**GROUPED, "head_dim": 6, "sliding_window": 4, "attn_logit_softcapping": None, "attention_bias": True,
         "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma3, both rotations": ("Gemma3Text", {**GROUPED, **GEMMA3_ROPE, "head_dim": 6, "sliding_window": 5}),
    "gemma3 untied, softcaps": (
        "Gemma3Text",
        {**GROUPED, "head_dim": 10, "sliding_window": 4, "final_logit_softcapping": 8.0, "tie_word_embeddings": False,
         "query_pre_attn_scalar": 5, "attention_bias": True,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "phi": ("Phi", {**SHAPE, **rope(partial_rotary_factor=0.7)}),
    "phi grouped, whole rotary": ("Phi", {**SHAPE, "num_key_value_heads": 2, **rope(partial_rotary_factor=1.0)}),
    "phi3 grouped, a window": ("Phi3", {**GROUPED, **PAD, **rope(partial_rotary_factor=1.0), "sliding_window": 5}),
    "phi3 tied, partly rotary": (
        "Phi3", {**SHAPE, **PAD, **rope(partial_rotary_factor=0.7), "tie_word_embeddings": True}
    ),
    "granite": (
        "Granite",
        {**GROUPED, **rope(), "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
         "logits_scaling": 0.5},
    ),
    "granite tied, biases": (
        "Granite",
        {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "logits_scaling": 2.0},
    ),
    "smollm3, a layer without positions": ("SmolLM3", {**GROUPED, **PAD, "no_rope_layers": [1, 0, 1]}),
    "smollm3 untied, windows, biases": (
        "SmolLM3",
        {**GROUPED, **PAD, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "stablelm": ("StableLm", {**SHAPE, **rope(partial_rotary_factor=0.4), "num_key_value_heads": 2}),
    "stablelm parallel, biases, tied": (
        "StableLm",
        {**SHAPE, **rope(partial_rotary_factor=1.0), "use_parallel_residual": True, "use_qkv_bias": True,
         "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "falcon": ("Falcon", {**FALCON, **rope()}),
    "falcon untied, sequential, biases": (
        "Falcon", {**FALCON, "parallel_attn": False, "bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 31}
    ),
    "starcoder2": ("Starcoder2", {**SHAPE, **rope(), "num_key_value_heads": 2, "norm_epsilon": 1e-2}),
    "starcoder2 untied, no biases, a window": (
        "Starcoder2",
        {**SHAPE, "num_key_value_heads": 1, "use_bias": False, "sliding_window": 5, "tie_word_embeddings": False},
    ),
    "cohere": (
        "Cohere", {**SHAPE, **PAD, **rope(), "num_key_value_heads": 2, "layer_norm_eps": 1e-2, "logit_scale": 0.6}
    ),
    "cohere untied, biases": (
        "Cohere", {**SHAPE, **PAD, "attention_bias": True, "logit_scale": 0.7, "tie_word_embeddings": False}
    ),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 24}),
    "opt untied, no biases, gelu": (
        "OPT",
        {**OPT, "word_embed_proj_dim": 24, "enable_bias": False, "activation_function": "gelu",
         "tie_word_embeddings": False},
    ),
}  # fmt: skip


def randomized(case):
    """A model of the other library with every parameter random: biases and norms too."""
    family, options = CASES[case]
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@functools.lru_cache
def tokens():
    """Without 0 to 2, which may be padding: its row of the embedding has no gradient in torch."""
    return np.random.default_rng(0).integers(3, 61, (3, 24)).astype(np.int32)


def wanted(model):
    """(logits, loss of each sequence, norm of the gradient of their mean) from the other library."""
    model.zero_grad()
    ids = torch.tensor(tokens(), dtype=torch.long)
    logits = model(ids).logits
    assert np.ptp(logits.detach().numpy()) > 3  # else zeros would agree with anything
    rows = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    losses = rows.mean(1)
    losses.mean().backward()
    squares = [float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None]
    return logits.detach().numpy(), losses.detach().numpy(), np.sqrt(sum(squares))


@nnx.jit
def own(decoder, ids):
    graphdef, state = nnx.split(decoder)

    def mean_loss(state):
        losses = nnx.merge(graphdef, state).losses(ids)
        return losses.mean(), losses

    (_, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state)
    squares = [jnp.sum(x**2) for x in jax.tree.leaves(gradient)]
    return decoder(ids), losses, jnp.sqrt(sum(squares))


def relative_difference(model, folder):
    """The largest of logits, losses and gradient norm, each relative to its own largest value."""
    decoder, _ = load_pretrained(folder)
    pairs = zip(own(decoder, tokens()), wanted(model), strict=True)
    return max(np.abs(np.asarray(got) - want).max() / np.abs(want).max() for got, want in pairs)


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_gradients(case, tmp_path):
    model = randomized(case)
    model.save_pretrained(tmp_path)
    difference = relative_difference(model, tmp_path)
    print(f"{case}: {difference:.1e}")
    assert difference < 2e-5


@pytest.mark.parametrize("case", ["gpt2", "neox sequential, a quarter rotary", "llama tied", "qwen3"])
def test_logits_from_several_files(case, tmp_path):
    model = randomized(case)
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert relative_difference(model, tmp_path) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_become_float32(dtype, tmp_path):
    randomized("llama untied").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    # Read again: .float() would leave rounded rotary frequencies behind.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_difference(model, tmp_path) < 1e-5
    decoder, record = load_pretrained(tmp_path)
    assert record["dtype"] == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(decoder))} == {"float32"}


def test_a_base_model_without_its_prefix(tmp_path):
    model = randomized("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert relative_difference(model, tmp_path) < 1e-5


def test_activation_names():
    from transformers.activations import ACT2FN

    x = np.linspace(-4, 4, 101, dtype=np.float32)
    for name, own in ACTIVATION_NAMES.items():
        want = ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(ACTIVATIONS[own](x), want, rtol=1e-5, atol=1e-6, err_msg=name)


OLD = {
    "neox parallel, a quarter rotary": {"rotary_pct": 0.25, "rotary_emb_base": 100},
    "llama llama3 rope": {
        "rope_theta": 100.0,
        "rope_scaling": {k: v for k, v in LLAMA3["rope_parameters"].items() if k != "rope_theta"},
    },
}


@pytest.mark.parametrize("case", OLD)
def test_old_spellings_mean_the_same(case, tmp_path):
    """Pythia's and Llama 3's config.json were written by older versions, with other fields."""
    randomized(case).save_pretrained(tmp_path)
    new, record = load_pretrained(tmp_path)
    del record["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**record, **OLD[case]}))
    assert load_pretrained(tmp_path)[0].config == new.config
