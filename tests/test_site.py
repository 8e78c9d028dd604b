"""The site in docs/: what its pages must have, and its own scripts. ``make docs`` builds it and runs its examples."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import slt_jax as slt
from tests.test_documents import verdicts_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

from check_links import broken_links  # noqa: E402
from docstrings import with_lists  # noqa: E402
from page_kernels import cache  # noqa: E402
from repository_links import in_repository  # noqa: E402
from source_links import source_of  # noqa: E402


@pytest.mark.quick
def test_every_public_name_is_in_the_reference():
    """Kills: a name that is exported and documented nowhere."""
    reference, found = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), []
    for block in re.findall(r"^```\{eval-rst\}\n(.*?)^```$", reference, re.DOTALL | re.MULTILINE):
        module = ""
        for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)$", block, re.MULTILINE):
            if directive == "currentmodule":
                module = f"{name}."
            else:
                found.append(name if name.startswith("slt_jax.") else module + name)
    assert sorted(set(found)) == sorted(found)
    assert [name for name in slt.__all__ if f"slt_jax.{name}" not in found] == []


@pytest.mark.quick
def test_every_verdict_has_its_section():
    """Kills: a verdict without a picture of a run that leads to it."""
    verdicts = set().union(*(verdicts_of(file) for file in (ROOT / "slt_jax/diagnostics").glob("*.py")))
    text = (DOCS / "how-to/verdicts.md").read_text()
    sections = dict(re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert [verdict for verdict in sorted(verdicts) if "```{code-cell}" not in sections.get(verdict, "")] == []


@pytest.mark.quick
def test_pages_with_code_cells_are_run():
    """Kills: a page whose cells are shown and never run, because its header does not name a kernel."""
    pages = [page for page in DOCS.rglob("*.md") if "```{code-cell}" in page.read_text()]
    assert len(pages) >= 9
    assert [page.name for page in pages if not page.read_text().startswith("---\nfile_format: mystnb\n")] == []


@pytest.mark.quick
def test_versions_are_one():
    """Kills: a release whose citation or package has another version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project["version"] == slt.__version__ == cited


@pytest.mark.quick
def test_broken_links_are_found(tmp_path):
    """Kills: a check of the built site that passes whatever is in it."""
    (tmp_path / "index.html").write_text('<a href="a/page.html#here">x</a><a href="https://nowhere.invalid">x</a>')
    (tmp_path / "a").mkdir()
    (tmp_path / "a/page.html").write_text('<h1 id="here">x</h1><a href="../index.html">x</a><img src="none.png">')
    assert broken_links(tmp_path) == ["a/page.html: none.png"]
    (tmp_path / "a/page.html").write_text('<h1 id="there">x</h1><a href="#gone">x</a>')
    assert broken_links(tmp_path) == ["a/page.html: #gone", "index.html: a/page.html#here"]


@pytest.mark.quick
def test_links_out_of_the_pages_lead_to_the_repository():
    """Kills: a relative link to a script, which works where the source is read and not on the site."""
    address = "https://github.com/slt-jax/slt-jax"
    text = "[a](../../scaling/dln/README.md#truth) [b](../../scaling) [c](../performance.md) ![d](../images/demo.png)"
    assert in_repository(text, DOCS / "how-to", DOCS) == (
        f"[a]({address}/blob/main/scaling/dln/README.md#truth) [b]({address}/tree/main/scaling) "
        "[c](../performance.md) ![d](../images/demo.png)"
    )


@pytest.mark.quick
def test_outputs_are_of_the_present_code(tmp_path):
    """Kills: outputs of an older library that a page keeps, because its own cells did not change."""
    for package in ("slt_jax", "kernels", "scaling"):
        (tmp_path / package).mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "slt_jax/a.py").write_text("a = 1")
    first = cache(tmp_path / "kept", tmp_path)
    first.mkdir(parents=True)
    assert cache(tmp_path / "kept", tmp_path) == first
    (tmp_path / "slt_jax/a.py").write_text('"""Words."""\n\na = 1  # more words\n')
    assert cache(tmp_path / "kept", tmp_path) == first
    assert first.is_dir()
    (tmp_path / "slt_jax/a.py").write_text("a = 2")
    assert cache(tmp_path / "kept", tmp_path) != first
    assert not first.exists()


@pytest.mark.quick
def test_fields_of_a_record_become_a_list():
    """Kills: the fields of a record run together in one paragraph."""
    fields = ["``llc``: mean, as ``a``. ``low``, ``high``: an interval; ``n``: a", "count."]
    lines = ["A stage.", "", *fields, "", "``x`` is not."]
    assert with_lists(lines) == [
        "A stage.", "", "* ``llc``: mean, as ``a``.", "* ``low``, ``high``: an interval", "* ``n``: a count.", "",
        "``x`` is not.", "",
    ]  # fmt: skip


@pytest.mark.quick
def test_the_workflow_runs_targets_that_exist():
    """Kills: a job that calls a target of the Makefile by a name that it no longer has."""
    called = re.findall(r"run: make (\w+)", (ROOT / ".github/workflows/ci.yml").read_text())
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"lint", "test", "docs", "dist"} == set(called)
    assert set(called) <= set(targets)


@pytest.mark.quick
def test_names_of_the_reference_lead_to_their_lines():
    """Kills: a link to the wrapper of a decorated function, or to nothing for a property."""
    for name, start in [("estimate_llc", "@in_own_context\ndef estimate_llc("), ("LLCResult.bias", "    @functools")]:
        address, _, lines = (source_of("py", {"module": "slt_jax", "fullname": name}) or "").partition("#L")
        file = ROOT / address.partition("/blob/main/")[2]
        first, last = (int(number.lstrip("L")) for number in lines.split("-"))
        assert "\n".join(file.read_text().splitlines()[first - 1 : last]).startswith(start)
