"""What results show of themselves: one line as the last line of a cell, a card in a notebook, a table in print."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.results import card
from tests.results.exact_draws import linear, of_linear
from tests.results.susceptible import result_of
from tests.small import made_result

SETTINGS = {"nbeta": 100.0, "num_data": 5000, "num_chains": 4, "num_draws": 4000, "localization": 1.0, "num_free": 4,
            "num_warmup": 20}  # fmt: skip


def made(llc=2.0, draws=4000, drift=0.0, **changes):
    rng = np.random.default_rng(0)
    loss = (0.5 + (rng.gamma(llc, size=(4, draws)) + np.linspace(0, drift, draws)) / 100).astype(np.float32)
    settings = {**SETTINGS, "num_draws": draws, **changes}
    return made_result(loss, loss[:, :20], settings, baseline=np.full_like(loss, 0.5), virial=4.0)


@pytest.fixture(scope="module")
def still():
    return made()


@pytest.fixture(scope="module")
def moving():
    return made(drift=3.0)


def sweep_of(*results):
    cells = [dataclasses.replace(r, settings=dataclasses.replace(r.settings, step_size=s)) for r, s in
             zip(results, (1e-4, 1e-3), strict=True)]  # fmt: skip
    axes = {"nbeta": np.array([100.0]), "localization": np.array([1.0]), "step_size": np.array([1e-4, 1e-3])}
    return slt.Sweep(axes, tuple(cells), np.ones((1, 2)))


def course_of(*results):
    return slt.Trajectory(tuple(range(1, 1 + len(results))), {"all": results})


@pytest.mark.quick
def test_every_public_result_is_short_in_a_notebook(still, moving):
    """Kills: 411,203 characters of arrays for a sweep that was the last line of a cell."""
    sampler, posterior = slt.sgld(1e-3), slt.LocalPosterior(lambda w, x: x @ w, np.zeros(3, np.float32), 40)
    course, grid = course_of(still, moving, still, moving), sweep_of(still, moving)
    cell = grid.dataset.isel(nbeta=0, localization=0, step_size=[0])
    fleet = slt.Fleet({"a": still}, (), cell.rename(step_size="job"))
    comparison = slt.compare(still, moving)
    shown = [still, moving, grid, course, sampler, posterior, fleet, comparison, still.traces, still.health,
             grid.reading, course.stages, still.health.evidence, slt.Observable(np.zeros((400, 3)))]  # fmt: skip
    seen = of_linear(linear(), np.random.default_rng(0), draws=20)
    found = slt.influence(None, seen, seen)
    shown += [seen, found, found.top(0), slt.generalization(None, seen)]
    responses = result_of(np.random.default_rng(0))
    shown += [responses, responses.pattern({"first": 0.1})]
    shown.append(slt.EffectiveDimension("hessian", 10.0, 1.0, 3, 40, eigenvalues=np.array([0.1, 1.0, 2.0])))
    for value in shown:
        text = repr(value)
        assert len(text) < (400 if value is not still.health.evidence else 2000), type(value)
        assert "array(" not in text
        assert "\n" not in text
    public = {value for name in slt.__all__ if inspect.isclass(value := getattr(slt, name))}
    assert public - {type(value) for value in shown} == {
        slt.CrossCheck,
        slt.Plan,
    }  # two numbers; tests/estimators/test_planning.py
    assert len(repr(slt.CrossCheck(1.0, 0.1))) < 100


@pytest.mark.quick
def test_one_line_has_the_estimate_its_error_and_its_verdict(still, moving):
    size = r"4 chains x 4,000 draws, R-hat 1\.0\d\d, ESS [\d,]+"
    assert re.fullmatch(rf"<LLCResult: LLC 2\.\d* \+/- 0\.\d+, converged; {size}>", repr(still))
    assert re.match(r"<LLCResult: LLC 3\.\d+ \+/- 0\.\d+\*, still rising; ", repr(moving))
    assert repr(sweep_of(still, moving)).endswith("step_size 0.0001, 0.001; 1 of them converged>")
    assert repr(course_of(still, moving)) == "<Trajectory: 2 checkpoints, steps 1 to 2; 1 of 2 converged>"


@pytest.mark.quick
def test_a_card_is_small_has_the_verdict_and_a_picture(still, moving):
    """Kills: a card of a megabyte; text that is taken for HTML; a green bar for what has not converged."""
    text, other = still._repr_html_(), moving._repr_html_()
    assert len(text) < 8000
    assert text.count("<polyline") == 4
    assert "converged" in text
    assert card.tone_color("converged") in text
    assert card.tone_color("still rising") in other
    assert "<script" not in text
    noted = dataclasses.replace(still, notes=("1 < 2 & <b>",))._repr_html_()
    assert "1 &lt; 2 &amp; &lt;b&gt;" in noted
    grid = sweep_of(still, moving)._repr_html_()
    assert "still rising" in grid
    assert len(grid) < 8000
    assert "<polyline" in course_of(still, moving)._repr_html_()


def test_a_result_without_a_finite_chain_has_a_card():
    loss = np.full((2, 10), np.nan, np.float32)
    lost = made_result(loss, loss[:, :2], SETTINGS, stopped={0: 0, 1: 3})
    assert "diverged" in lost._repr_html_()
    assert "unknown" in repr(lost)


def test_a_line_is_as_high_as_its_numbers():
    """Kills: a picture that is upside down, or off its frame."""
    text = card.sparkline(np.array([[0.0, 1.0, 2.0, 4.0]]), "x", level=0.0)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', text)[1].split()]
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)
    assert all(0 <= y <= card._HEIGHT and 0 <= x <= card._WIDTH for x, y in points)
    assert card.sparkline(np.full((2, 5), math.nan), "x") == ""


@pytest.mark.quick
def test_a_sweep_prints_its_table(still, moving):
    lines = str(sweep_of(still, moving)).splitlines()
    assert lines[0].split() == ["nbeta", "localization", "step_size", "LLC", "R-hat", "ESS", "verdict"]
    assert [line.split("  ")[-1] for line in lines[1:3]] == ["converged", "still rising"]
    assert ["*" in line for line in lines[1:3]] == [False, True]
    assert lines[3] == "* not converged"
    assert str(sweep_of(still, moving).reading) in "\n".join(lines)


@pytest.mark.quick
def test_what_has_not_converged_is_marked_alike_everywhere(still, moving):
    mark = moving.estimate_text("±")
    assert mark.endswith("*")
    assert f"LLC {moving.estimate_text('+/-')}  (4 chains" in str(moving)
    assert f"LLC {mark}: still rising" == moving.plot().get_suptitle()
    assert f"b: LLC {moving.estimate_text('+/-')}, loss" in str(slt.compare(still, moving))
    assert not still.estimate_text("±").endswith("*")


@pytest.mark.quick
def test_a_figure_shows_itself(still):
    """Kills: "<Figure size 620x600 with 2 Axes>" in a notebook that has not imported pyplot."""
    assert still.plot()._repr_png_().startswith(b"\x89PNG")
