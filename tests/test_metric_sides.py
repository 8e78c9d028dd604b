"""How a side of a weight matrix is taken apart: on the host and on a GPU, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import slt_jax.metric
from slt_jax.metric import _side
from tests.matrices import spread


def test_a_gpu_takes_apart_what_its_host_would(monkeypatch):
    """Twelve decades, which float32 would lose. Kills: single precision on the device, values and vectors swapped."""
    rng = np.random.default_rng(3)
    basis, values = np.linalg.qr(rng.normal(size=(9, 9)))[0], np.logspace(0, -12, 9)
    gram = spread(9, 1, 4)
    first, grown = _side(None, np.full(9, 2.0), gram, 1000), _side(basis, values, gram, 1000)
    on_gpu, made = [], slt_jax.metric.square_root
    monkeypatch.setattr(slt_jax.metric, "square_root", lambda matrix: on_gpu.append(len(matrix)) or made(matrix))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(_side(basis, values, gram, 1000)[1], grown[1])
    assert not on_gpu  # its host has a small one before a GPU has a program for it
    monkeypatch.setattr(slt_jax.metric, "LARGE_SIDE", 9)
    for (vectors, found), start in ((first, (None, np.full(9, 2.0))), (grown, (basis, values))):
        there, also = _side(*start, gram, 1000)
        np.testing.assert_allclose(also, found, rtol=1e-3)
        np.testing.assert_allclose(np.abs(np.sum(vectors * there, 0)), 1, atol=1e-3)
    assert on_gpu == [9]


def test_a_first_round_leaves_the_root_of_its_products():
    """U v U' = 2 sqrt(gram + floor). Kills: the values' squares, no floor."""
    gram, floor = spread(9, 6, 4), 1e-4 * np.logspace(0, -6, 9).mean()
    vectors, values = _side(None, np.full(9, 2.0), gram, 1000)
    exact = scipy.linalg.sqrtm(gram + floor * np.eye(9))
    np.testing.assert_allclose((vectors * values) @ vectors.T, 2 * exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("decades", [1, 4, 10])
def test_a_square_root_by_products(decades):
    with jax.enable_x64(True):
        matrix = 1e30 * spread(40, decades, 5)
        found = np.asarray(slt_jax.metric.square_root(jnp.asarray(matrix)))
    np.testing.assert_allclose(np.linalg.eigvalsh(found), 1e15 * np.logspace(-decades / 2, 0, 40), rtol=1e-5)
    np.testing.assert_allclose(found @ found, matrix, rtol=0, atol=1e-9 * 1e30)
