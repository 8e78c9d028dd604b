"""Losses that are no mean over their batch are refused, and an error in one names the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.small import DATA, PLAN, estimate, posterior, refuses, square


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_a_sum_over_the_batch(penalty):
    """Also where the loss is exactly 0 at w*, and beside a penalty that does not grow."""

    def total(w, x):
        return jnp.sum(square(w, x)) + penalty * jnp.sum(w**2)

    words = ("adds up its batch", "same 4 rows given twice", "grew by a factor of", "Return the mean", "shape (m,)")
    refuses(ValueError, lambda: estimate(posterior(total)), *words)
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    refuses(ValueError, lambda: slt.sweep(posterior(total), DATA, nbeta=[1.0, 2.0], **given), *words)
    refuses(ValueError, lambda: slt.trajectory(posterior(total), {1: jnp.zeros(3)}, DATA, **given), *words)


def contrast(w, x):
    scores = (x * w) @ x.T
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diag(scores))


SCALARS = {
    "mean": lambda w, x: jnp.mean(square(w, x)),
    "mean and penalty": lambda w, x: jnp.mean(square(w, x)) + 3 + jnp.sum(w**2),
    "negative": lambda w, x: jnp.mean(square(w, x)) - 5,
    "contrastive": contrast,
    "without data": lambda w, x: 0.5 * jnp.sum(w**2),
    "noise by position": lambda w, x: jnp.mean(square(w, x + jax.random.normal(jax.random.key(0), x.shape))),
    "its own batch size": lambda w, x: jnp.mean(square(w, x.reshape(8, 3))),
}


@pytest.mark.parametrize("case", SCALARS)
def test_losses_of_one_number_that_are_right(case):
    assert np.isfinite(estimate(posterior(SCALARS[case])).llc)


def test_rows_taken_for_inputs_and_targets():
    """``data=X`` for a loss that takes (X, Y): rows 0 and 1 of the batch are read as the two."""
    words = ("does not use all rows of its batch", "pass the data as (X, Y)")
    refuses(ValueError, lambda: estimate(posterior(lambda w, b: jnp.sum((w * b[0] - b[1]) ** 2))), *words)


def unpacks(w, batch):
    x, y = batch
    return square(w, x) + y


def test_errors_of_the_loss_name_the_batch():
    where = "loss_fn raised this when it was called with the weights and a batch of"
    refuses(ValueError, lambda: estimate(posterior(unpacks)), f"{where} (8, 3) of float32: too many values to unpack")
    named = {"x": DATA, "y": DATA[:, 0]}
    refuses(
        KeyError, lambda: estimate(posterior(lambda w, b: b["z"]), named), f"{where} x (8, 3) of float32, y (8,)", "z"
    )
    refuses(TypeError, lambda: estimate(posterior(lambda w, b: square(w, b[:, :2]))), where, "dot_general")


class Odd(Exception):
    def __init__(self, code, what):
        super().__init__(code, what)


def test_an_error_of_another_form_keeps_its_type_and_gets_a_note():
    def loss(w, x):
        raise Odd(3, "no")

    with pytest.raises(Odd) as error:
        estimate(posterior(loss))
    assert "a batch of (8, 3) of float32." in "".join(error.value.__notes__)
