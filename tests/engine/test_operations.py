"""Operations counted in a program, against products that are counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from scaling.throughput.work import decoder_flops
from slt_jax.engine.operations import Operations, operations_of
from slt_jax.models import Decoder, DecoderConfig

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
ONE = 2 * 3 * 5 * 7


@pytest.mark.quick
def test_a_product_of_matrices():
    """Kills: a product without its sums, an axis that is left out."""
    assert operations_of(jnp.matmul, A, B).products == {"float32": ONE}


@pytest.mark.quick
def test_a_scan_counts_as_often_as_it_runs():
    """Kills: what XLA's own count does."""
    many = lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=11)  # noqa: E731
    assert operations_of(many, A, B).total == 11 * ONE


@pytest.mark.quick
def test_branches_calls_and_types():
    """Kills: both branches, or the cheap one; a jitted function inside; one type for all."""
    branch = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 7)))  # noqa: E731
    assert operations_of(jax.jit(branch), A, B).total == ONE
    mixed = lambda a, b: (a @ b).sum() + (a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).sum()  # noqa: E731
    found = operations_of(mixed, A, B)
    assert found.products == {"float32": ONE, "bfloat16": ONE}
    assert found.seconds({"float32": 10.0, "bfloat16": 20.0}.get) == pytest.approx(ONE * 0.15)


@pytest.mark.quick
def test_a_gradient_takes_three_products_for_one():
    """The first layer has no gradient by its input."""
    loss = lambda b, a: jnp.sum((a @ b) ** 2)  # noqa: E731
    assert operations_of(jax.grad(loss), B, A).total == 2 * ONE
    assert operations_of(jax.grad(loss, argnums=(0, 1)), B, A).total == 3 * ONE


@pytest.mark.quick
def test_a_convolution():
    """Kills: a kernel's features counted twice. 4 x 4 outputs of 6 features, each of 3 x 3 x 2 products and sums."""
    image, kernel = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert operations_of(convolve, image, kernel).total == 2 * 16 * 6 * 18


def test_a_decoder_by_the_fields_formula():
    """Kills: layers that count once, attention or the output layer left out. The formula has no recomputation."""
    config = DecoderConfig(100, 16, 32, 3, 4, keep="all")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    loss = lambda p, tokens: jnp.mean(nnx.merge(graphdef, p).losses(tokens))  # noqa: E731
    found = operations_of(jax.value_and_grad(loss), params, jax.ShapeDtypeStruct((5, 16), jnp.int32))
    assert found.total == pytest.approx(decoder_flops(config, 5), rel=0.02)


@pytest.mark.quick
def test_sums_and_multiples():
    """Kills: types that replace one another in a sum."""
    first, second = Operations({"float32": 1.0}, 2.0), Operations({"float32": 3.0, "bfloat16": 4.0}, 5.0)
    assert first + second == Operations({"float32": 4.0, "bfloat16": 4.0}, 7.0)
    assert second.times(2) == Operations({"float32": 6.0, "bfloat16": 8.0}, 10.0)
