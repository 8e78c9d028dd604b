"""The accelerator benchmark at a tiny size on a CPU: what it writes, what it does with a part that fails."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from scaling.throughput import accelerator, accelerator_torch
from scaling.throughput.work import GPT2_SMALL, decoder_flops

TINY = [
    f"--{name}={value}"
    for name, value in {
        "layers": 1, "width": 8, "heads": 2, "vocab": 11, "length": 6, "batch": 2, "chains": 2, "steps": 2, "rounds": 2,
    }.items()
]  # fmt: skip
# Compiling is nearly all that the command does here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def test_the_command_writes_every_part(tmp_path):
    out = tmp_path / "new" / "tiny.json"
    command = [sys.executable, "-m", "scaling.throughput.accelerator", "--out", str(out), "--no-peer"]
    done = subprocess.run(
        [*command, *TINY, "--draws=4", "--peak-tflops=2"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert list(record["parts"]) == ["machine", "device", "memory", "step", "estimate"]
    assert record["summary"]["failed"] == []
    step, memory, run = (record["parts"][name] for name in ("step", "memory", "estimate"))
    assert step["finite"]
    assert all(second > 0 for times in step["seconds"].values() for second in times)
    assert math.isfinite(step["overhead"])
    assert record["summary"]["tokens_per_s"] == pytest.approx(2 * 6 / step["step_s"])
    rate = step["flops_causal_attention"] / step["step_s"]
    assert record["summary"]["mfu_causal_attention"] == pytest.approx(rate / 2e12)
    assert record["summary"]["mfu_full_attention"] > record["summary"]["mfu_causal_attention"]
    held = 4 * step["weights"]  # one float32 copy
    assert held <= memory["bytes_per_chain"] < held + 1000
    assert memory["fixed_bytes"] > held  # w* at least
    assert memory["chains_that_fit"] is None  # a CPU tells no limit
    assert (run["draws"], run["projected"], run["stopped_chains"]) == (4, False, 0)
    assert 0 < run["sampling_minutes"] < run["call_minutes"] == run["minutes_for_draws_asked"]
    assert done.stdout.splitlines() == list(accelerator.table(record))
    assert any("2 chains x 4 draws" in line for line in accelerator.table(record))


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "failed.json", []

    def fails(job):
        raise RuntimeError("out of memory | while trying")

    def step(job):
        seen.append(json.loads(out.read_text())["parts"])
        flops = {"flops_full_attention": 1.0, "flops_causal_attention": 1.0}
        return {"step_s": 0.5, "bare_s": 0.4, "overhead": 0.25, "weights": 7, **flops}

    monkeypatch.setattr(accelerator, "memory", fails)
    monkeypatch.setattr(accelerator, "step", step)
    monkeypatch.setattr(accelerator, "estimate", lambda job, record: {"own": {"failed": "one half"}})
    with pytest.raises(SystemExit, match="1"):
        accelerator.main(["--out", str(out), "--no-peer", *TINY])
    assert seen[0]["memory"]["failed"] == "RuntimeError: out of memory | while trying"  # on disk before the next part
    record = json.loads(out.read_text())
    assert record["summary"]["failed"] == ["memory", "estimate"]
    assert record["summary"]["tokens_per_s"] == 2 * 6 / 0.5
    assert record["summary"]["mfu_full_attention"] is None
    first = capsys.readouterr().out
    assert "| memory failed | RuntimeError: out of memory / while trying |" in first
    accelerator.main(["--table", str(out)])
    assert capsys.readouterr().out == first


def test_an_estimate_that_would_take_too_long_is_cut_and_projected(tmp_path, monkeypatch):
    args = accelerator.options(["--out", str(tmp_path / "a.json"), *TINY, "--draws=200", "--budget-seconds=50"])
    record = accelerator.Record(args)
    record.found["parts"] = {"memory": {"compile_s": 5.0}, "step": {"step_s": 0.2}}
    settings = SimpleNamespace(cost={"seconds": 0.0}, memory={})
    result = SimpleNamespace(settings=settings, stopped={}, llc_raw=float("nan"))
    asked = {}
    monkeypatch.setattr(accelerator.slt, "estimate_llc", lambda *_, **options: asked.update(options) or result)
    job = SimpleNamespace(args=args, posterior=None, data=None, mesh=None)
    found = accelerator.estimate(job, record)
    assert asked["num_draws"] == found["draws"] == (50 - 2 * 5) / (0.2 * 2)
    assert (found["projected"], found["llc_raw"]) == (True, None)
    record.found["parts"]["step"] = {"failed": "no device"}
    with pytest.raises(RuntimeError, match="time of a step"):
        accelerator.estimate(job, record)


def test_peaks_of_known_devices(monkeypatch):
    def peak(kind, *words):
        known = SimpleNamespace(device_kind=kind, client=SimpleNamespace(platform_version="13"))
        monkeypatch.setattr(accelerator.jax, "devices", lambda: [known])
        return accelerator.device(accelerator.options(["--out=a.json", *words]))["bfloat16_peak_tflops"]

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989.4
    assert peak("NVIDIA H100 PCIe") == 756.5
    assert peak("NVIDIA A100-SXM4-80GB") == 312
    assert peak("another") is None
    assert peak("another", "--peak-tflops=3.5") == 3.5


def test_flops_by_weights_are_those_of_the_matrix_products():
    args = accelerator.options(["--out=a.json"])
    full, causal = accelerator.step_flops(args, 124_439_808)
    assert full == pytest.approx(decoder_flops(GPT2_SMALL, 16), rel=0.01)
    assert full - causal == 3 * 12 * 2 * 16 * 1024 * 1024 * 768


@pytest.mark.filterwarnings("ignore")  # another library's
def test_the_peer_at_a_tiny_size(capsys):
    pytest.importorskip("torch", reason="needs the extra 'parity'")
    pytest.importorskip("transformers", reason="needs the extra 'parity'")
    accelerator_torch.main([*TINY, "--no-compile"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    assert found["case"] == "eager"
    assert len(found["seconds"]) == 2
    assert found["tokens_per_s"] == pytest.approx(2 * 6 / found["step_s"])
    assert found["loss"] == pytest.approx(math.log(11), rel=0.1)
    ours = {"step_s": found["step_s"] / 2, "flops_full_attention": 1.0, "flops_causal_attention": 1.0}
    parts = {"peer": {"eager": found, "part_s": 1.0}, "step": ours}
    sums = accelerator.summary({"parts": parts, "options": {"batch": 2, "length": 6}})
    assert sums["torch_eager_step_over_ours"] == pytest.approx(2)


def test_what_a_stopped_peer_had_found_counts(monkeypatch):
    script = 'print(\'RESULT {"case": "eager", "step_s": 1}\', flush=True); import time; time.sleep(60)'
    started = subprocess.Popen
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(accelerator_torch.subprocess, "Popen", lambda _, **options: started(command, **options))
    found = accelerator_torch.run_apart(accelerator.options(["--out=a.json", *TINY, "--peer-seconds=1"]))
    assert found["eager"] == {"step_s": 1}
    assert "stopped after 1 s" in found["failed"]
