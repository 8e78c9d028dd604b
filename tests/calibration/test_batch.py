"""The default batch: all examples where that is cheaper than correcting for minibatch noise."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.calibration.effort import default_batch, default_budget
from slt_jax.estimators.request import Request

RNG = np.random.default_rng(0)


def regression(num_data, width=8):
    """(posterior, data, curvatures): linear, with label noise, at the least squares solution."""
    x = RNG.normal(size=(num_data, width))
    noise = RNG.normal(size=num_data)
    noise -= x @ np.linalg.lstsq(x, noise, rcond=None)[0]
    data = x.astype(np.float32), (x.sum(1) + noise).astype(np.float32)
    loss_fn = lambda p, xy: 0.5 * (xy[0] @ p["w"] - xy[1]) ** 2  # noqa: E731
    posterior = slt.LocalPosterior(loss_fn, {"w": jnp.ones(width)}, num_data)
    return posterior, data, np.linalg.eigvalsh(x.T @ x / num_data)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("num_data", "num_weights", "num_bytes", "expected"),
    [
        (100, 10, 1e3, (100, 1.0)),
        (257, 10, 1e3, (257, 1.0)),
        (1797, 1210, 5e5, (1797, 1797 / 512)),
        (2048, 10_000, 2**24, (2048, 4.0)),
        (2049, 10, 1e3, (256, 1.0)),
        (1797, 10_001, 5e5, (256, 1.0)),
        (1797, 1210, 2**24 + 1, (256, 1.0)),
        (1797, 1210, math.inf, (256, 1.0)),
    ],
)
def test_all_examples_where_a_step_costs_at_most_twice_one_with_control_variates(
    num_data, num_weights, num_bytes, expected
):
    assert default_batch(num_data, num_weights, num_bytes) == expected
    assert default_budget(1210, expected[1]) == int(1e8 / 1210 / expected[1])


@pytest.mark.parametrize(
    ("num_data", "more", "batch"),
    [
        (1500, {}, 1500),
        (3000, {}, 256),
        (1500, {"batch_size": 256}, 256),
        (1500, {"micro_batches": 2}, 256),
        (1500, {"sampler": slt.hmc()}, 1500),
    ],
    ids=str,
)
def test_what_an_estimate_takes(num_data, more, batch):
    """Kills: a default that overrides what was given. A default budget pays for the longer steps."""
    posterior, data, _ = regression(num_data)
    request = Request.checked(posterior, data, **more)
    assert request.batch_size == batch
    full = batch == num_data and "sampler" not in more
    assert request.default_budget == int(500_000 / (num_data / 512 if full else 1))


def test_noisy_labels_of_few_examples_do_not_heat():
    """Nothing is subtracted, nor are control variates taken, and the error bar is right: z of eight keys."""
    posterior, data, curvatures = regression(1500)
    scores = []
    for key in range(40, 48):
        result = slt.estimate_llc(posterior, data, budget=12_000, key=key)
        s = result.settings
        assert (result.bias.noise, result.bias.applied, s.control_variate) == (0.0, 0.0, False)
        x = s.nbeta * curvatures
        scores.append((result.llc - (x / (x + s.localization)).sum() / 2) / result.llc_stderr)
    assert abs(np.mean(scores)) < 3 / math.sqrt(8)
    assert 0.3 < np.std(scores, ddof=1) < 1.9  # chi-square of 7 degrees of freedom: one in a thousand on either side


def test_a_whole_batch_has_no_heat_in_results_without_end_measurements():
    """Kills: the scatter of the thermometer subtracted as heat, where a run is too short to measure the noise."""
    posterior, data, _ = regression(400)
    given = {"sampler": slt.underdamped(1e-4, 0.2), "num_chains": 2, "num_draws": 20, "num_warmup": 20}
    seen = []
    near = slt.LocalPosterior(posterior.loss_fn, posterior.center, 400, localization=1.0)
    slt.estimate_llc(near, data, callback=lambda step, found: seen.append(found), **given)
    assert seen
    assert all(found.bias.applied == 0.0 and found.bias.noise == 0.0 for found in seen)
