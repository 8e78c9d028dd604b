"""Singular teachers whose learning coefficient is known: heads with products of reduced rank, and dead ReLU units.

The function of a head without biases, norms and rotary positions sees its weights through the two products

    A = W_q W_k'   (scores),        B = W_v W_o   (what is written),

both ``(width, width)``. Let y be all other weights, and F(A_1, B_1, ..., y) the logits modulo their mean.

1. Lift: give the heads the inner width ``width``, W_q = I, W_k' = A, W_v = I, W_o = B. Then (factors) -> (products) is
   a submersion there, so that the rank R of the Jacobian is that of F in the products and y.
2. Where the derivative of F in the products alone is injective, no direction of the kernel moves products only. The
   kernel's part in y can be fixed by a slice, and F is an immersion in the products and R - 2 H width^2 further
   coordinates; what fixes the slice acts on the products by invertible matrices, which changes no rank of a factor.
3. So the divergence is, up to positive factors, the sum of the squares of those coordinates and of all entries of each
   product's difference from the teacher's: the learning coefficient is

    (R - 2 H width^2) / 2 + sum over heads and their products of the coefficient of a two-layer linear network

   at these factors, which ``scaling.dln.truth.local_bounds`` bounds. The Jacobian's rank is constant near w* in step 1
   if it is the largest there is; that of a generic lifted network is, and R is compared with it.

For factors of full rank the coefficients are half the ranks of the products, and the sum is (d - gauge) / 2.
"""

from fractions import Fraction
from typing import Any

import numpy as np

from scaling.dln.truth import local_bounds
from scaling.transformers.gauge import gauge_dimension
from scaling.transformers.networks import AttentionConfig, MLPConfig
from scaling.transformers.rank import jacobian, rank_of
from scaling.transformers.teachers import draw_weights, make_inputs, num_weights

Weights = dict[str, Any]


def reduced(rng: np.random.Generator, before: int, after: int, rank: int) -> np.ndarray:
    """A normal matrix of this rank, ``(before, after)``, entries of variance about 1 / before."""
    product = rng.standard_normal((before, rank)) @ rng.standard_normal((rank, after))
    return product / np.sqrt(max(rank, 1) * before)


def reduced_heads(config: AttentionConfig, product: str, rank: int, seed: int = 0) -> Weights:
    """Random weights; both factors of the first head's ``product`` (``query-key``, ``value-output``) have this rank.

    Raises:
      ValueError: another product, or a rank that is not below the width of the head.
    """
    if product not in ("query-key", "value-output") or not 0 <= rank < config.head_width:
        raise ValueError(
            f"product must be query-key or value-output, and rank from 0 to head_width - 1 = {config.head_width - 1}; "
            f"got {product!r}, {rank}."
        )
    rng = np.random.default_rng(seed)
    weights = draw_weights(config, rng)
    width, inner = config.width, config.head_width
    if product == "query-key":
        weights["q"][:, 0], weights["k"][:, 0] = (reduced(rng, width, inner, rank) for _ in range(2))
    else:
        weights["v"][:, 0], weights["o"][0] = reduced(rng, width, inner, rank), reduced(rng, inner, width, rank)
    return weights


def factors(config: AttentionConfig, weights: Weights) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two factors of each product of each head, ``(width, inner)`` and ``(inner, width)``, float64."""
    own = {name: np.asarray(weights[name], np.float64) for name in "qkvo"}
    heads = range(config.num_heads)
    scores = [(own["q"][:, h], own["k"][:, h].T) for h in heads]
    return scores + [(own["v"][:, h], own["o"][h]) for h in heads]


def lifted(config: AttentionConfig, weights: Weights) -> tuple[AttentionConfig, Weights]:
    """The same function with heads of inner width ``width``: one factor of each product is the identity."""
    width, heads = config.width, config.num_heads
    wide = AttentionConfig(config.vocab_size, config.context_length, width, heads, width)
    pairs = factors(config, weights)
    scores, values = ([a @ b for a, b in part] for part in (pairs[:heads], pairs[heads:]))
    eye = np.repeat(np.eye(width)[:, None], heads, axis=1)
    temperature = (width / config.head_width) ** 0.5
    keys = np.stack([a.T for a in scores], axis=1)
    return wide, {**weights, "q": temperature * eye, "k": keys, "v": eye, "o": np.stack(values)}


def coefficient_bounds(config: AttentionConfig, weights: Weights, seed: int = 0) -> tuple[Fraction, Fraction]:
    """Lower and upper bound of the learning coefficient at these weights; where they meet, it is known.

    Raises:
      ValueError: the derivative in the products is not injective (the scores of a head that writes nothing), or the
        rank of the lifted network is not the largest.
    """
    wide, weights_wide = lifted(config, weights)
    inputs = make_inputs(wide, max(60, 3 * num_weights(wide) // (wide.context_length * wide.vocab_size) + 1), seed)
    matrix = jacobian(wide, weights_wide, inputs)
    found = rank_of(np.linalg.svd(matrix, compute_uv=False)).rank
    if found != (largest := num_weights(wide) - gauge_dimension(wide)):
        raise ValueError(
            f"the Jacobian of the products has rank {found}, below the largest, {largest}: not known here."
        )
    entries = 2 * config.num_heads * config.width**2
    own = matrix[:, _places(wide)]
    if (seen := rank_of(np.linalg.svd(own, compute_uv=False)).rank) != entries:
        raise ValueError(f"the function sees {seen} of the {entries} entries of its heads' products: not known here.")
    rest = Fraction(found - entries, 2)
    bounds = [local_bounds([np.float64(a), np.float64(b)]) for a, b in factors(config, weights)]
    return rest + sum(low for low, _ in bounds), rest + sum(high for _, high in bounds)


def _places(config: AttentionConfig) -> np.ndarray:
    """Columns of the Jacobian of the factors that are the products: k and o, in the order of the names."""
    inner, position, found = config.width * config.num_heads * config.width, 0, []
    sizes = {
        "head": config.vocab_size * config.width, "k": inner, "o": inner,
        "positions": config.context_length * config.width, "q": inner, "tokens": config.vocab_size * config.width,
        "v": inner,
    }  # fmt: skip
    for name in sorted(sizes):
        found += range(position, position + sizes[name]) if name in ("k", "o") else ()
        position += sizes[name]
    return np.array(found)


def dead_units(config: MLPConfig, dead: int, inputs: np.ndarray, seed: int = 0) -> tuple[Weights, Fraction]:
    """A ReLU perceptron with one hidden layer whose first ``dead`` units are never on, and its learning coefficient.

    Their weights change nothing in a neighbourhood of w*, in which the function is that of the network without them:
    half its number of weights minus its gauge.

    Raises:
      ValueError: not one hidden layer of ReLU with biases, or no unit left.
    """
    if (
        len(config.widths) != 3
        or config.activation != "relu"
        or not config.biases
        or not 0 < dead < config.widths[1] - 1
    ):
        raise ValueError(
            f"dead units need one hidden layer of ReLU with biases, wider than dead + 1; got {config}, {dead}."
        )
    weights = draw_weights(config, np.random.default_rng(seed))
    reach = np.abs(inputs @ weights["layer0"]["weight"][:, :dead]).max(axis=0)
    weights["layer0"]["bias"][:dead] = -2 * reach - 1
    rest = MLPConfig((config.widths[0], config.widths[1] - dead, config.widths[2]), "relu")
    return weights, Fraction(num_weights(rest) - gauge_dimension(rest), 2)
