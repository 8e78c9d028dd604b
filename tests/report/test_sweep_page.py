"""The page of a sweep."""

from types import SimpleNamespace

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.report.page import render
from slt_jax.report.sweep import sweep_page
from slt_jax.report.write import write_report
from slt_jax.results.record import RunRecord
from tests.report.test_pictures import grid
from tests.report.test_result_page import EVIL, Reader, sound

pytestmark = pytest.mark.usefixtures("rhat")


class Told(SimpleNamespace):
    def __str__(self):
        return f"It stands. {EVIL}"


def test_a_sweep_has_a_page():
    data = grid()
    data["diverged"][1, 2, 3] = True
    data["verdict"][1, 2, 3] = "diverged"
    best = {"nbeta": 100.0, "localization": 10.0, "step_size": 1e-3}
    settings = {"sampler": "sgld", "nbeta": 10.0, "num_chains": 4}
    flat = SimpleNamespace(step_size=(1e-4, 1e-3), localization=(1.0, 10.0), llc=17.0, llc_stderr=0.2)
    reading = Told(recommended=best, plateaus={100.0: flat})
    text = render(
        sweep_page(SimpleNamespace(dataset=data, reading=reading, settings=RunRecord.from_json(settings)), None)
    )
    found = Reader(text)
    assert "<h1>Sweep over 24 settings</h1>" in text
    assert "✓</span> take nbeta 100, localization 10, step_size 0.001" in text
    assert found.rows["nbeta 100, localization 10, step_size 0.001"] == ["19 ± 0.19", "converged"]
    assert found.rows["nbeta 100, localization 100, step_size 0.01"] == ["none", "diverged"]
    assert found.marks["nbeta 100, localization 100, step_size 0.01"] == "✗"
    assert found.rows["num_chains"][0] == "4"
    assert "nbeta" not in found.rows
    assert "It stands. &lt;script&gt;" in text
    assert found.images[0]["src"].startswith("data:image/svg+xml;base64,")


def of_reading(**reading):
    return sweep_page(SimpleNamespace(dataset=grid(), settings=RunRecord(), reading=Told(**reading)), None)


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_without_a_plateau_is_no_success():
    best = {"nbeta": 100.0, "localization": 10.0, "step_size": 1e-3}
    single = of_reading(recommended=best, plateaus={10.0: None})
    assert single.tone == "caution"
    assert single.verdict.endswith("step_size 0.001, though no plateau was found there")
    none = of_reading(recommended=None, plateaus={})
    assert (none.tone, none.verdict) == ("bad", "no setting can be recommended")


@pytest.mark.usefixtures("undrawn")
def test_a_saved_sweep_is_read(tmp_path):
    sizes = np.array([1e-5, 1e-4, 1e-3])
    cells = [sound(nbeta=nbeta, step_size=float(size)) for nbeta in (10.0, 20.0) for size in sizes]
    axes = {"nbeta": np.array([10.0, 20.0]), "localization": np.array([2.0]), "step_size": sizes}
    sweep = slt.Sweep(axes, tuple(cells), np.array([[1.0, 0.01]]))
    saved = sweep.save(tmp_path / "s.zarr")
    text = write_report(saved, tmp_path / "s.html").read_text()
    assert "<h1>Sweep over 6 settings</h1>" in text
    assert Reader(text).rows["nbeta 20, localization 2, step_size 0.001"][0] == cells[5].estimate_text("±")
    assert f"slt.load_sweep(&#39;{saved}&#39;)" in text
