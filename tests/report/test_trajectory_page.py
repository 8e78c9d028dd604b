"""The page about a trajectory."""

import base64
import dataclasses

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.cli.commands import main
from slt_jax.report.write import write_report
from tests.report.test_result_page import Reader, sound
from tests.small import with_traces


def test_a_trajectory_has_a_page(tmp_path):
    results = tuple(sound(nbeta=10.0 + k) for k in range(3))
    whole = sound()
    gone = {name: np.full_like(whole.loss_trace, np.nan) for name in ("loss", "drift_sq")}
    lost = dataclasses.replace(with_traces(whole, **gone), stopped=dict.fromkeys(range(4), 3))
    found = slt.Trajectory((10, 100, 1000, 3000), {"all": (*results, lost), "layer 0": (*results, results[0])})
    saved = found.save(tmp_path / "t.zarr")
    text = write_report(saved, tmp_path / "t.html").read_text()
    page = Reader(text)
    assert "<h1>LLC at 4 checkpoints</h1>" in text
    assert page.rows["step 100"][1] == results[1].estimate_text("±")
    assert page.rows["step 3,000"][1:] == ["none", "nan", "diverged"]
    assert page.rows["step 3,000, layer 0"][1] == results[0].estimate_text("±")
    assert page.marks["step 3,000"] == "✗"
    assert "The setting is not right for 3,000 (diverged)" in text
    assert "load_trajectory(" in text
    assert "3 of 4 estimates have converged" in text
    assert "This counts the estimates of the whole model, one for each checkpoint" in text
    assert "Those of its parts are listed below, and not counted." in text
    assert page.images[0]["src"].startswith("data:image/svg+xml;base64,")


def test_a_trajectory_s_page_shows_the_stages_that_are_asked_for(tmp_path):
    """A curve that rises all the time is drift, or steps: picture and words agree. Kills: either with the default."""
    rising = tuple(sound(nbeta=nbeta) for nbeta in (3.0, 4.0, 6.0, 9.0, 13.0, 18.0, 24.0, 31.0))
    found = slt.Trajectory(tuple(10 * 2**k for k in range(8)), {"all": rising})
    saved = found.save(tmp_path / "t.zarr")
    plain, steps = found.report(tmp_path / "a.html"), found.report(tmp_path / "b.html", unit="nats per byte", drift=0.0)
    pages = [Reader(path.read_text()) for path in (plain, steps)]
    shown = [base64.b64decode(page.images[0]["src"].split(",")[1]).decode() for page in pages]
    assert "stage boundary" not in shown[0]
    assert "stage boundary" in shown[1]
    assert "nats per byte" in shown[1]
    assert "<!-- loss (nats per example) -->" in shown[0]
    assert str(found.stages) in plain.read_text()
    assert "3 stages; within a stage" in steps.read_text()
    assert main(["report", str(saved), "--drift", "0"]) == 0
    assert "3 stages; within a stage" in (tmp_path / "t.html").read_text()
    with pytest.raises(TypeError, match="drift are of a trajectory's page, and this is a result's"):
        write_report(rising[0], tmp_path / "c.html", drift=0.0)
    assert not (tmp_path / "c.html").exists()
