"""Devices by name, and what is said where they or their compilers are not known."""

import jax
import pytest

from slt_jax.engine import topology
from slt_jax.engine.topology import Devices, described_mesh, devices_named
from tests.small import refuses


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "label", "count"),
    [
        ("v5e:2x2", "TPU v5e", 4), ("v5e:16x16", "TPU v5e", 256), ("v5p:2x2x1", "TPU v5p", 4),
        ("V6E:4x4", "TPU v6e", 16), ("h100", "H100 SXM", 1), ("h100x8", "H100 SXM", 8), ("h200x4", "H200 SXM", 4),
    ],
)  # fmt: skip
def test_names_of_devices(name, label, count):
    """Kills: a topology whose numbers are added, a count that is dropped."""
    found = devices_named(name)
    assert (found.kind.label, found.count) == (label, count)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("b9000", "Names are v5e:2x2"), ("v5e", "Write v5e:2x2 for"), ("v5p:2x2", "Write v5p:2x2x1 for"),
        ("h100:8", "Write h100x8"), ("h100x0", ">= 1"), ("v5e:0x2", "topology of 2"), ("", "is not known"),
    ],
)  # fmt: skip
def test_other_names_are_refused(name, word):
    refuses(ValueError, lambda: devices_named(name), repr(name) if name != "h100x0" else "0", word)


@pytest.mark.quick
def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    """Kills: a traceback of JAX, or the extra of the other compiler."""
    monkeypatch.setattr(topology, "has_compiler", lambda platform: False)
    for name, extra in (("v5e:2x2", "tpu-compiler"), ("h100", "gpu-compiler")):
        refuses(ImportError, lambda name=name: described_mesh(devices_named(name)), name, f"slt-jax[{extra}]")


@pytest.mark.quick
def test_the_axes_of_a_mesh(monkeypatch):
    """Kills: chains and weights that change places."""
    monkeypatch.setattr(Devices, "describe", lambda self: jax.devices()[: self.count])
    eight = devices_named("h100x8")
    assert dict(described_mesh(eight).shape) == {"chain": 8}
    assert dict(described_mesh(eight, 2).shape) == {"chain": 4, "model": 2}
    refuses(ValueError, lambda: described_mesh(eight, 3), "model = 3", "8 devices")


@pytest.mark.quick
def test_peaks_depend_on_the_type():
    """Kills: float32 products at the rate of bfloat16 on a GPU."""
    h100 = devices_named("h100").kind
    assert h100.peak("bfloat16") == 2 * h100.peak("float32")
