"""Draws that predict no better than a model that has learned nothing are told apart from an estimate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.small import refuses

CLASSES = 4
CHANCE = math.log(CLASSES)
DATA = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
LABELS = DATA[:, :CLASSES].argmax(axis=1)


def cross_entropy(w, batch):
    scores = batch[0] @ w
    return jax.nn.logsumexp(scores, axis=1) - jnp.take_along_axis(scores, batch[1][:, None], axis=1)[:, 0]


def estimate(nbeta, chance_loss=CHANCE):
    target = slt.LocalPosterior(
        cross_entropy, 5.0 * jnp.eye(6)[:, :CLASSES], 200, nbeta=nbeta, localization=0.01, chance_loss=chance_loss
    )
    sampler = slt.sgld(0.1 / (nbeta + 0.01))
    return slt.estimate_llc(target, (DATA, LABELS), sampler=sampler, num_draws=400, batch_size=200)


@pytest.mark.quick
def test_draws_at_chance(tmp_path):
    """Kills: the loss at w* in place of that of the draws; a number that a saved result does not keep."""
    result = estimate(0.5)
    assert result.loss_trace.mean() > CHANCE > result.init_loss
    assert result.verdict == "no better than chance"
    assert f"is not below that of a model that has learned nothing, {CHANCE:.4g}" in result.health.reason
    assert slt.load_result(result.save(tmp_path / "result")).verdict == "no better than chance"
    assert "no better than chance" not in estimate(0.5, chance_loss=None).health.flags
    assert "no better than chance" not in estimate(200.0).health.flags


def test_a_loss_of_chance_is_positive():
    for bad in (0, -1.0, math.nan):
        refuses(
            ValueError, lambda bad=bad: estimate(1.0, chance_loss=bad), "chance_loss must be a finite number > 0", bad
        )
