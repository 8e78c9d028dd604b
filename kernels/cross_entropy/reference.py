"""The plain version: all logits at once."""

import jax
import jax.numpy as jnp


def cross_entropy(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(hidden table')[target] for each row, nats, float32 ``(N,)``.

    Args:
        hidden: ``(N, width)``. table: the unembedding, one row for each token, ``(vocabulary, width)``.
        targets: token ids ``(N,)``. One outside the vocabulary gives NaN.
    """
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    inside = (targets >= 0) & (targets < len(table))
    chosen = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(inside, jax.nn.logsumexp(logits, axis=1) - chosen, jnp.nan)
