"""Plans of GPT-2 small, compiled again and compared with the committed ones; minutes, and both compilers."""

import json
from pathlib import Path

import pytest

from scaling.throughput import plans
from slt_jax.engine.topology import has_compiler

COMMITTED = Path(plans.__file__).parent / "results/plans.json"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["v5e:2x2", "v6e:2x2", "h100"])
def test_gpt2_small(tmp_path, device):
    """Kills: chains that exchange something; memory that grows; operations that are counted differently."""
    platform = "cuda" if device.startswith("h") else "tpu"
    if not has_compiler(platform):
        pytest.skip(f"needs the compiler for {platform}")
    found = plans.made(tmp_path / "model", plans.GPT2_SMALL, device)
    before = json.loads(COMMITTED.read_text())["plans"]["GPT-2 small"][device]
    assert found["collectives"] == {}
    assert found["device_bytes"]["total"] == pytest.approx(before["device_bytes"]["total"], rel=0.15)
    assert found["step_products"] == before["step_products"]
    (tmp_path / "plans.json").write_text(json.dumps({"plans": {"GPT-2 small": {device: found}}}, indent=1))
    print(*plans.table(json.loads((tmp_path / "plans.json").read_text())), sep="\n")


@pytest.mark.quick
def test_a_model_that_does_not_fit_has_a_row():
    """Kills: a table that needs numbers of a program that its compiler refused."""
    rows = list(plans.table({"plans": {"large": {"v5e:2x2": {"refused": "no memory"}}}}))
    assert rows[-1].startswith("| large | v5e:2x2 | 0 (")
