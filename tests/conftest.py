"""Eight virtual devices for every test, so that the chain axis is real even on one CPU."""

import gc

import jax
import jax.numpy as jnp
import pytest

import slt_jax as slt

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: past them the compiler crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def regression():
    """(posterior, data): a ten-parameter linear model without label noise; w* = 0 is its minimum."""
    data = jax.random.normal(jax.random.key(1), (400, 10))
    loss_fn = lambda p, x: 0.5 * (x @ p["w"]) ** 2  # noqa: E731
    return slt.LocalPosterior(loss_fn, {"w": jnp.zeros(10)}, num_data=400, localization=1.0), data
