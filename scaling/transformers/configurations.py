"""Tiny configurations of every layout, on which the gauge formula is compared with the numerical rank."""

import dataclasses
from typing import Any

from scaling.transformers.gauge import Config
from scaling.transformers.networks import AttentionConfig, MLPConfig
from slt_jax.models import DecoderConfig

NO_EPSILON = 1e-30  # of a norm: as good as none
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
_LLAMA = {
    **_NO_BIAS, "norm": "rms", "positions": "rotary", "activation": "silu", "gated_mlp": True, "rope_theta": 10.0,
    "tied_head": False,
}  # fmt: skip
_GEMMA = {**_LLAMA, "tied_head": True, "norm_placement": "around", "activation": "gelu_tanh"}


def tiny(vocab_size: int = 9, context_length: int = 5, width: int = 4, num_layers: int = 1, num_heads: int = 2,
         mlp_width: int = 5, **given: Any) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(vocab_size, context_length, width, num_layers, num_heads, mlp_width=mlp_width, **given)


DECODERS: dict[str, DecoderConfig] = {
    "layernorm": tiny(tied_head=False),
    "layernorm, 2 layers": tiny(num_layers=2, tied_head=False),
    "layernorm, width 6": tiny(width=6, mlp_width=8, tied_head=False),
    "layernorm, relu": tiny(activation="relu", tied_head=False),
    "layernorm, gelu": tiny(activation="gelu", tied_head=False),
    "layernorm, head bias": tiny(head_bias=True, tied_head=False),
    "layernorm, no reader's bias": tiny(qkv_bias=False, mlp_bias=False, tied_head=False),
    "layernorm, no bias but its own": tiny(**_NO_BIAS, tied_head=False),
    "layernorm, no bias at all": tiny(**_NO_BIAS, norm_bias=False, tied_head=False),
    "layernorm, no bias of the norm": tiny(norm_bias=False, tied_head=False),
    "layernorm, no bias of the output": tiny(out_bias=False, tied_head=False),
    "layernorm, no bias of the output, one narrow head": tiny(
        out_bias=False, num_heads=1, head_width=2, tied_head=False
    ),
    "layernorm, no gain": tiny(norm_scale=False, tied_head=False),
    "layernorm, one wide head": tiny(num_heads=1, head_width=6, tied_head=False),
    "layernorm, rotary": tiny(positions="rotary", rope_theta=10.0, tied_head=False),
    "layernorm, partly rotary": tiny(positions="rotary", rope_theta=10.0, num_heads=1, rotary_width=2, tied_head=False),
    "layernorm, parallel": tiny(parallel_residual=True, tied_head=False),
    "layernorm, parallel, shared norm": tiny(parallel_residual=True, shared_norm=True, tied_head=False),
    "layernorm, parallel, 2 layers": tiny(parallel_residual=True, num_layers=2, tied_head=False),
    "layernorm, parallel, no output bias": tiny(parallel_residual=True, out_bias=False, tied_head=False),
    "layernorm, parallel, no MLP bias": tiny(parallel_residual=True, mlp_bias=False, tied_head=False),
    "layernorm, parallel, rotary": tiny(
        vocab_size=40, mlp_width=4, parallel_residual=True, positions="rotary", rope_theta=10.0, tied_head=False
    ),
    "layernorm tied": tiny(),
    "layernorm tied, 2 layers": tiny(num_layers=2),
    "layernorm tied, head bias": tiny(head_bias=True),
    "layernorm tied, rotary": tiny(positions="rotary", rope_theta=10.0),
    "layernorm tied, no bias at all": tiny(**_NO_BIAS, norm_bias=False),
    "layernorm tied, softcap": tiny(logit_softcap=3.0),
    "layernorm tied, parallel": tiny(parallel_residual=True),
    "layernorm, softcaps": tiny(logit_softcap=3.0, attention_softcap=2.0, tied_head=False),
    "layernorm, softcap on scores, one wide head": tiny(
        attention_softcap=2.0, num_heads=1, head_width=6, tied_head=False
    ),
    "layernorm, parallel, no output bias, one narrow head": tiny(
        parallel_residual=True, out_bias=False, num_heads=1, head_width=2, tied_head=False
    ),
    "rms, query-key norm without gain, learned positions": tiny(
        **{**_LLAMA, "positions": "learned"}, num_heads=1, qk_norm=True, norm_scale=False
    ),
    "rms rotary, query-key norm without gain": tiny(**_LLAMA, qk_norm=True, norm_scale=False),
    "layernorm, grouped queries": tiny(width=8, num_heads=4, num_kv_heads=2, vocab_size=11, tied_head=False),
    "layernorm, norms around": tiny(norm_placement="around", tied_head=False),
    "rms, learned positions": tiny(**{**_LLAMA, "positions": "learned"}),
    "rms, relu": tiny(**{**_LLAMA, "activation": "relu", "gated_mlp": False}),
    "rms, relu gate": tiny(**{**_LLAMA, "activation": "relu"}),
    "rms rotary": tiny(**_LLAMA),
    "rms rotary, 2 layers": tiny(**_LLAMA, num_layers=2),
    "rms rotary, head width 4": tiny(**_LLAMA, num_heads=1),
    "rms rotary, grouped queries": tiny(**_LLAMA, num_kv_heads=1),
    "rms rotary, grouped queries, 4 heads": tiny(**_LLAMA, width=8, vocab_size=11, num_heads=4, num_kv_heads=2),
    "rms rotary, query biases": tiny(**{**_LLAMA, "qkv_bias": True}),
    "rms rotary, all biases": tiny(**{**_LLAMA, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "rms rotary, partly": tiny(**_LLAMA, num_heads=1, rotary_width=2),
    "rms rotary, one layer without": tiny(**_LLAMA, num_layers=2, unrotated_layers=(1,)),
    "rms rotary, offset": tiny(**_LLAMA, norm_offset=1.0),
    "rms rotary, no gain": tiny(**_LLAMA, norm_scale=False),
    "rms rotary tied": tiny(**{**_LLAMA, "tied_head": True}),
    "rms rotary tied, 2 layers, grouped": tiny(**{**_LLAMA, "tied_head": True}, num_layers=2, num_kv_heads=1),
    "rms tied, learned positions": tiny(**{**_LLAMA, "tied_head": True, "positions": "learned"}),
    "rms tied, learned positions, softcap": tiny(
        **{**_LLAMA, "tied_head": True, "positions": "learned"}, logit_softcap=3.0
    ),
    "rms rotary, query-key norm": tiny(**_LLAMA, qk_norm=True),
    "rms rotary, query-key norm, head width 4": tiny(**_LLAMA, num_heads=1, qk_norm=True),
    "rms rotary, joint query-key norm, grouped": tiny(**_LLAMA, qk_norm=True, joint_qk_norm=True, num_kv_heads=1),
    "rms, query-key norm, learned positions": tiny(**{**_LLAMA, "positions": "learned"}, num_heads=1, qk_norm=True),
    "norms around": tiny(**_GEMMA),
    "norms around, untied": tiny(**{**_GEMMA, "tied_head": False}),
    "norms around, softcaps": tiny(**_GEMMA, logit_softcap=3.0, attention_softcap=2.0),
    "norms around, 2 layers, query-key norm": tiny(**_GEMMA, num_layers=2, qk_norm=True),
    "norms after": tiny(**_LLAMA, norm_placement="after"),
    "norms after, 2 layers, joint query-key norm": tiny(
        **_LLAMA, norm_placement="after", num_layers=2, qk_norm=True, joint_qk_norm=True
    ),
}
OTHERS: dict[str, Config] = {
    "mlp tanh": MLPConfig((4, 5, 6, 3)),
    "mlp tanh, no biases": MLPConfig((4, 5, 6, 3), biases=False),
    "mlp gelu": MLPConfig((4, 6, 3), "gelu_tanh"),
    "mlp relu": MLPConfig((4, 5, 6, 3), "relu"),
    "mlp relu, no biases": MLPConfig((4, 6, 3), "relu", biases=False),
    "attention": AttentionConfig(9, 5, 4, 2, 2),
    "attention, one head": AttentionConfig(9, 5, 4, 1, 3),
}
_WITHOUT = (
    "layernorm", "layernorm, parallel", "layernorm tied", "layernorm, norms around", "rms rotary", "rms rotary tied",
    "rms rotary, query-key norm", "rms rotary, joint query-key norm, grouped", "norms around",
    "norms after, 2 layers, joint query-key norm",
)  # fmt: skip
CONFIGURATIONS: dict[str, tuple[Config, bool]] = {  # name -> (configuration, whether norms have an epsilon)
    **{name: (dataclasses.replace(config, norm_epsilon=1e-2), True) for name, config in DECODERS.items()},
    **{name: (config, True) for name, config in OTHERS.items()},
    **{
        f"{name}, no epsilon": (dataclasses.replace(DECODERS[name], norm_epsilon=NO_EPSILON), False)
        for name in _WITHOUT
    },
}
