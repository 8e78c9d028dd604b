"""Cross-entropy of each token from the final hidden states, with what an output layer may have: bias and softcap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from slt_jax.kernels.cross_entropy import cross_entropy

MANY_LOGITS = 2**24  # 64 MiB; below that, computing all logits at once is faster
_ROWS = 256  # of a chunk with a softcap


def softcapped(logits: Array, cap: float | None) -> Array:
    """``cap tanh(logits / cap)``."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def mean_of_first(
    token_losses: Float[Array, "batch predicted"], count: Integer[Array, " batch"] | None
) -> Float[Array, " batch"]:
    """The mean over the predictions of the first ``count`` tokens, of which the first token itself is none."""
    if count is None:
        return jnp.mean(token_losses, axis=-1)
    own = own_predictions(token_losses.shape[1], count)
    return jnp.sum(jnp.where(own, token_losses, 0), axis=-1) / (count - 1)


def own_predictions(predicted: int, count: Integer[Array, " batch"]) -> Bool[Array, "batch predicted"]:
    """Which of so many predictions are of the first ``count`` tokens."""
    return jnp.arange(predicted) < count[:, None] - 1


def token_cross_entropy(
    x: Float[Array, "row width"],
    table: Float[Array, "vocabulary width"],
    targets: Integer[Array, " row"],
    bias: Float[Array, " vocabulary"] | None = None,
    softcap: float | None = None,
) -> Float[Array, " row"]:
    """-log softmax(softcapped(x table' + bias))[target] for each row, nats, float32.

    The logits of all rows are in memory together only if there are at most ``MANY_LOGITS`` of them.
    """
    if bias is not None:  # one more component of the hidden states, which is 1
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)
        table = jnp.concatenate([table, bias[:, None].astype(table.dtype)], axis=1)
    if len(x) * len(table) <= MANY_LOGITS:
        return _losses(x, table, targets, softcap)
    if softcap is None:
        return cross_entropy(x, table, targets)
    return _losses_in_chunks(x, table, targets, softcap)


def _losses(x: Array, table: Array, targets: Array, softcap: float | None) -> Array:
    """The target's logit is a product with its row of the table: it needs no gather."""
    wide = jnp.promote_types(jnp.result_type(x, table), jnp.float32)
    x, table = x.astype(wide), table.astype(wide)
    chosen = jnp.sum(x * jnp.take(table, targets, axis=0, mode="clip"), axis=-1)
    return jax.nn.logsumexp(softcapped(x @ table.T, softcap), axis=-1) - softcapped(chosen, softcap)


def _losses_in_chunks(x: Array, table: Array, targets: Array, softcap: float) -> Array:
    """The logits of a chunk are computed again in the backward pass."""
    padding = -len(x) % _ROWS
    rows = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, _ROWS, x.shape[1])
    labels = jnp.pad(targets, (0, padding)).reshape(-1, _ROWS)
    chunk = jax.checkpoint(lambda pair: _losses(pair[0], table, pair[1], softcap))
    return jax.lax.map(chunk, (rows, labels)).reshape(-1)[: len(x)]
