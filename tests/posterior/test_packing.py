"""Many small arrays lie side by side in one vector: nothing of them is lost, and their noise is the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from slt_jax.posterior import packing
from slt_jax.posterior.packing import Limits, Packing, packing_of
from slt_jax.samplers.base import gaussian

SHAPES = ((3,), (), (70, 80), (2, 3), (), (6,), (3,), (1, 1))


def position(shapes=SHAPES):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


@pytest.fixture
def few(monkeypatch):
    """More than three small arrays are packed."""
    monkeypatch.setattr(packing, "LIMITS", Limits(4096, 3))


@pytest.mark.quick
def test_what_is_packed_comes_out_again(few):
    """Kills: arrays that come back in another order, or in another's shape."""
    whole = position()
    found = packing_of(whole)
    assert found is not None
    packed = found.pack(whole)
    assert [x.shape for x in packed] == [(70, 80), (21,)]
    for before, after in zip(whole, found.unpack(packed), strict=True):
        np.testing.assert_array_equal(before, after)


def test_only_many_small_arrays_of_float32_are_packed(few):
    small, large = jnp.zeros(4), jnp.zeros(4097)
    assert packing_of([small] * 3) is None
    assert packing_of([small] * 3 + [large, jnp.zeros(4, jnp.bfloat16)]) is None
    found = packing_of([large, small, small, jnp.zeros(4, jnp.bfloat16), small, small])
    assert found is not None
    assert found == Packing(((4097,), (4,), (4,), (4,), (4,), (4,)), (1, 2, 4, 5))
    assert found.kept == (0, 3)


def test_a_large_model_packs_larger_arrays():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1024, 1024), *[(12, 3072)] * 9]]
    found = packing_of(shapes)
    assert found is not None
    assert found.kept == (0,)
    assert packing_of(shapes[1:]) is None


def test_arrays_that_a_mesh_axis_shards_are_left_alone(few):
    """Kills: weights gathered onto every device."""
    mesh = jax.make_mesh((4, 2), ("chain", "model"), axis_types=(AxisType.Auto,) * 2)
    split, whole = (
        jax.device_put(jnp.zeros(4), NamedSharding(mesh, PartitionSpec(*axis))) for axis in (("model",), ())
    )
    found = packing_of([split, whole, whole, whole, whole, split])
    assert found is not None
    assert found.packed == (1, 2, 3, 4)


@pytest.mark.quick
def test_the_noise_of_packed_arrays_is_that_of_each_by_itself(few):
    """Kills: noise by the place in the vector; one key for two arrays of the same size."""
    whole, key = position(), jax.random.key(3)
    found = packing_of(whole)
    assert found is not None
    apart = tuple(jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(whole))
    together = found.unpack(jax.jit(gaussian, static_argnums=2)(key, found.pack(whole), found.blocks))
    for unpacked, a, b in zip(gaussian(key, whole), apart, together, strict=True):
        np.testing.assert_array_equal(unpacked, a)
        np.testing.assert_array_equal(b, a)


def test_the_gradient_of_packed_arrays_is_the_packed_gradient(few):
    whole = position()
    found = packing_of(whole)
    assert found is not None

    def loss(arrays):
        return sum((i + 1) * jnp.sum(x**2) for i, x in enumerate(arrays))

    grad = jax.grad(lambda packed: loss(found.unpack(packed)))(found.pack(whole))
    for a, b in zip(found.unpack(grad), jax.grad(loss)(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_name_every_weight_once(few):
    found = packing_of(position())
    assert found is not None
    numbers = [number for array in found.blocks for block in array for number in block.numbers]
    assert sorted(numbers) == list(range(len(SHAPES)))
    assert all(block.size == math.prod(SHAPES[i]) for array in found.blocks for block in array for i in block.numbers)
