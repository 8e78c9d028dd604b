"""The README's example runs as printed, and finds what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.throughput import compare, memory, sweep
from slt_jax.kernels import timing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLES = [
    ("README.md", compare.table, "scaling/throughput/results/cpu.json"),
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
