"""The report: one page that holds the result, loads nothing, escapes all, and marks what the verdict is about."""

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from slt_jax.diagnostics import series
from slt_jax.report.page import render
from slt_jax.report.write import page_of, write_report
from slt_jax.results.spectral import EffectiveDimension
from tests.report.test_pictures import run
from tests.small import with_traces

EVIL = "<script>alert('x')</script> & \"more\""


pytestmark = pytest.mark.usefixtures("rhat")


class Reader(HTMLParser):
    """Tables as name -> cells, with the marks before the names; every element that names an address."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.marks, self.addresses, self.tags, self.images = {}, {}, [], set(), []
        self._cells, self._mark, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [(tag, name, value) for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self._cells = []
        if tag in ("th", "td"):
            self._cells.append("")
            self._inside = tag
        if tag == "span" and self._inside:
            self._inside = "mark"

    def handle_endtag(self, tag):
        if tag == "span" and self._inside:
            self._inside = "th"
        elif tag in ("th", "td"):
            self._inside = ""
        elif tag == "tr":
            name = self._cells[0].strip()
            self.rows[name], self.marks[name] = self._cells[1:], self._mark
            self._mark = ""

    def handle_data(self, data):
        if self._inside == "mark":
            self._mark = data
        elif self._inside:
            self._cells[-1] += data


def sound(**settings):
    """A result with nothing to complain about: nbeta L is a Gamma(3) about w*, as for six regular weights."""
    rng = np.random.default_rng(1)
    known = {"versions": {"slt-jax": "0.1.0", "jax": "0.10.2"}, "devices": "2 x cpu"}
    result = run(chains=4, draws=400, **{**known, **settings})
    loss, ones = 0.2 + rng.gamma(3.0, 0.1, (4, 400)), np.ones((4, 400))
    traces = {"virial": 2 * 10 * (loss - 0.2), "drift_sq": 20 * ones, "distance_sq": rng.gamma(3.0, 0.1, (4, 400))}
    return with_traces(result, loss=loss, kinetic=ones, **traces)


def page(result, path=None):
    return Reader(render(page_of(result, path)))


@pytest.mark.quick
def test_a_number_of_weights_is_told_whole(monkeypatch):
    monkeypatch.setattr("slt_jax.report.result.picture", lambda *_: None)
    page = render(page_of(sound(num_free=124_000_001)))
    assert Reader(page).rows["Half the weights"][0] == "62,000,000.5"


def test_a_page_holds_the_result(tmp_path):
    cost = {"seconds": 12.34, "steps_per_s": 5678.0, "process_peak_mib": 789}
    lines = ["step_size 0.001: 0.1 / curvature"]
    result = sound(calibration={"lines": lines}, cost=cost, gradients={"steps": 90, "probe": 10.0})
    saved = result.save(tmp_path / "r.zarr")
    out = write_report(saved, tmp_path / "r.html")
    text = out.read_text(encoding="utf-8")
    found = Reader(text)
    assert result.verdict == "converged"
    assert f"<h1>LLC {result.estimate_text('±')}</h1>" in text
    assert re.search(r'class="verdict good">\s*<strong><span aria-hidden="true">✓</span> converged</strong>', text)
    assert found.rows["LLC"][0] == result.estimate_text("±")
    assert found.rows["Raw to corrected"][0] == f"{result.llc_raw:.4g} → {result.llc:.4g}"
    assert found.rows["R-hat"][:2] == ["1.010", "at most 1.05"]
    assert found.rows["Half the weights"][0] == "3"
    assert found.rows["nbeta"][0] == "10"
    assert found.rows["step_size"][0] == "0.001"
    assert found.rows["num_warmup"][0] == "10"
    assert found.rows["minibatch gradients"][0] == "100 (steps 90, probe 10)"
    assert (found.rows["time"], found.rows["devices"]) == (["12.3 s"], ["2 x cpu"])
    for part in (lines[0], "2308.12108", "slt-jax 0.1.0, jax 0.10.2", "789 MiB", f"slt.load_result(&#39;{saved}&#39;)"):
        assert part in text
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_the_pictures_are_inside_and_nothing_is_loaded():
    """Kills: a picture by its path; a font, style or script from elsewhere."""
    text = render(page_of(sound()))
    found = Reader(text)
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert {(tag, name) for tag, name, _ in found.addresses} == {("img", "src"), ("a", "href")}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"\son\w+=", text)
    for image in found.images:
        head, _, body = image["src"].partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(body).decode()
        assert "</svg>" in svg
        assert set(re.findall(r'href="([^#])', svg)) == set()
        assert len(image["alt"]) > 20
    assert len(found.images) == 1


def test_the_same_result_is_the_same_page():
    assert render(page_of(sound())) == render(page_of(sound()))


@pytest.mark.usefixtures("undrawn")
def test_everything_is_escaped():
    result = dataclasses.replace(sound(sampler=EVIL, devices=EVIL, calibration={"lines": [EVIL]}), notes=(EVIL,))
    also = np.stack([result.loss_trace, result.baseline_trace, result.traces.gap_var], -1)[:, :, None]
    result = dataclasses.replace(with_traces(result, also=also), other_names=(EVIL,))
    text = render(page_of(result, f"{EVIL}.zarr"))
    assert "script" not in Reader(text).tags
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;alert(") >= 7
    assert EVIL in Reader(text).rows


def fault(name):
    """(result, R-hat) with one thing wrong."""
    result, rhat = sound(), 1.01
    loss, ones = result.loss_trace, np.ones_like(result.loss_trace)
    if name == "R-hat":
        return result, 1.2
    if name == "Trend":
        return with_traces(result, loss=loss + np.linspace(-0.06, 0.06, 400)), rhat
    if name == "From w*, from hot starts":
        return with_traces(result, loss=loss + 0.1 * (np.arange(4) % 2)[:, None], hot=10.0), rhat
    if name == "Virial ratio":
        return with_traces(result, virial=0.1 * result.traces.virial), rhat
    if name == "Bias of unrelaxed directions":
        return with_traces(result, probe={"owed": 0.2, "longer": 4.0}), rhat
    if name == "Kinetic temperature":
        return with_traces(result, kinetic=1.3 * ones), rhat
    if name == "Bias of the step size":
        return with_traces(result, drift_sq=8000 * ones), rhat
    if name == "Slope at w*":
        return with_traces(result, tilt=-0.1 * ones), rhat
    if name == "Degree of the loss":
        return with_traces(result, virial=10 * 10 * (loss - 0.2)), rhat
    raise ValueError(name)


FAULTS = {
    "R-hat": "chains disagree", "Trend": "still rising", "From w*, from hot starts": "chains disagree",
    "Virial ratio": "still rising", "Kinetic temperature": "biased by the step size",
    "Bias of the step size": "biased by the step size", "Degree of the loss": "depends on nbeta or localization",
    "Slope at w*": "not a minimum", "Bias of unrelaxed directions": "still rising",
}  # fmt: skip


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", FAULTS)
def test_what_the_verdict_is_about_is_marked(name, rhat):
    """Kills: limits other than the verdict's own; a cross in the wrong row."""
    result, rhat.value = fault(name)
    assert result.verdict == FAULTS[name]
    found = page(result)
    together = {"Trend": {"Rise in one more doubling of the run"}}  # a trend is a rise as well
    assert {row for row, mark in found.marks.items() if mark == "✗"} == {name} | together.get(name, set())


@pytest.mark.usefixtures("undrawn")
def test_a_sound_run_has_no_cross():
    marks = page(sound()).marks
    assert "✗" not in marks.values()
    unknown = {row for row, mark in marks.items() if mark == "–"}
    assert unknown == {
        "From w*, from hot starts", "Bias of minibatch noise", "Slope at w*", "Bias of unrelaxed directions",
        "Heat in a metric", "Loss below chance", "Directions below the localization",
    }  # fmt: skip
    assert marks["Acceptance of a step"] == ""


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_the_checks_of_the_verdict_and_no_others():
    """Kills: a limit typed on the page; a check that is not shown."""
    result, _ = fault("Virial ratio")
    found = page(result)
    symbols = {True: "✓", False: "✗", None: "–"}
    for check in result.health.checks:
        limited = check.limit_text != ""
        assert found.rows[check.name] == [check.value_text, check.limit_text or "no limit", check.meaning]
        assert found.marks[check.name] == (symbols[check.ok] if limited else "")


@pytest.mark.usefixtures("undrawn")
def test_slopes_are_marked_together():
    """A loss that rises and falls with nothing but the distance: the localization holds all of it."""
    result = sound()
    narrow = 0.2 + 0.3 + 0.1 * (result.loss_trace - 0.5)
    found = page(with_traces(result, loss=narrow, distance_sq=10 * (narrow - 0.2)))
    crossed = {row for row, mark in found.marks.items() if mark == "✗"}
    assert crossed == {"Slope in log nbeta", "Slope in log localization"}


@pytest.mark.usefixtures("undrawn")
def test_too_few_draws_are_marked(monkeypatch):
    monkeypatch.setattr(series, "_ess_and_rhat", lambda halves: (5.0, 1.01))
    result = sound()
    assert result.verdict == "too few draws"
    marks = page(result).marks
    assert (marks["Effective draws (ESS)"], marks["Error of the mean"]) == ("✗", "✗")
    assert marks["R-hat"] == "✓"


@pytest.mark.quick
def test_a_run_without_an_estimate_has_a_page():
    result = run(stopped={0: 5, 1: 6, 2: 7})
    text = render(page_of(result))
    found = Reader(text)
    assert "<h1>LLC unknown</h1>" in text
    assert "✗</span> diverged" in text
    assert "chain 0 at step 5, chain 1 at step 6, chain 2 at step 7 (3 of 3)" in text
    assert set(found.marks.values()) <= {"", "–", "✗"}
    assert [row for row, mark in found.marks.items() if mark == "✗"] == ["Chains that stayed finite"]
    assert found.rows["Trend"][0] == "not known"
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]+", "", text))


@pytest.mark.usefixtures("undrawn")
def test_further_data_sets_have_a_table():
    result = sound()
    also = np.stack([result.loss_trace + 1, result.baseline_trace, result.traces.gap_var], -1)[:, :, None]
    both = dataclasses.replace(with_traces(result, also=also), other_names=("prose",))
    found, read = page(both), both.also["prose"]
    assert read.llc == pytest.approx(result.llc_raw + 10)
    assert found.rows["prose"] == [f"{read.llc:.4g} ± {read.llc_stderr:.2g}", "1.010", "400", "0.2"]
    assert "Other data" not in render(page_of(result))


@pytest.mark.usefixtures("undrawn")
def test_friction_is_told_of_samplers_that_have_one():
    assert "friction" not in page(sound(friction=0.1)).rows
    assert page(sound(friction=0.1, family="baoab")).rows["friction"][0] == "0.1"


@pytest.mark.usefixtures("undrawn")
def test_watanabe_is_cited_where_wbic_is_told():
    told = sound(nbeta=100 / math.log(100))
    text = render(page_of(told))
    assert Reader(text).rows["WBIC"][0] == f"{told.wbic:.6g}"
    assert "watanabe13a" in text
    untold = render(page_of(sound()))
    assert "watanabe13a" not in untold
    assert "WBIC" not in untold


@pytest.mark.usefixtures("undrawn")
def test_all_numbers_are_there_as_json():
    result = sound()
    text = render(page_of(result))
    code = re.search(r"<details>.*?<pre>(.*?)</pre>", text, re.S)
    assert json.loads(code[1].replace("&#34;", '"').replace("&#39;", "'").replace("&lt;", "<")) == result.to_dict()


@pytest.mark.usefixtures("undrawn")
def test_an_existing_file_is_kept_unless_told(tmp_path):
    out = write_report(sound(), tmp_path / "r.html")
    first = out.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_report(run(), out)
    assert out.read_bytes() == first
    write_report(run(), out, overwrite=True)
    assert out.read_bytes() != first
    mine = tmp_path / "mine.html"
    mine.write_text("precious")
    with pytest.raises(FileExistsError, match="not a report of slt-jax"):
        write_report(run(), mine, overwrite=True)
    with pytest.raises(FileExistsError, match="not a report of slt-jax"):
        write_report(run(), tmp_path, overwrite=True)
    assert mine.read_text() == "precious"


@pytest.mark.usefixtures("undrawn")
def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "foreign.zarr").mkdir()
    with pytest.raises(FileNotFoundError, match="no result at"):
        write_report(tmp_path / "none.zarr", tmp_path / "r.html")
    with pytest.raises(ValueError, match="not a result written by slt-jax"):
        write_report(tmp_path / "foreign.zarr", tmp_path / "r.html")
    with pytest.raises(TypeError, match="got dict"):
        write_report({}, tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(sound(), tmp_path / "missing" / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.zarr"]


@pytest.mark.quick
@pytest.mark.usefixtures("undrawn")
def test_a_page_has_the_effective_dimension_beside_the_estimate():
    """Kills: one that is told where nothing was measured; the measured one in place of the given one."""
    result = sound()
    assert "Effective dimension" not in page(result).rows
    measured = sound(probe={"quadratic": 2.5})
    rows = page(measured).rows
    assert rows["Effective dimension"][0] == "2.5"
    assert rows["LLC less that"][0] == f"{measured.llc - 2.5:+.3g}"
    found = EffectiveDimension("gauss-newton", 1.0, 1.0, 6, 40, eigenvalues=np.array([-1.0, 0, 1, 1, 1, 1e9]))
    given = measured.with_effective_dimension(found)
    value = 0.5 * (1 + 3 * given.settings.nbeta / (given.settings.nbeta + given.settings.localization))
    rows = page(given).rows
    assert rows["Effective dimension"][0] == f"{value:.4g}"
    assert "1 of 6 eigenvalues is negative" in rows["Effective dimension"][1]
    assert rows["LLC less that"][0].startswith(f"{given.llc - value:+.3g} ± ")
