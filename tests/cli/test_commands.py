"""The command line, as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.cli.commands import main
from slt_jax.cli.wording import result_in_options
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.hub import save_decoder
from tests.durable import signalled

CONFIG = DecoderConfig(64, 8, 16, 1, 2)
TOKENS = np.random.default_rng(0).integers(0, 64, 800).astype(np.uint16)
QUICK = ["--chains", "2", "--draws", "6", "--warmup", "2", "--batch-size", "4"]
SHORT = [*QUICK, "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a checkpoint ``model`` and the same tokens as .npy and as .bin."""
    folder = tmp_path_factory.mktemp("cli")
    save_decoder(folder / "model", Decoder(CONFIG, rngs=nnx.Rngs(0)))
    np.save(folder / "t.npy", TOKENS)
    TOKENS.tofile(folder / "t.bin")
    TOKENS.astype(np.uint32).tofile(folder / "t32.bin")
    return folder


def llc(files, *options, tokens="t.npy"):
    return main(["llc", str(files / "model"), "--tokens", str(files / tokens), *SHORT, *options])


def small_result():
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, np.zeros(3, np.float32), 40, localization=1.0)
    data = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    return slt.estimate_llc(posterior, data, sampler=slt.sgld(1e-3), num_chains=2, num_draws=8)


@pytest.mark.quick
def test_llc_is_the_librarys_own_call(files, capsys):
    assert llc(files, "--json", "--sampler", "sgld", "--step-size", "1e-5", "--seed", "3") == 0
    printed = json.loads(capsys.readouterr().out)
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, lambda m, batch: m.losses(batch))
    posterior = slt.LocalPosterior(loss_fn, params, num_data=100, nbeta=30.0, localization=300.0)
    own = slt.estimate_llc(
        posterior, TOKENS.reshape(100, 8).astype(np.int32), sampler=slt.sgld(1e-5), num_chains=2, num_draws=6,
        num_warmup=2, batch_size=4, key=3,
    )  # fmt: skip
    assert printed["llc"] == pytest.approx(own.llc, rel=1e-5)
    assert printed["settings"]["num_free"] == sum(x.size for x in nnx.to_flat_state(nnx.state(model)).leaves)


def test_llc_goes_on_until_it_is_precise(files, capsys):
    """Kills: a default of so many draws; limits that are not passed on; the plan of another run."""
    call = ["llc", str(files / "model"), "--tokens", str(files / "t.npy"), "--batch-size", "8", "--json"]
    assert main([*call, "--precision", "0.2", "--budget", "1000"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "until the error is 20.0% of the LLC: 1,000 gradients first, at most 1,000, of 64 tokens each" in told.err
    assert found["settings"]["sampler"] == "underdamped"
    assert found["settings"]["chance_loss"] == pytest.approx(np.log(64))
    assert 700 < sum(found["settings"]["gradients"].values()) < 1.03 * 1000  # the last measurement may add 2 %
    assert main([*call, "--quiet", "--draws", "5", "--budget", "100"]) == 2
    assert "--budget is for a run of no fixed length" in capsys.readouterr().err
    assert main([*call, "--quiet", "--precision", "-1"]) == 2
    assert "--precision must be a finite number > 0, got -1" in capsys.readouterr().err


def test_every_kind_of_token_file_gives_the_same(files, capsys):
    found = []
    for tokens, more in (("t.npy", []), ("t.bin", []), ("t32.bin", ["--dtype", "uint32"])):
        assert llc(files, "--json", "--step-size", "1e-5", *more, tokens=tokens) == 0
        found.append(json.loads(capsys.readouterr().out)["llc"])
    assert found[0] == found[1] == found[2]


def test_traces_and_picture_are_written(files, tmp_path, capsys):
    assert llc(files, "--out", str(tmp_path / "r.zarr"), "--plot", str(tmp_path / "r.png")) == 0
    result = slt.load_result(tmp_path / "r.zarr")
    out = capsys.readouterr().out
    assert out.startswith(result_in_options(str(result)).partition("\nTook")[0])
    assert result.loss_trace.shape == (2, 6)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    # not sampled again only to be refused at the end
    assert llc(files, "--out", str(tmp_path / "r.zarr")) == 2
    told = capsys.readouterr()
    assert "exists" in told.err
    assert not told.out


def test_options_reach_the_sampler(files, capsys):
    options = ["--nbeta", "7", "--localization", "9", "--step-size", "2e-5", "--thinning", "3", "--micro-batches", "2"]
    assert llc(files, "--json", "--only", "mlp", "--seq-len", "4", "--bfloat16", *options) == 0
    told = capsys.readouterr()
    settings = json.loads(told.out)["settings"]
    wanted = {
        "nbeta": 7.0, "localization": 9.0, "step_size": 2e-5, "thinning": 3, "num_data": 200, "num_chains": 2,
        "num_draws": 6, "num_warmup": 2, "batch_size": 4, "micro_batches": 2,
    }  # fmt: skip
    assert {name: settings.get(name) for name in wanted} == wanted
    block = nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0)).blocks.mlp, nnx.Param)
    assert settings["num_free"] == sum(x.size for x in nnx.to_flat_state(block).leaves)


def test_the_plan_says_what_will_happen_and_where_each_value_came_from(files, capsys):
    assert main(["llc", str(files / "model"), "--tokens", str(files / "t.npy"), *QUICK, "--nbeta", "20"]) == 0
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert re.fullmatch(r"model: ([\d,]+) weights, \1 of them free", lines[0])
    assert lines[1:4] == [
        "data: 100 examples of 8 tokens, 4 a step",
        "run: 2 chains of 2 + 6 steps, 16 gradients, 512 tokens",
        "nbeta 20 (given), localization 300 (as published), step_size calibrated",
    ]
    assert "step_size" in told.out


def test_a_table_of_all_heads(files, tmp_path, capsys):
    folder = tmp_path / "heads"
    assert llc(files, "--heads", "--step-size", "1e-5", "--out", str(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| part | weights | LLC ± standard error | R-hat | verdict |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| layer 0 head 0", "| layer 0 head 1"]
    assert f" {4 * 16 * 8 + 3 * 8:,} " in lines[2]
    assert ["* |" in line for line in lines[2:4]] == [not line.endswith("| converged |") for line in lines[2:4]]
    saved = slt.load_result(folder / "layer-0-head-1.zarr")
    assert llc(files, "--heads", "--step-size", "1e-5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layer 0 head 1"]["llc"] == pytest.approx(saved.llc, rel=1e-9)


def test_further_data_sets_are_read_at_the_same_draws(files, tmp_path, capsys):
    np.save(tmp_path / "code.npy", TOKENS[::-1].copy())
    also = ["--also", f"code={tmp_path / 'code.npy'}", f"same={files / 't.npy'}"]
    assert llc(files, "--json", "--step-size", "1e-5", *also) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["also"]) == ["code", "same"]
    assert found["also"]["code"]["llc"] != found["also"]["same"]["llc"]
    assert llc(files, "--heads", "--step-size", "1e-5", *also) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| part | weights | LLC ± standard error | on code, raw | on same, raw | R-hat | verdict |"
    assert lines[2].count("|") == lines[1].count("|") == 8
    for bad in (["code"], ["code="], ["a=x.npy", "a=y.npy"]):
        assert llc(files, "--also", *bad) == 2
        assert "--also takes NAME=FILE" in capsys.readouterr().err


def test_text_goes_through_the_checkpoints_tokenizer(files, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = tmp_path / "model"
    save_decoder(model, Decoder(CONFIG, rngs=nnx.Rngs(0)))
    rules.save(str(model / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in TOKENS) + " w1 w2")
    common = [*SHORT, "--step-size", "1e-5", "--json"]
    assert main(["llc", str(model), "--text", str(tmp_path / "t.txt"), *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["llc", str(model), "--tokens", str(files / "t.npy"), *common]) == 0
    assert found["llc"] == pytest.approx(json.loads(capsys.readouterr().out)["llc"], rel=1e-6)
    assert main(["llc", str(model), "--text", str(tmp_path / "t.txt"), "--seq-len", "8", *common]) == 0
    (tmp_path / "t.txt").write_text("w1 w2")
    assert main(["llc", str(model), "--text", str(tmp_path / "t.txt")]) == 2
    assert "has 2 tokens, fewer than two examples of 8" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text(" ".join(["w1"] * 14))
    assert main(["llc", str(model), "--text", str(tmp_path / "t.txt")]) == 2
    assert "Give more, or examples that are shorter: --seq-len 7 makes 2." in capsys.readouterr().err


def test_what_grouped_heads_share_is_said(tmp_path, files, capsys):
    save_decoder(tmp_path / "grouped", Decoder(DecoderConfig(64, 8, 16, 1, 2, num_kv_heads=1), rngs=nnx.Rngs(0)))
    options = [*QUICK, "--sampler", "sgld", "--step-size", "1e-5", "--heads"]
    assert main(["llc", str(tmp_path / "grouped"), "--tokens", str(files / "t.npy"), *options]) == 0
    assert "heads share keys and values, 2 by 2: these move with each" in capsys.readouterr().err


def test_the_same_command_resumes(files, tmp_path, capsys):
    found = []
    for _ in range(2):
        assert llc(files, "--json", "--checkpoint-dir", str(tmp_path / "run")) == 0
        found.append(json.loads(capsys.readouterr().out)["llc"])
    assert found[0] == found[1]
    assert llc(files, "--checkpoint-dir", str(tmp_path / "run"), "--nbeta", "31") == 2
    assert "nbeta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llc", "{0}/no", "--tokens", "{0}/t.npy"], "no config.json"),
        (["llc", "{0}/model", "--tokens", "{0}/no.npy"], "no.npy"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--step-size", "-1"], "--step-size must be a finite number > 0"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--only", "nothing"], "no part of a decoder is called"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--heads", "--only", "mlp"], "takes no --only"),
        (["llc", "{0}/model"], "either --tokens FILE or --text FILE"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--text", "{0}/t.npy"], "either --tokens FILE or --text FILE"),
        (["llc", "{0}/model", "--text", "{0}/t.npy"], "has no tokenizer.json"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--seq-len", "9"], "9"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--batch-size", "1000"], "1000"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--out", "{0}/no/r.zarr"], "{0}/no"),
        (["llc", "{0}/model", "--tokens", "{0}/t.npy", "--plot", "{0}/t.npy"], "{0}/t.npy exists"),
        (["demo", "--out", "{0}/t.npy"], "{0}/t.npy"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(files, capsys, arguments, words):
    assert main([a.format(files) for a in arguments]) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith("error: ")
    assert words.format(files) in told.err
    assert not told.out


def test_no_chain_left_is_exit_code_3(files, capsys):
    assert llc(files, "--step-size", "1e10") == 3
    out = capsys.readouterr().out
    assert out.startswith("LLC unknown")
    assert "every chain went non-finite" in out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ([], ["demo", "llc"]),
        (["demo"], ["--out", "--smoke", "--quiet"]),
        (["llc"], [
            "CHECKPOINT", "--tokens", "--text", "--heads", "--sampler", "--dtype", "--seq-len", "--nbeta",
            "--localization", "--step-size", "--chains",
            "--draws", "--warmup", "--thinning", "--batch-size", "--micro-batches", "--only", "--bfloat16", "--seed",
            "--out", "--plot", "--checkpoint-dir", "--json", "--quiet",
        ]),
    ],
)  # fmt: skip
def test_help_lists_everything(capsys, command, names):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert not [name for name in names if name not in text]


def test_an_interrupted_run_says_how_to_go_on(files, tmp_path):
    """Ctrl-C once the chains are running: exit code 130, and the words that the same command resumes it."""
    # A child of a background shell inherits SIGINT ignored, and would never see it.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from slt_jax.cli.commands import run; run()"
    command = [
        sys.executable, "-c", start, "llc", str(files / "model"), "--tokens", str(files / "t.npy"), "--chains", "2",
        "--warmup", "2", "--batch-size", "4", "--quiet", "--json", "--checkpoint-dir", str(tmp_path / "run"),
        "--draws", "200000", "--step-size", "1e-5",
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)
    os.kill(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err[-2000:]
    assert err.splitlines()[-1] == "interrupted. The same command resumes it."
    assert not out


def test_the_demo_small(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["demo", "--smoke", "--quiet", "--out", str(folder)]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Known truth: full-rank deep linear network 4-6-3: LLC")
    checkpoints = sorted((folder / "smoke" / "checkpoints").glob("step-*"))
    written = [p.stat().st_mtime_ns for c in checkpoints for p in sorted(c.rglob("*"))]
    rows = json.loads((folder / "smoke" / "table.json").read_text())
    assert [r["step"] for r in rows] == [2, 8, 20]
    assert len(checkpoints) == 3
    assert rows[0]["loss"] > rows[-1]["loss"]
    saved = slt.load_trajectory(folder / "smoke" / "trajectory.zarr")
    for row, result in zip(rows, saved.results["all"], strict=True):
        assert f"{row['loss']:.3f}" in first
        assert result.llc == pytest.approx(row["llc"], rel=1e-12)
    page = (folder / "smoke" / "report.html").read_text()
    assert "LLC at 3 checkpoints" in page
    assert "load_trajectory(" in page
    assert (folder / "smoke" / "llc-over-training.png").stat().st_size > 10_000

    assert main(["demo", "--smoke", "--quiet", "--out", str(folder)]) == 0
    assert [p.stat().st_mtime_ns for c in checkpoints for p in sorted(c.rglob("*"))] == written
    again = json.loads((folder / "smoke" / "table.json").read_text())
    assert [r["llc"] for r in again] == [r["llc"] for r in rows]


def test_sweep_is_the_librarys_own_call(files, tmp_path, capsys):
    words = ["sweep", str(files / "model"), "--tokens", str(files / "t.npy"), *SHORT, "--step-size", "1e-5", "1e-4"]
    words += ["--nbeta", "10", "30", "--localization", "100", "--seed", "3", "--out", str(tmp_path / "s.zarr")]
    assert main([*words, "--plot", str(tmp_path / "s.png")]) == 0
    out = capsys.readouterr().out
    found = slt.load_sweep(tmp_path / "s.zarr")
    assert found.dataset.sizes == {"nbeta": 2, "localization": 1, "step_size": 2}
    assert out.endswith(f"{found}\n")
    assert sum(line.startswith((" ", "nbeta  ")) for line in out.splitlines()) >= 5  # a row for each cell
    assert (tmp_path / "s.png").stat().st_size > 10_000
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, lambda m, batch: m.losses(batch))
    posterior = slt.LocalPosterior(loss_fn, params, num_data=100, nbeta=30.0, localization=100.0)
    own = slt.estimate_llc(
        posterior, TOKENS.reshape(100, 8).astype(np.int32), sampler=slt.sgld(1e-4), num_chains=2, num_draws=6,
        num_warmup=2, batch_size=4, key=jax.random.fold_in(jax.random.key(3), 3),
    )  # fmt: skip
    assert found.cell(nbeta=30, step_size=1e-4).llc == pytest.approx(own.llc, rel=1e-3)


def test_trajectory_reads_steps_from_names(files, tmp_path, capsys):
    for step in (5, 40):
        save_decoder(tmp_path / f"step-{step:04d}", Decoder(CONFIG, rngs=nnx.Rngs(step)))
    folders = [str(tmp_path / f"step-{s:04d}") for s in (40, 5)]
    words = ["trajectory", *folders, "--tokens", str(files / "t.npy"), *SHORT]
    options = ["--step-size", "1e-5", "--parts", "layer 0 head 1", "--out", str(tmp_path / "t.zarr")]
    assert main([*words, *options, "--plot", str(tmp_path / "t.png")]) == 0
    found = slt.load_trajectory(tmp_path / "t.zarr")
    assert found.steps == (5, 40)
    assert list(found.results) == ["all", "layer 0 head 1"]
    table, summary = capsys.readouterr().out.split("\n\n", 1)
    assert summary == f"{found}\n"
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert rows == [[f"| {step}", part] for step in (5, 40) for part in found.results]
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert main(["trajectory", str(files / "model"), *words[3:]]) == 2
    assert "has no training step. Name it step-100" in capsys.readouterr().err
    assert main(["trajectory", words[1], words[1], *words[3:]]) == 2
    assert "are both of step 40" in capsys.readouterr().err


def test_report_of_each_kind(files, tmp_path, capsys):
    result = small_result()
    result.save(tmp_path / "r.zarr")
    assert main(["report", str(tmp_path / "r.zarr")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    assert f"{result.llc:.4g}" in (tmp_path / "r.html").read_text()
    assert main(["report", str(tmp_path / "r.zarr")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "r.zarr"), "--overwrite"]) == 0
    assert main(["report", str(tmp_path / "none.zarr")]) == 2


@pytest.mark.quick
def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"slt-jax {slt.__version__}, jax {jax.__version__}")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("llc", ["--chains", "0"], "--chains must be a whole number >= 1, got 0"),
        ("llc", ["--step-size", "-1"], "--step-size must be a finite number > 0, got -1"),
        ("sweep", ["--nbeta", "30", "0"], "--nbeta must be a finite number > 0, got 0"),
        ("trajectory", ["--thinning", "0"], "--thinning must be a whole number >= 1, got 0"),
    ],
)
def test_numbers_are_checked_before_a_checkpoint_is_read(command, options, words, capsys):
    assert main([command, "no-such-checkpoint", "--tokens", "no.npy", *options]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert "model:" not in told.err


def test_what_the_data_do_not_allow_is_refused_before_the_plan(files, capsys):
    """Kills: a plan of a run that cannot be made."""
    assert llc(files, "--step-size", "1e-5", "--batch-size", "101") == 2
    told = capsys.readouterr().err
    assert "--batch-size 101 is more than the 100 examples of the data. Take --batch-size 100" in told
    assert "model:" not in told


def test_ctrl_c_prints_the_result_so_far_and_resumes(files, tmp_path, capsys):
    """Kills: half a result in the file that the whole one is meant for."""
    options = ["--sampler", "sgld", "--step-size", "1e-5", "--draws", "30", "--out", str(tmp_path / "r.zarr")]
    resumable = [*options, "--checkpoint-dir", str(tmp_path / "run")]
    patch, _ = signalled(signal.SIGINT, 3)
    assert llc(files, *resumable) == 130
    patch.undo()
    told = capsys.readouterr()
    assert "Interrupted after" in told.out
    assert "interrupted. The same command resumes it." in told.err
    assert not (tmp_path / "r.zarr").exists()
    assert llc(files, *resumable) == 0
    assert not slt.load_result(tmp_path / "r.zarr").interrupted
