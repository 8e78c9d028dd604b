"""The documents: tables are those of committed results, the example runs as printed, links lead somewhere."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.dln.records import Store
from scaling.samplers import gradients, metric, networks, teachers, verdicts
from scaling.throughput import compare, memory, plans, sharded_plans, sweep
from slt_jax.kernels import timing

ROOT = Path(__file__).parents[1]
README, EVIDENCE = ROOT / "README.md", ROOT / "docs/evidence.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TRUTHS = "| problem | truth | m | exact at this nbeta | estimate | z | estimate / truth - 1 | verdict |"
TABLES = [
    ("README.md", compare.table, "scaling/throughput/results/cpu.json"),
    ("docs/performance.md", compare.table, "scaling/throughput/results/cpu.json"),
    ("docs/performance.md", compare.table, "scaling/throughput/results/cpu-intel.json"),
    ("docs/performance.md", compare.costs, "scaling/throughput/results/cpu.json"),
    ("docs/performance.md", compare.costs, "scaling/throughput/results/cpu-intel.json"),
    ("docs/performance.md", sweep.table, "scaling/throughput/results/sweep.json"),
    ("docs/performance.md", sweep.table, "scaling/throughput/results/sweep-accelerator.json"),
    ("docs/devices.md", plans.table, "scaling/throughput/results/plans.json"),
    ("docs/devices.md", sharded_plans.table, "scaling/throughput/results/sharded_plans.json"),
    ("docs/how-to/language-models.md", memory.table, "scaling/throughput/results/memory.json"),
    ("kernels/langevin/README.md", timing.table, "kernels/langevin/results/cpu.json"),
    ("kernels/cross_entropy/README.md", timing.table, "kernels/cross_entropy/results/cpu.json"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("page", "table", "file"), TABLES)
def test_tables_are_what_their_scripts_print(page, table, file):
    """Kills: a number typed by hand, or a result taken again whose page was forgotten."""
    lines = (ROOT / page).read_text().splitlines()
    assert [line for line in table(json.loads((ROOT / file).read_text())) if line not in lines] == []


@pytest.mark.quick
def test_tables_of_studies_are_those_of_their_rows(capsys):
    """Kills: rows taken again whose table was forgotten."""
    results = ROOT / "scaling/samplers/results"
    rows = [json.loads(line) for line in (results / "gradients-1k.jsonl").read_text().splitlines()]
    expected = list(gradients.table(rows))
    teachers.table(Store(results / "teachers-1k.jsonl", ("kind", "seed", "method")))
    metric.table(Store(results / "metric-1k.jsonl", metric.FIELDS))
    networks.tables(Store(results / "networks.jsonl", ("kind", "seed", "run")))
    expected += [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    for problems in verdicts.PROBLEMS:
        rows = [json.loads(line) for line in (results / f"verdicts-{problems}.jsonl").read_text().splitlines()]
        expected += list(verdicts.table(problems, rows))
    assert len(expected) == 6 + 17 + 19 + 19 + 12
    lines = EVIDENCE.read_text().splitlines()
    assert [line for line in expected if line not in lines] == []


@pytest.mark.quick
def test_rows_on_the_front_page_are_rows_of_the_evidence():
    """Kills: a row of the accuracy table that was taken again on one page alone."""
    lines = README.read_text().splitlines()
    rows = [line for line in lines[lines.index(TRUTHS) :] if line.startswith("|")][:7]
    assert [row for row in rows if row not in EVIDENCE.read_text().splitlines()] == []


def verdicts_of(page: Path) -> set[str]:
    """The first words that a check may give for its fault."""
    calls = [node for node in ast.walk(ast.parse(page.read_text())) if isinstance(node, ast.Call)]
    named = [(call, getattr(call.func, "id", "")) for call in calls if call.args]
    words = [call.args[name == "fault_if"] for call, name in named if name in ("fault_if", "Fault")]
    return {
        x.value for word in words for x in ast.walk(word) if isinstance(x, ast.Constant) and isinstance(x.value, str)
    }


@pytest.mark.quick
def test_all_verdicts_are_listed():
    """Kills: a rule that gives a verdict which no page explains."""
    found = set().union(*(verdicts_of(file) for file in (ROOT / "slt_jax/diagnostics").glob("*.py")))
    assert {"not resolved in float32", "still rising", "still falling", "depends on nbeta or localization"} <= found
    for name in ("get-started/features.md", "concepts/verdict.md", "how-to/verdicts.md"):
        text = " ".join((ROOT / "docs" / name).read_text().split())
        assert [verdict for verdict in sorted(found) if verdict not in text] == []


@pytest.mark.quick
def test_the_front_page_is_short():
    """Kills: evidence, features or history that creep back to the front page."""
    assert len(README.read_text().splitlines()) <= 130


def without_code(page: Path) -> str:
    return re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Kills: a file that moved, or a heading that was reworded, while a page still points to the old name."""
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    broken = []
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def in_form(text: str) -> str:
    """Without its numbers, which differ between processors, and on one line."""
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "0", " ".join(text.split()))


def test_the_example_runs_and_is_right(tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (example,) = (text for language, text in blocks if language == "python")
    (shown,) = (text for language, text in blocks if not language)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(shown.splitlines()) >= 2
    assert in_form(shown) == in_form("".join(done.stdout.splitlines(keepends=True)[: len(shown.splitlines())]))
    llc, stderr = map(float, re.search(r"LLC (\S+) \+/- (\S+)", done.stdout).groups())
    # d/2 nbeta h / (nbeta h + localization), h = 1 for x ~ N(0, 1)
    assert abs(llc - 5.488) < 4 * stderr
    assert stderr < 0.05
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert (tmp_path / "run.zarr").is_dir()
