"""The README's example runs as printed, and finds what it says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


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
