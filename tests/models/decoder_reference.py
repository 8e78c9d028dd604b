"""The decoder in float64 NumPy, head by head with complex rotations; its weights as other people's files have them."""

import math

import numpy as np

ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(x, p, config, kind=None):
    if (kind or config.norm) == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * (p["scale"] + config.norm_offset if "scale" in p else 1) + p.get("bias", 0)


def rotated(x, config, theta):
    """One head's ``(T, head_width)``: number i and its partner half a rotary width on are one complex number."""
    half = config.rotary_width // 2
    frequencies = theta ** (-2 * np.arange(half) / config.rotary_width)
    turn = np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    order = np.arange(2 * half)  # the components as (first of every pair, second of every pair)
    if config.rotary_pairs == "neighbours":
        order = order.reshape(half, 2).T.ravel()
    a, b = x[:, order[:half]], x[:, order[half:]]
    z, out = (a + 1j * b) * turn, x.copy()
    out[:, order[:half]], out[:, order[half:]] = z.real, z.imag
    return out


def joint_norm(heads, p, config):
    """One norm over all heads ``(T, head_width)`` of a token, side by side."""
    return np.split(norm(np.concatenate(heads, 1), p, config, "rms"), len(heads), axis=1)


def attention(x, p, config, layer):
    """One sequence ``(T, width)``, one head after the other."""
    window = config.windows[layer] if config.windows else 0
    local = window and config.local_rope_theta is not None
    all_heads = {
        name: [x @ p[name][:, h] + (p[f"{name}_bias"][h] if config.qkv_bias else 0) for h in range(p[name].shape[1])]
        for name in "qkv"
    }
    if config.joint_qk_norm:
        all_heads |= {name: joint_norm(all_heads[name], p[f"{name}_norm"], config) for name in "qk"}
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q, k, v = all_heads["q"][head], all_heads["k"][shared], all_heads["v"][shared]
        if config.qk_norm and not config.joint_qk_norm:
            q, k = (norm(y, p[name], config, "rms") for y, name in ((q, "q_norm"), (k, "k_norm")))
        if config.positions == "rotary" and layer not in config.unrotated_layers:
            q, k = (rotated(y, config, config.local_rope_theta if local else config.rope_theta) for y in (q, k))
        scores = q @ k.T * (config.attention_scale or 1 / math.sqrt(config.head_width))
        scores /= layer + 1 if config.scale_by_layer else 1
        scores = capped(scores, config.attention_softcap)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        if window:
            scores[np.tril_indices(len(x), -window)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += weights / weights.sum(-1, keepdims=True) @ v @ p["o"][head]
    return out + (p["o_bias"] if config.out_bias else 0)


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def mlp(x, p, config):
    act, bias = ACTIVATIONS[config.activation], {name: p.get(f"{name}_bias", 0) for name in ("up", "gate", "down")}
    inner = x @ p["up"] + bias["up"]
    inner = act(x @ p["gate"] + bias["gate"]) * inner if config.gated_mlp else act(inner)
    return inner @ p["down"] + bias["down"]


def take_layer(tree, layer):
    return {k: take_layer(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()}


def as_float64(tree):
    return {k: as_float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def logits(params, config, tokens):
    """``(m, T, vocab_size)`` from a decoder's parameters (a nested dict)."""
    params = as_float64(params)
    return np.stack([_one(params, config, np.asarray(row)) for row in tokens])


def _one(params, config, row):
    x = params["embedding"]["tokens"][row] * config.embedding_scale
    if config.positions == "learned":
        x = x + params["embedding"]["positions"][: len(row)]
    for layer in range(config.num_layers):
        p = take_layer(params["blocks"], layer)

        def through(name, y, p=p):
            unused = "before" if name.startswith("post") else "after"
            return y if config.norm_placement == unused else norm(y, p.get(name, {}), config)

        mixed = attention(through("norm1", x), p["attention"], config, layer)
        mixed = x + config.residual_scale * through("post_norm1", mixed)
        read = through("norm1" if config.shared_norm else "norm2", x if config.parallel_residual else mixed)
        x = mixed + config.residual_scale * through("post_norm2", mlp(read, p["mlp"], config))
    x = norm(x, params.get("norm", {}), config) * config.logit_scale
    head = params["embedding"]["tokens"] if config.tied_head else params["head"]
    return capped(x @ head.T + params.get("head_bias", 0), config.logit_softcap)


def gpt2_tensors(params, config):
    """The names and shapes of a real GPT-2 file: no prefix, the causal mask among the tensors."""
    width, tensors = config.width, {"wte.weight": params["embedding"]["tokens"]}
    tensors["wpe.weight"] = params["embedding"]["positions"]
    tensors |= {"ln_f.weight": params["norm"]["scale"], "ln_f.bias": params["norm"]["bias"]}
    for i in range(config.num_layers):
        p = take_layer(params["blocks"], i)
        a, m, own = p["attention"], p["mlp"], {}
        own["attn.c_attn.weight"] = np.concatenate([a[x].reshape(width, width) for x in "qkv"], 1)
        own["attn.c_attn.bias"] = np.concatenate([a[f"{x}_bias"].reshape(-1) for x in "qkv"])
        own |= {"attn.c_proj.weight": a["o"].reshape(width, width), "attn.c_proj.bias": a["o_bias"]}
        own |= {"mlp.c_fc.weight": m["up"], "mlp.c_fc.bias": m["up_bias"]}
        own |= {"mlp.c_proj.weight": m["down"], "mlp.c_proj.bias": m["down_bias"]}
        for n in "12":
            own |= {f"ln_{n}.weight": p[f"norm{n}"]["scale"], f"ln_{n}.bias": p[f"norm{n}"]["bias"]}
        own["attn.bias"] = np.tril(np.ones((1, 1, config.context_length, config.context_length), np.float32))
        own["attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors |= {f"h.{i}.{name}": value for name, value in own.items()}
    return tensors


def neox_tensors(params, config):
    """Those of a real Pythia file: each head's query, key and value rows together, masks and frequencies too."""
    width, tensors = config.width, {"gpt_neox.embed_in.weight": params["embedding"]["tokens"]}
    tensors["embed_out.weight"] = params["head"]
    tensors |= {f"gpt_neox.final_layer_norm.{n}": params["norm"][s] for n, s in (("weight", "scale"), ("bias", "bias"))}
    for i in range(config.num_layers):
        p = take_layer(params["blocks"], i)
        a, m, own = p["attention"], p["mlp"], {}
        rows = [a[x][:, head].T for head in range(config.num_heads) for x in "qkv"]
        own["attention.query_key_value.weight"] = np.concatenate(rows)
        biases = [a[f"{x}_bias"][head] for head in range(config.num_heads) for x in "qkv"]
        own["attention.query_key_value.bias"] = np.concatenate(biases)
        own |= {"attention.dense.weight": a["o"].reshape(-1, width).T, "attention.dense.bias": a["o_bias"]}
        own |= {"mlp.dense_h_to_4h.weight": m["up"].T, "mlp.dense_h_to_4h.bias": m["up_bias"]}
        own |= {"mlp.dense_4h_to_h.weight": m["down"].T, "mlp.dense_4h_to_h.bias": m["down_bias"]}
        for n, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            own |= {f"{name}.weight": p[n]["scale"], f"{name}.bias": p[n]["bias"]}
        own["attention.rotary_emb.inv_freq"] = np.ones(config.rotary_width // 2, np.float32)
        own["attention.bias"] = np.ones((1, 1, config.context_length, config.context_length), bool)
        own["attention.masked_bias"] = np.array(-1e9, np.float32)
        tensors |= {f"gpt_neox.layers.{i}.{name}": value for name, value in own.items()}
    return tensors


def llama_tensors(params, config):
    """Those of a Llama, Qwen2 or Qwen3 file; a tied head repeated, as some files do."""
    width, tensors = config.width, {"model.embed_tokens.weight": params["embedding"]["tokens"]}
    tensors["lm_head.weight"] = params["embedding"]["tokens"] if config.tied_head else params["head"]
    tensors["model.norm.weight"] = params["norm"]["scale"]
    for i in range(config.num_layers):
        p = take_layer(params["blocks"], i)
        a, own = p["attention"], {}
        own |= {f"self_attn.{x}_proj.weight": a[x].reshape(width, -1).T for x in "qkv"}
        own |= {f"self_attn.{x}_proj.bias": a[f"{x}_bias"].reshape(-1) for x in "qkv" if config.qkv_bias}
        own |= {f"self_attn.{x}_norm.weight": a[f"{x}_norm"]["scale"] for x in "qk" if config.qk_norm}
        own["self_attn.o_proj.weight"] = a["o"].reshape(-1, width).T
        own |= {f"mlp.{x}_proj.weight": p["mlp"][x].T for x in ("up", "gate", "down")}
        own |= {"input_layernorm.weight": p["norm1"]["scale"], "post_attention_layernorm.weight": p["norm2"]["scale"]}
        tensors |= {f"model.layers.{i}.{name}": value for name, value in own.items()}
    return tensors


def phi3_tensors(params, config):
    """As Llama's, with queries, keys and values in one tensor, and both inner layers of the MLP in another."""
    tensors = llama_tensors(params, config)
    for i in range(config.num_layers):
        for fused, names in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            block, _ = fused.split(".")
            parts = [tensors.pop(f"model.layers.{i}.{block}.{name}_proj.weight") for name in names]
            tensors[f"model.layers.{i}.{fused}_proj.weight"] = np.concatenate(parts)
    return tensors
