"""The written-out generator gives JAX's own bits, and indices that are exactly uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_jax.kernels.langevin import (
    Block,
    bench,
    fold_in_on_host,
    normal,
    normal_side_by_side,
    random_words,
    reference,
    shapes,
    uniform_index,
    words_on_host,
)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0,), (1,), *shapes.TESTED])
def test_normal_is_bit_equal_to_the_reference(shape):
    key = jax.random.key(42)
    np.testing.assert_array_equal(normal(key, shape), reference.normal(key, shape, jnp.float32))
    fused = jax.jit(lambda k: normal(k, shape) * 1)(key)
    np.testing.assert_array_equal(fused, reference.normal(key, shape, jnp.float32))


@pytest.mark.quick
def test_keys_by_numpy_are_those_of_jax():
    """Kills: a word, a number or a round too few; keys of a split that are not those of ``jax.random.split``."""
    key, numbers = jax.random.key(7), [0, 1, 5, 2**31 - 7, 2**32 - 1]
    expected = [jax.random.key_data(jax.random.fold_in(key, np.uint32(number))) for number in numbers]
    np.testing.assert_array_equal(words_on_host(key, numbers), expected)
    for number, split in enumerate(jax.random.split(key)):
        assert fold_in_on_host(key, number) == split


def test_many_small_arrays_are_drawn_as_each_by_itself():
    """Kills: numbers that go on from one array to the next; arrays of one size that share a key."""
    key, blocks = jax.random.key(1), (Block((4, 1), 1), Block((0, 7), 3), Block((2,), 5))
    alone = [normal(jax.random.fold_in(key, i), (block.size,)) for block in blocks for i in block.numbers]
    np.testing.assert_array_equal(normal_side_by_side(key, blocks), np.concatenate(alone))


def test_normal_under_vmap_is_a_loop():
    keys = jax.random.split(jax.random.key(0), 5)
    together = jax.vmap(lambda k: normal(k, (11,)))(keys)
    np.testing.assert_array_equal(together, np.stack([normal(k, (11,)) for k in keys]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_types_go_to_the_reference(dtype):
    key = jax.random.key(1)
    np.testing.assert_array_equal(normal(key, (9,), dtype), reference.normal(key, (9,), dtype))


def test_words_are_the_bits_of_jax():
    high, low = random_words(jax.random.key(3), (100,))
    np.testing.assert_array_equal(high ^ low, jax.random.bits(jax.random.key(3), (100,)))


@pytest.mark.quick
@pytest.mark.parametrize("num", [1, 2, 7, 50257, 2**16, 2**31 - 1])
def test_indices_are_those_of_integer_arithmetic(num):
    key = jax.random.key(num)
    high, low = random_words(key, (2000,))
    exact = [reference.uniform_index(h, w, num) for h, w in zip(np.asarray(high), np.asarray(low), strict=True)]
    np.testing.assert_array_equal(uniform_index(key, 2000, num), exact)


def test_indices_are_uniform():
    count, num = 200_000, 50
    seen = np.bincount(uniform_index(jax.random.key(0), count, num), minlength=num)
    chi = np.sum((seen - count / num) ** 2) / (count / num)
    assert len(seen) == num
    assert abs(chi - (num - 1)) / np.sqrt(2 * (num - 1)) < 4


@pytest.mark.parametrize("num", [0, -1, 2**31])
def test_a_range_that_does_not_fit_is_refused(num):
    with pytest.raises(ValueError, match=f"num must be between 1 and .* got {num}"):
        uniform_index(jax.random.key(0), 3, num)


def test_an_array_past_the_counter_is_refused():
    with pytest.raises(ValueError, match="counter"):
        jax.eval_shape(lambda k: random_words(k, (2**16, 2**16)), jax.random.key(0))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the temporaries of XLA's CPU compiler")
def test_the_update_holds_no_second_copy_of_anything():
    """Compiled, not run: 10M donated weights; the plain generator needs a buffer for its noise."""
    like, key = jax.ShapeDtypeStruct(shapes.TIMED["10M weights"], jnp.float32), jax.random.key(0)
    temporary = {
        name: bench.program(draw).lower(key, like, like, like).compile().memory_analysis().temp_size_in_bytes
        for name, draw in {"fused": normal, "plain": reference.normal}.items()
    }
    assert temporary["fused"] < 4096
    assert temporary["plain"] > 4 * 10_000_000


def test_the_update_is_bit_equal_with_both_generators():
    key, w = jax.random.key(5), jnp.linspace(-1, 1, 1001).reshape(7, 11, 13)
    grad, center = jnp.cos(w), 0.5 * w
    found = bench.program(normal)(key, w + 0, grad, center)
    expected = bench.program(reference.normal)(key, w + 0, grad, center)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)  # the compiler may contract a * b + c in one
    moved, copy = bench.program(normal, True)(key, w + 0, grad, center)
    np.testing.assert_array_equal(copy, moved.astype(jnp.bfloat16))
