"""Effective sample size and R-hat against ArviZ, whose numbers they are."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.fftpack import next_fast_len

from slt_jax.diagnostics import mixing


def cases():
    rng = np.random.default_rng(0)
    for chains, draws in [(1, 8), (2, 5), (4, 4), (4, 13), (3, 200), (4, 1999), (8, 4000)]:
        noise = rng.normal(size=(chains, draws))
        yield f"independent {chains} x {draws}", noise
        yield f"a walk {chains} x {draws}", np.cumsum(noise, 1)
        yield f"alternating {chains} x {draws}", noise - np.roll(noise, 1, axis=1)
        yield f"with ties {chains} x {draws}", np.round(2 * noise)
        yield f"shifted chains {chains} x {draws}", noise + np.arange(chains)[:, None]
    yield "one chain stands still", np.vstack([np.zeros(50), rng.normal(size=50)])
    yield "all stand still", np.vstack([np.zeros(50), np.ones(50)])
    yield "a missing draw", np.vstack([np.full(50, np.nan), rng.normal(size=50)])


@pytest.mark.quick
def test_the_numbers_are_those_of_arviz_to_the_last_bit():
    """Kills: another normalization, ranks within a chain, ties by their order, a pair of lags that is left out."""
    from arviz_stats.base.array import array_stats

    with np.errstate(divide="ignore", invalid="ignore"):
        for name, draws in [*cases(), *((f"{name}, float32", draws.astype(np.float32)) for name, draws in cases())]:
            expected = float(array_stats.ess(draws, 0, 1, method="mean"))
            np.testing.assert_equal(float(mixing.ess_of_mean(draws)), expected, err_msg=f"ESS of {name}")
            expected = float(array_stats.rhat(draws, 0, 1, method="rank"))
            room = 1e-6 if draws.dtype == np.float32 else 0.0  # ArviZ 1 takes the scores of float32 in float32
            np.testing.assert_allclose(mixing.rank_rhat(draws), expected, rtol=room, err_msg=f"R-hat of {name}")


def test_lengths_of_the_transform_are_those_of_scipy():
    """Kills: a length that is as fast but another, whose rounding differs."""
    for least in [*range(1, 700), 27_992, 111_969, 2**20 + 1]:
        assert mixing._smooth_from(least) == next_fast_len(least)


@pytest.mark.quick
def test_fewer_than_four_draws_have_none():
    draws = np.random.default_rng(0).normal(size=(4, 3))
    assert math.isnan(mixing.ess_of_mean(draws))
    assert math.isnan(mixing.rank_rhat(draws))


def test_a_verdict_loads_neither_arviz_nor_pandas():
    """Kills: a second or two before the first result is printed."""
    script = (
        "import sys, numpy as np\n"
        "from slt_jax.diagnostics.series import ess_and_rhat\n"
        "ess_and_rhat(np.random.default_rng(0).normal(size=(4, 100)))\n"
        "print([name for name in ('arviz_stats', 'pandas', 'xarray', 'scipy.stats') if name in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
