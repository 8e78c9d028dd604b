"""What tests of pages replace."""

from types import SimpleNamespace

import pytest

from slt_jax.diagnostics import series
from slt_jax.report.page import Picture


@pytest.fixture
def rhat(monkeypatch):
    """R-hat of any draws, to be set; ESS 400."""
    found = SimpleNamespace(value=1.01)
    monkeypatch.setattr(series, "_ess_and_rhat", lambda halves: (400.0, found.value))
    return found


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their pictures, which take the time."""
    for module, plot in (("result", "plot_result"), ("sweep", "plot_sweep")):
        monkeypatch.setattr(f"slt_jax.report.{module}.{plot}", lambda *_: None)
        monkeypatch.setattr(f"slt_jax.report.{module}.picture", lambda _, alt: Picture("data:,", alt, 6.0))
