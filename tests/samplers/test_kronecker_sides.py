"""How a side of a weight matrix is taken apart: on the host and on a GPU, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import slt_jax.samplers.kronecker
from slt_jax.samplers.kronecker import Side, turned_factor
from tests.samplers.matrices import spread

BASIS = np.linalg.qr(np.random.default_rng(3).normal(size=(9, 9)))[0]
VALUES, GRAM = np.logspace(0, -8, 9), spread(9, 4, 4)


def floored(gram):
    return gram + 1e-4 * np.trace(gram) / 9 * np.eye(9)


def whole(side):
    """A of (Q / sqrt(v)) (Q / sqrt(v))' = A^-1."""
    inverse = np.linalg.inv(side.root / np.sqrt(side.values))
    return inverse.T @ inverse


def exact(values, gram):
    """half sqrt(gram + floor) half', half half' = Q v Q'."""
    half = BASIS * np.sqrt(values)
    return half @ scipy.linalg.sqrtm(floored(gram)) @ half.T


def close(found, wanted, rtol=1e-6):
    """In the coordinates in which ``wanted`` is 1, so that its smallest directions count as its largest."""
    values, vectors = np.linalg.eigh(wanted)
    turn = vectors / np.sqrt(values)
    np.testing.assert_allclose(turn.T @ found @ turn, np.eye(len(found)), atol=rtol)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("decades", "gram", "off"), [(8, GRAM, (1e-6, 1e-4)), (12, spread(9, 1, 4), (1e-4, 1e-3))])
def test_a_round_takes_a_side_by_the_root_of_its_products(monkeypatch, backend, decades, gram, off):
    """Twelve decades, which float32 would lose. Kills: the products' squares, no floor, S for S'^-1, values squared."""
    products, made = [], slt_jax.samplers.kronecker.square_root
    monkeypatch.setattr(
        slt_jax.samplers.kronecker, "square_root", lambda matrix: products.append(len(matrix)) or made(matrix)
    )
    monkeypatch.setattr(slt_jax.samplers.kronecker, "LARGE_SIDE", 9)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    slt_jax.samplers.kronecker.into_by_products.clear_cache()
    values = np.logspace(0, -decades, 9)
    grown = Side(BASIS, values).into(gram, 1000)
    assert np.ptp(grown.values) == 0
    close(whole(grown), exact(values, gram), off[0])
    turned = grown.turned()
    np.testing.assert_allclose(turned.root.T @ turned.root, np.eye(9), atol=1e-9)
    close((turned.root * turned.values) @ turned.root.T, exact(values, gram), off[1])
    assert products == ([9] if backend == "gpu" else [])


def test_a_small_side_is_its_host_s_on_a_gpu_too(monkeypatch):
    """It has it before a GPU has a program for it."""
    here = Side(BASIS, VALUES).into(GRAM, 1000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(Side(BASIS, VALUES).into(GRAM, 1000).root, here.root)


def test_a_first_round_leaves_the_root_of_its_products():
    """U v U' = 2 sqrt(gram + floor). Kills: the values' squares, no floor."""
    gram = spread(9, 6, 4)
    side = Side(None, np.full(9, 2.0)).into(gram, 1000).turned()
    close((side.root * side.values) @ side.root.T, 2 * scipy.linalg.sqrtm(floored(gram)), 1e-8)
    few = Side(None, np.full(9, 2.0)).into(gram, 3).turned()  # a floor three times as high for a third of the vectors
    wanted = 2 * scipy.linalg.sqrtm(gram + 3 * (floored(gram) - gram))
    close((few.root * few.values) @ few.root.T, wanted, 1e-8)


A, B = 1e6 * spread(5, 1, 0), spread(4, 1, 1)  # a_i b_j from 1e4 to 1e6


@pytest.mark.parametrize(("last", "least"), [(False, 1e-9), (False, 900.0), (False, 1.1e3), (True, 1e-9), (False, 1e5)])
def test_a_leaf_after_a_round(last, least):
    """Its grams are those of A (x) B: R R' = (A (x) B)^-1 but for the floors, with or without bases; these are found
    where a direction could be below the least curvature, and it is raised to that.
    """
    grams = [A @ A * np.trace(B @ B) / 4, B @ B * np.trace(A @ A) / 5]
    left, right, scale = (np.asarray(x, float) for x in turned_factor((), grams, 10**6, least, last))
    root = np.kron(left, right) * scale.reshape(-1)
    values, vectors = np.linalg.eigh(np.kron(A, B))
    close(np.linalg.inv(root @ root.T), (vectors * np.maximum(values, least)) @ vectors.T, 0.02)
    assert np.allclose(left.T @ left, np.eye(5), atol=1e-5) == (last or least > 1e3)


@pytest.mark.parametrize("last", [False, True])
def test_a_leaf_that_the_loss_does_not_depend_on(last):
    """Nothing is seen of it: no curvature but the least, and nothing that is not finite."""
    found = turned_factor((), [np.zeros((3, 3)), np.zeros((2, 2))], 4, 25.0, last)
    for side, size in ((found.left, 3), (found.right, 2)):
        np.testing.assert_array_equal(side, np.eye(size))
    np.testing.assert_allclose(found.scale, np.full((3, 2), 0.2))
    vector = turned_factor((), [np.array([0.0, 16.0]), np.array([8.0])], 4, 1.0, last)
    np.testing.assert_allclose(vector.scale[0], 1)


@pytest.mark.parametrize("decades", [1, 4, 10])
def test_a_square_root_by_products(decades):
    with jax.enable_x64(True):
        matrix = 1e30 * spread(40, decades, 5)
        found = np.asarray(slt_jax.samplers.kronecker.square_root(jnp.asarray(matrix)))
    np.testing.assert_allclose(np.linalg.eigvalsh(found), 1e15 * np.logspace(-decades / 2, 0, 40), rtol=1e-5)
    np.testing.assert_allclose(found @ found, matrix, rtol=0, atol=1e-9 * 1e30)
