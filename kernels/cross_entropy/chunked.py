"""Cross-entropy of a language model's output layer, a chunk of rows at a time: all logits are never in memory together.

A row needs only its own logits, for the loss and for its gradients. With p = softmax(h E') and g the gradient that
arrives from above,

    d/dh_t = g_t (p_t - e_y) E        d/dE = sum_t g_t (p_t - e_y)' h_t

One scan over chunks gives the losses and, where a gradient is needed, both of these with g = 1. That takes three matrix
products, as many as the plain version; recomputing the logits in the backward pass would take a fourth. For a mean over
rows all g are equal, and d/dE is that sum times g. Unequal g (a mask, a weighted mean) need a second scan. Under
``vmap`` the second scan runs for all elements as soon as one of them needs it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROWS = 256  # rows of one scan step; with fewer, accumulating the gradient of the table dominates
TOKENS = 4096  # tokens of the vocabulary whose gradient is accumulated at once


def cross_entropy(
    hidden: Float[Array, "row width"],
    table: Float[Array, "vocabulary width"],
    targets: Int[Array, " row"],
    rows: int = ROWS,
) -> Float[Array, " row"]:
    """-log softmax(hidden table')[target] for each row, nats, float32.

    Args:
        hidden: the hidden states, one row for each predicted token.
        table: the unembedding, one row for each token of the vocabulary.
        targets: token ids, integers. An id outside the vocabulary gives NaN.
        rows: rows of ``hidden`` in a chunk. Temporary memory is a few times rows x vocabulary float32 numbers.

    Raises:
        ValueError: shapes that do not fit, or ``rows`` below 1.
    """
    if hidden.ndim != 2 or table.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != table.shape[1]:
        raise ValueError(
            f"hidden (N, width), table (vocabulary, width) and targets (N,) do not fit together: got {hidden.shape}, "
            f"{table.shape} and {targets.shape}."
        )
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}. {ROWS} is fast.")
    count = len(targets)
    if count == 0:
        return jnp.zeros(0, jnp.float32)
    rows = min(rows, count)
    padding = -count % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets = jnp.pad(targets.astype(jnp.int32), (0, padding)).reshape(-1, rows)
    return _differentiable_losses(hidden, table, targets, count).ravel()[:count]


def _row_losses(hidden: Array, table: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(losses, logits, log of their sum of exponentials) of one chunk. For a target outside the vocabulary the loss is
    NaN and the last is infinite.

    The target's logit is a product with its row of the table: indexing the logits would keep them in memory.
    """
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    norm = jax.nn.logsumexp(logits, axis=1)
    rows = jnp.take(table, targets, axis=0, mode="clip")
    chosen = jnp.sum(hidden.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)
    inside = (targets >= 0) & (targets < len(table))
    return jnp.where(inside, norm - chosen, jnp.nan), logits, jnp.where(inside, norm, jnp.inf)


def _losses(hidden: Array, table: Array, targets: Array, count: int) -> Array:
    """``(chunks, rows)`` from hidden ``(chunks, rows, width)``; all but the first ``count`` rows are padding."""
    return jax.lax.map(lambda chunk: _row_losses(chunk[0], table, chunk[1])[0], (hidden, targets))


def gradient_step(table: Array, total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
    """One step of the scan: a chunk's losses and its gradients by hidden state, all with g = 1.

    Its contribution to the gradient by the table, weighted with g, is added to ``total``. The weights multiply the
    hidden states: multiplying p - e_y would need a second buffer of rows x vocabulary.
    """
    hidden, targets, weights = chunk
    losses, logits, norm = _row_losses(hidden, table, targets)
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    slope = (jnp.exp(logits - norm[:, None]) - (token == targets[:, None])).astype(table.dtype)
    return _add_outer(total, slope, (weights[:, None] * hidden).astype(hidden.dtype)), (losses, slope @ table)


def _add_outer(total: Array, slope: Array, hidden: Array) -> Array:
    """total + slope' hidden, in place, by blocks of tokens: the whole product would be as large as the table."""
    block = min(TOKENS, len(total))
    full_blocks = len(total) // block

    def add(i: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(slope, i * block, block, axis=1).T @ hidden
        old = jax.lax.dynamic_slice_in_dim(total, i * block, block)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, i * block, axis=0)

    total = jax.lax.fori_loop(0, full_blocks, add, total)
    return total.at[full_blocks * block :].add(slope[:, full_blocks * block :].T @ hidden)


def _scan(
    hidden: Array, table: Array, targets: Array, weights: Array, start: Array
) -> tuple[Array, tuple[Array, Array]]:
    return jax.lax.scan(functools.partial(gradient_step, table), start, (hidden, targets, weights))


def _forward(hidden: Array, table: Array, targets: Array, count: int) -> tuple[Array, tuple[Array, ...]]:
    weights = _not_padding(targets.shape, count)
    by_table, (losses, by_hidden) = _scan(hidden, table, targets, weights, jnp.zeros_like(table))
    return losses, (hidden, table, targets, by_table, by_hidden)


def _not_padding(shape: tuple[int, ...], count: int) -> Array:
    """1 for the first ``count`` rows, 0 for the padding."""
    return (jnp.arange(math.prod(shape)) < count).astype(jnp.float32).reshape(shape)


def _backward(count: int, saved: tuple[Array, ...], weights: Array) -> tuple[Array, Array, np.ndarray]:
    hidden, table, targets, by_table, by_hidden = saved
    first = weights.ravel()[0]

    def scan_again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return _scan(hidden, table, targets, weights, jnp.where(carry[1], 0, carry[0]))[0], jnp.array(False)

    # A loop of at most one iteration: unlike a branch it leaves the sum in its buffer, which becomes the gradient's.
    unequal = jnp.any(weights != first * _not_padding(weights.shape, count))
    by_table, _ = jax.lax.while_loop(lambda c: c[1], scan_again, ((first * by_table).astype(table.dtype), unequal))
    return (weights[..., None] * by_hidden).astype(hidden.dtype), by_table, np.zeros(targets.shape, jax.dtypes.float0)


_differentiable_losses = jax.custom_vjp(_losses, nondiff_argnums=(3,))
_differentiable_losses.defvjp(_forward, _backward)
