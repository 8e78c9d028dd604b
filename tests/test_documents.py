"""The README's example runs as printed, and finds what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.dln.records import Store
from scaling.samplers import gradients, metric, networks, teachers, verdicts
from scaling.throughput import compare, memory, sweep
from slt_jax.kernels import timing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLES = [
    ("README.md", compare.table, "scaling/throughput/results/cpu.json"),
    ("README.md", compare.table, "scaling/throughput/results/cpu-intel.json"),
    ("README.md", compare.costs, "scaling/throughput/results/cpu.json"),
    ("README.md", compare.costs, "scaling/throughput/results/cpu-intel.json"),
    ("docs/sweeps.md", sweep.table, "scaling/throughput/results/sweep.json"),
    ("docs/sweeps.md", sweep.table, "scaling/throughput/results/sweep-accelerator.json"),
    ("docs/transformers.md", memory.table, "scaling/throughput/results/memory.json"),
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
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    at_large = [line.replace("| 1e+08 ", "") for line in printed if "| 1e+08 |" in line]
    expected += [line for line in printed if "| nbeta |" not in line and "e+0" not in line] + at_large
    networks.tables(Store(results / "networks.jsonl", ("kind", "seed", "run")))
    expected += [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "| 40,000 |" not in line
    ]
    for problems in verdicts.PROBLEMS:
        rows = [json.loads(line) for line in (results / f"verdicts-{problems}.jsonl").read_text().splitlines()]
        expected += list(verdicts.table(problems, rows))
    assert len(expected) == 6 + 17 + 9 + 13 + 9
    lines = README.read_text().splitlines()
    assert [line for line in expected if line not in lines] == []


def test_the_example_runs_and_is_right(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run([sys.executable, "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    llc, stderr = map(float, re.search(r"LLC (\S+) \+/- (\S+)", done.stdout).groups())
    # d/2 nbeta h / (nbeta h + localization), h = 1 for x ~ N(0, 1)
    assert abs(llc - 5.488) < 4 * stderr
    assert stderr < 0.05
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert (tmp_path / "run.zarr").is_dir()
