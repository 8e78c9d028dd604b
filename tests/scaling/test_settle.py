"""The study of the default on trained models: its page has the rows that are committed."""

import numpy as np
import pytest

from scaling.checkpoints import settle

README = settle.RESULTS.parents[1] / "README.md"


@pytest.mark.quick
def test_the_page_has_the_table_of_the_rows():
    """Kills: a table of other rows."""
    assert settle.table(settle.all_rows()) in README.read_text()


@pytest.mark.quick
def test_the_default_is_where_the_long_run_is():
    """Within 3 % of it, or not called converged."""
    rows = settle.all_rows()
    references = {row["problem"]: row["llc"] for row in rows if row["method"] == "reference"}
    default = [row for row in rows if row["method"] == "default"]
    assert {row["problem"] for row in default} >= {"IgLM-S", "digits MLP"}
    for row in default:
        off = row["llc"] / references[row["problem"]] - 1
        assert abs(off) < 0.031 or row["verdict"] != "converged", row


@pytest.mark.quick
def test_the_table_says_how_far_off():
    """Kills: a distance from another problem's reference, or in one error alone."""
    base = {"problem": "a", "seed": 0, "verdict": "converged", "gradients": 1600.0, "seconds": 2.0}
    rows = [{**base, "method": "reference", "llc": 10.0, "llc_stderr": 0.3},
            {**base, "method": "default", "llc": 11.0, "llc_stderr": 0.4},
            {**base, "problem": "b", "method": "default", "llc": 7.0, "llc_stderr": 0.4}]  # fmt: skip
    lines = settle.table(rows).splitlines()
    assert lines[2] == f"| a | default | 11 ± 0.4 | +10.0% | {1 / np.hypot(0.3, 0.4):+.1f} | converged | 1,600 | 2 |"
    assert lines[4].startswith("| b | default | 7 ± 0.4 |  |  |")
