"""The plain version: all logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    hidden: Float[Array, "row width"], table: Float[Array, "vocabulary width"], targets: Int[Array, " row"]
) -> Float[Array, " row"]:
    """-log softmax(hidden table')[target] for each row, nats, float32.

    Args:
        hidden: the hidden states, one row for each predicted token.
        table: the unembedding, one row for each token of the vocabulary.
        targets: token ids. An id outside the vocabulary gives NaN.
    """
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    inside = (targets >= 0) & (targets < len(table))
    chosen = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(inside, jax.nn.logsumexp(logits, axis=1) - chosen, jnp.nan)
