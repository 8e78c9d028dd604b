"""Cross-entropy of a language model's head, some rows at a time: the logits of all tokens are never held together.

One row needs its own logits alone, for the loss and for its gradients. With p = softmax(h E'), weights g from above,

    d/dh_t = g_t (p_t - e_y) E        d/dE = sum_t g_t (p_t - e_y)' h_t

The losses, and where a gradient is asked for both of these with g = 1, come from one scan over rows: three matrix
products, as many as the plain version needs, where making the logits again on the way back would take a fourth. A mean
over rows has equal weights, and d/dE is then that sum times g; only unequal ones (a mask, a weighted mean) need a
second scan (under ``vmap`` it is made for all as soon as one needs it).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 256  # of one step of the scan; with fewer, adding up the table's gradient takes longer
TOKENS = 4096  # of the vocabulary, whose gradient is added at once


def cross_entropy(hidden: jax.Array, table: jax.Array, targets: jax.Array, rows: int = ROWS) -> jax.Array:
    """-log softmax(hidden table')[target] for each row, nats, float32 ``(N,)``.

    Args:
        hidden: ``(N, width)``. table: the unembedding, one row for each token, ``(vocabulary, width)``.
        targets: token ids ``(N,)``, whole numbers. One outside the vocabulary gives NaN.
        rows: of ``hidden`` at a time; takes the memory of rows x vocabulary float32 numbers, a few times.

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
    spare = -count % rows
    hidden = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets = jnp.pad(targets.astype(jnp.int32), (0, spare)).reshape(-1, rows)
    return _losses(hidden, table, targets, count).ravel()[:count]


def _row_losses(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(losses, logits, log of their sum of exponentials) of one chunk; inf in the last where there is no such target.

    The target's logit is a product with its row of the table: read from the logits it would keep them alive.
    """
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    norm = jax.nn.logsumexp(logits, axis=1)
    rows = jnp.take(table, targets, axis=0, mode="clip")
    chosen = jnp.sum(hidden.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)
    inside = (targets >= 0) & (targets < len(table))
    return jnp.where(inside, norm - chosen, jnp.nan), logits, jnp.where(inside, norm, jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden: jax.Array, table: jax.Array, targets: jax.Array, count: int) -> jax.Array:
    """``(chunks, rows)`` from hidden ``(chunks, rows, width)``, of which the first ``count`` rows are not padding."""
    return jax.lax.map(lambda chunk: _row_losses(chunk[0], table, chunk[1])[0], (hidden, targets))


def _step(table: jax.Array, total: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One chunk's losses and, row by row, their gradients; the table's, weighted, is added to ``total``.

    The weights go to the hidden states: times the slopes they would need a second buffer of rows x vocabulary.
    """
    hidden, targets, weights = chunk
    losses, logits, norm = _row_losses(hidden, table, targets)
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    slope = (jnp.exp(logits - norm[:, None]) - (token == targets[:, None])).astype(table.dtype)
    return _add_outer(total, slope, (weights[:, None] * hidden).astype(hidden.dtype)), (losses, slope @ table)


def _add_outer(total: jax.Array, slope: jax.Array, hidden: jax.Array) -> jax.Array:
    """total + slope' hidden, in place, some tokens at a time: the whole product would be as large as the table."""
    block = min(TOKENS, len(total))
    whole = len(total) // block

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(slope, i * block, block, axis=1).T @ hidden
        old = jax.lax.dynamic_slice_in_dim(total, i * block, block)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, i * block, axis=0)

    total = jax.lax.fori_loop(0, whole, add, total)
    return total.at[whole * block :].add(slope[:, whole * block :].T @ hidden)


def _scan(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, start: jax.Array):
    return jax.lax.scan(functools.partial(_step, table), start, (hidden, targets, weights))


def _forward(hidden: jax.Array, table: jax.Array, targets: jax.Array, count: int):
    weights = _real(targets.shape, count)
    by_table, (losses, by_hidden) = _scan(hidden, table, targets, weights, jnp.zeros_like(table))
    return losses, (hidden, table, targets, by_table, by_hidden)


def _real(shape: tuple[int, ...], count: int) -> jax.Array:
    """1 for the rows that are not padding, 0 for those that are."""
    return (jnp.arange(math.prod(shape)) < count).astype(jnp.float32).reshape(shape)


def _backward(count: int, saved: tuple, weights: jax.Array):
    hidden, table, targets, by_table, by_hidden = saved
    first = weights.ravel()[0]

    def again(carry: tuple) -> tuple:
        return _scan(hidden, table, targets, weights, jnp.where(carry[1], 0, carry[0]))[0], jnp.array(False)

    # A loop of at most one turn: unlike a branch it leaves the sum in its buffer, which becomes the gradient's.
    unequal = jnp.any(weights != first * _real(weights.shape, count))
    by_table, _ = jax.lax.while_loop(lambda c: c[1], again, ((first * by_table).astype(table.dtype), unequal))
    return (weights[..., None] * by_hidden).astype(hidden.dtype), by_table, np.zeros(targets.shape, jax.dtypes.float0)


_losses.defvjp(_forward, _backward)
