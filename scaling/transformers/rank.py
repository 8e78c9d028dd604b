"""The numerical rank of a network's Jacobian, in float64, with the gap between what counts and what is rounding.

python -m scaling.transformers.rank --out scaling/transformers/results/rank.json

All of ``configurations.py``; those that are in the file are not computed again.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from scaling.transformers import carried
from scaling.transformers.configurations import CONFIGURATIONS
from scaling.transformers.gauge import Config, gauge_dimension
from scaling.transformers.teachers import draw_weights, make_inputs
from slt_jax.machine import versions
from slt_jax.models import Decoder, DecoderConfig

_AT_ONCE = 64  # directions of a Jacobian that are computed together


class Rank(NamedTuple):
    """rank: singular values up to the widest gap. counted, rounding: the two around it, relative to the largest."""

    rank: int
    counted: float
    rounding: float

    @property
    def gap(self) -> float:
        """Orders of magnitude."""
        return float(np.log10(self.counted / max(self.rounding, 1e-300)))


def forward(config: Config):
    """``(weights, inputs) -> logits`` of the network itself: a decoder is that of ``slt_jax.models``."""
    if not isinstance(config, DecoderConfig):
        return lambda weights, inputs: (
            carried.logits(config, weights, jax.tree.map(jnp.zeros_like, weights), inputs).base
        )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def run(weights: Any, tokens: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, weights)
        return nnx.merge(graphdef, own)(tokens)

    return run


def jacobian(config: Config, weights: Any, inputs: np.ndarray) -> np.ndarray:
    """d (logits minus their mean over the vocabulary) / d weights, float64 ``(outputs, d)``."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), weights))
        wide = inputs.astype(np.float64) if np.issubdtype(inputs.dtype, np.floating) else inputs
        run = forward(config)

        def centered(w: jax.Array) -> jax.Array:
            logits = run(unravel(w), jnp.asarray(wide))
            return (logits - jnp.mean(logits, axis=-1, keepdims=True)).reshape(-1)

        columns = jax.jit(jax.vmap(lambda direction: jax.jvp(centered, (flat,), (direction,))[1]))
        directions = np.eye(-(-flat.size // _AT_ONCE) * _AT_ONCE, flat.size)
        parts = [np.asarray(columns(part)) for part in np.split(directions, len(directions) // _AT_ONCE)]
        return np.concatenate(parts)[: flat.size].T


def rank_of(values: np.ndarray) -> Rank:
    """Of singular values, largest first: the widest gap among those below 1e-3 of the largest and above 1e-18 of it.

    A matrix of full rank has none: the end of the list counts as one, at the rounding 1e-16.
    """
    relative = np.append(values / values[0], 1e-16) if values[-1] > 1e-13 * values[0] else values / values[0]
    relative = np.maximum(relative, 1e-18)
    steps = np.log10(relative[:-1] / relative[1:])
    steps[relative[1:] > 1e-9] = 0
    at = int(np.argmax(steps)) + 1
    return Rank(at, float(relative[at - 1]), float(relative[at]))


def numerical_rank(config: Config, seed: int = 0, num_inputs: int = 0) -> Rank:
    """At random weights, over random inputs: by default three times as many outputs as weights."""
    weights = draw_weights(config, np.random.default_rng(seed))
    d = sum(np.size(leaf) for leaf in jax.tree.leaves(weights))
    outputs = config.context_length * config.vocab_size if not hasattr(config, "widths") else config.widths[-1]
    inputs = make_inputs(config, num_inputs or max(60, 3 * d // outputs + 1), seed)
    return rank_of(np.linalg.svd(jacobian(config, weights, inputs), compute_uv=False))


def row_of(name: str, seed: int = 0) -> dict[str, Any]:
    """The formula beside the numerical rank, for one of ``CONFIGURATIONS``."""
    config, epsilon = CONFIGURATIONS[name]
    found = numerical_rank(config, seed)
    d = sum(np.size(leaf) for leaf in jax.tree.leaves(draw_weights(config, np.random.default_rng(0))))
    formula = d - gauge_dimension(config, epsilon)
    return {
        "configuration": name, "weights": d, "formula": formula, "rank": found.rank, "counted": found.counted,
        "rounding": found.rounding, "gap": round(found.gap, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    given = parser.parse_args()
    there = json.loads(given.out.read_text())["rows"] if given.out is not None and given.out.exists() else []
    rows = {row["configuration"]: row for row in there}
    for name in given.only:
        if name in rows:
            continue
        rows[name] = row_of(name)
        print({**rows[name], "equal": rows[name]["rank"] == rows[name]["formula"]}, flush=True)
        jax.clear_caches()
        if given.out is not None:
            record = {"rows": [rows[n] for n in CONFIGURATIONS if n in rows], "versions": versions()}
            given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
