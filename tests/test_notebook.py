"""A notebook, executed by a kernel: what its cells show."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
import jax.numpy as jnp
import numpy as np
import slt_jax as slt
data = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, jnp.zeros(3), 400, localization=1.0)
posterior
""",
    "result = slt.estimate_llc(posterior, data, sampler=slt.sgld(1e-3), num_draws=4000)",
    "result",
    "result.plot()",
    """
grid = slt.sweep(posterior, data, step_size=[1e-3, 2e-3], sampler=slt.sgld(), num_draws=200, progress=False)
print(grid)
grid
""",
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The outputs of each cell, run by an ipykernel without widgets."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    home = tmp_path_factory.mktemp("jupyter")
    spec = home / "kernels" / "here"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({**kernel, "display_name": "here"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home))
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # shared with tests that may be writing an entry
        root = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
        NotebookClient(notebook, timeout=300, kernel_name="here", resources={"metadata": {"path": str(home)}}).execute()
    return [cell["outputs"] for cell in notebook.cells]


def shown(outputs):
    """What the last line of a cell shows, by type."""
    (last,) = (output["data"] for output in outputs if output["output_type"] == "execute_result")
    return last


def test_a_posterior_and_a_result_are_short(cells):
    """Kills: 5,403 characters of arrays."""
    assert shown(cells[0])["text/plain"].startswith("<LocalPosterior: 3 weights, loss <lambda>, num_data 400")
    result = shown(cells[2])
    assert result["text/plain"].startswith("<LLCResult: LLC 1.")
    assert len(result["text/plain"]) < 200
    assert "<svg" in result["text/html"]
    assert len(result["text/html"]) < 8000


def test_progress_is_one_output_that_ends_with_the_time_it_took(cells):
    """Kills: a bar for each update; a warning that ipywidgets is not installed; nothing."""
    (output,) = (output for output in cells[1] if output["output_type"] == "display_data")
    printed = "".join(output["text"] for output in cells[1] if output["output_type"] == "stream")
    assert "sampling" not in printed
    assert "ipywidgets" not in printed
    text = output["data"]["text/plain"]
    assert "sampling: 8,000 steps of 4 chains, about" in text
    assert text.splitlines()[-1].startswith("  took ")
    assert text in output["data"]["text/html"]


def test_a_plot_is_a_picture(cells):
    assert shown(cells[3])["image/png"]


def test_a_sweep_prints_its_table_and_shows_a_card(cells):
    printed = "".join(output["text"] for output in cells[4] if output["output_type"] == "stream")
    assert printed.splitlines()[0].split() == ["nbeta", "localization", "step_size", "LLC", "R-hat", "ESS", "verdict"]
    found = shown(cells[4])
    assert found["text/plain"].startswith("<Sweep: 2 cells over nbeta")
    assert "step_size" in found["text/html"]
