"""The two pieces of work that speed is measured on; the same for every library compared.

deep linear: y = W3 W2 W1 x, each W 50 x 50 Gaussian / sqrt(50); x ~ N(0, 1), 5000 examples, unit label noise;
loss 0.5 |error|^2, batch 500, nbeta 5000 / log(5000), step_size 1e-4, localization 1, started at the teacher.

GPT: vocabulary 5000, context 128, width 192, 4 layers, 4 heads, 2.76M weights, head tied; 512 sequences of a bigram
chain, 20 Adam steps first; batch 8, nbeta 30, step_size 1e-5, localization 100.

One step is one minibatch gradient and one SGLD update of one chain.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.hub import load_decoder, save_decoder

GPT = DecoderConfig(5000, 128, 192, 4, 4)
GPT2_SMALL = DecoderConfig(50257, 1024, 768, 12, 12)


class Work(NamedTuple):
    """What ``estimate_llc`` needs; ``flops`` are those of the matrix products of one step."""

    posterior: slt.LocalPosterior
    data: Any
    step_size: float
    batch_size: int
    num_chains: int
    num_draws: int
    num_warmup: int
    flops: float


def deep_linear() -> Work:
    """8 chains x (200 + 200) steps."""
    keys = jax.random.split(jax.random.key(0), 5)
    num, width, batch = 5000, 50, 500
    teacher = [jax.random.normal(k, (width, width)) / math.sqrt(width) for k in keys[:3]]

    def output(weights, x):
        return x @ weights[0] @ weights[1] @ weights[2]

    def loss_fn(weights, xy):
        return 0.5 * jnp.sum((output(weights, xy[0]) - xy[1]) ** 2, axis=-1)

    x = jax.random.normal(keys[3], (num, width))
    y = output(teacher, x) + jax.random.normal(keys[4], (num, width))
    posterior = slt.LocalPosterior(loss_fn, teacher, num_data=num, localization=1.0)
    # three products forward, three for the weights' gradients, two for the layers' inputs
    return Work(posterior, (x, y), 1e-4, batch, 8, 200, 200, 8 * 2 * batch * width**2)


def bigram_sequences(num: int, config: DecoderConfig) -> np.ndarray:
    """Sequences in which each token has four possible successors, int32 ``(num, context_length)``."""
    rng = np.random.default_rng(1)
    successors = rng.integers(0, config.vocab_size, (config.vocab_size, 4))
    tokens = np.empty((num, config.context_length), np.int32)
    tokens[:, 0] = rng.integers(0, config.vocab_size, num)
    for t in range(1, config.context_length):
        tokens[:, t] = successors[tokens[:, t - 1], rng.integers(0, 4, num)]
    return tokens


def train_gpt(folder: Path) -> None:
    """20 Adam steps from scratch; the model goes to ``folder``."""
    data, batch = bigram_sequences(512, GPT), 8
    model = Decoder(GPT, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, tokens):
        optimizer.update(model, nnx.grad(lambda m: m.losses(tokens).mean())(model))

    rng = np.random.default_rng(0)
    for _ in range(20):
        update(model, optimizer, jnp.asarray(data[rng.integers(0, 512, batch)]))
    save_decoder(folder, model)


def gpt(folder: Path) -> Work:
    """4 chains x 25 steps around ``train_gpt``'s weights: no minimum, so this measures speed and not an LLC."""
    model, _ = load_decoder(folder)
    params, loss_fn = slt.from_nnx(model, lambda m, tokens: m.losses(tokens))
    posterior = slt.LocalPosterior(loss_fn, params, num_data=512, nbeta=30.0, localization=100.0)
    return Work(posterior, bigram_sequences(512, GPT), 1e-5, 8, 4, 25, 0, decoder_flops(GPT, 8))


def gpt2_small() -> Work:
    """GPT-2 small's shape (124M weights), random weights, 2 chains x 3 steps of one sequence of 256 tokens."""
    model = Decoder(GPT2_SMALL, rngs=nnx.Rngs(0))
    data = np.random.default_rng(0).integers(0, GPT2_SMALL.vocab_size, (64, 256)).astype(np.int32)
    params, loss_fn = slt.from_nnx(model, lambda m, tokens: m.losses(tokens))
    posterior = slt.LocalPosterior(loss_fn, params, num_data=64, nbeta=30.0, localization=300.0)
    return Work(posterior, data, 1e-7, 1, 2, 3, 0, decoder_flops(GPT2_SMALL, 1, 256))


def decoder_flops(config: DecoderConfig, batch: int, length: int | None = None) -> float:
    """Floating-point operations of the matrix products in one loss and gradient (backward counted twice forward)."""
    length = config.context_length if length is None else length
    tokens, width = batch * length, config.width
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens * length * width
    head = 2 * batch * (length - 1) * config.vocab_size * width
    return 3.0 * (config.num_layers * block + head)


def run(work: Work, *, num_draws: int | None = None, **options: Any) -> slt.LLCResult:
    """One call of ``estimate_llc`` on this work."""
    return slt.estimate_llc(
        work.posterior, work.data, sampler=slt.sgld(work.step_size), num_chains=work.num_chains,
        num_draws=num_draws or work.num_draws, num_warmup=work.num_warmup, batch_size=work.batch_size, **options,
    )  # fmt: skip
