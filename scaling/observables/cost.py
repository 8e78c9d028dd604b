"""What observing costs: the time that it adds to a run, beside that of the forward passes alone.

A decoder (2 layers, 437,760 weights), 4 chains, and the losses of all tokens of 64 examples at each draw, kept as
values or as moments. Each run is made twice, and the second one, which compiles nothing, is timed, in CPU seconds of
the process. The forward passes alone are a compiled loop over the same weights and examples.

    python -m scaling.observables.cost --out scaling/observables/results/cost.json
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import slt_jax as slt
from slt_jax.machine import versions
from slt_jax.models import Decoder, DecoderConfig, sequence_loss

EXAMPLES, LENGTH, BATCH, CHAINS = 64, 64, 16, 4


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of the second of two calls."""
    call()
    begun = time.process_time()
    call()
    return time.process_time() - begun


def forward_alone(loss: Callable, params: Any, probe: np.ndarray, draws: int) -> Callable[[], Any]:
    """The losses of the probe at slightly changed weights, as many times as all chains draw, in blocks of a batch."""
    blocks = jnp.asarray(probe.reshape(-1, BATCH, LENGTH))

    @jax.jit
    def run(params: Any, blocks: jax.Array) -> jax.Array:
        def draw(carry: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
            moved = jax.tree.map(lambda w: w * (1 + 1e-6 * k), params)
            return carry + jax.lax.map(lambda block: loss(moved, block), blocks), None

        start = jnp.zeros((len(blocks), BATCH, LENGTH - 1))
        return jax.lax.scan(draw, start, jnp.arange(draws, dtype=jnp.float32))[0]

    return lambda: run(params, blocks).block_until_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=50)
    args = parser.parse_args()
    model = Decoder(DecoderConfig(256, LENGTH, 128, 2, 4), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (512, LENGTH)).astype(np.int32)
    params, loss_fn = slt.from_nnx(model, sequence_loss)
    posterior = slt.LocalPosterior(loss_fn, params, len(tokens), nbeta=30.0, localization=300.0)
    graph, state = nnx.split(model)
    by_token = lambda p, batch: nnx.merge(graph, p).token_losses(batch)[0]  # noqa: E731

    def estimate(observe: Any) -> Callable[[], Any]:
        return lambda: slt.estimate_llc(
            posterior, tokens, sampler=slt.sgld(1e-5), num_chains=CHAINS, num_draws=args.draws, num_warmup=0,
            batch_size=BATCH, observe=observe,
        )  # fmt: skip

    probe = tokens[:EXAMPLES]
    seconds = {"forward passes alone": timed(forward_alone(by_token, state, probe, CHAINS * args.draws))}
    seconds["nothing observed"] = timed(estimate(None))
    for keep in ("values", "moments"):
        observable = slt.Observable(probe, level="token", keep=keep)
        seconds[keep] = timed(estimate({"probe": observable}))
    ratios = {
        keep: (seconds[keep] - seconds["nothing observed"]) / seconds["forward passes alone"]
        for keep in ("values", "moments")
    }
    found = {"ratios": ratios, "cpu_seconds": seconds, "draws": CHAINS * args.draws, "examples": EXAMPLES,
             "cores": len(os.sched_getaffinity(0)), "versions": versions()}  # fmt: skip
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
