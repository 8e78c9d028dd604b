"""Which implementation of attention a program gets."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from slt_jax.models import attention


@pytest.mark.parametrize(("platform", "takes_devices"), [("cpu", False), ("tpu", True), ("gpu", True)])
def test_attention_is_that_of_the_meshs_devices(monkeypatch, platform, takes_devices):
    """Kills: the kernel of the machine that compiles, in a program for devices elsewhere."""
    seen = []
    monkeypatch.setattr(attention, "device_attention", lambda q, *_, scale: seen.append(scale) or q)
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("chain",), (AxisType.Auto,), abstract_device=device)
    heads = jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda q, k, v: attention.attend(q, k, v, 0.5), heads, heads, heads)
    assert seen == [0.5] * takes_devices
