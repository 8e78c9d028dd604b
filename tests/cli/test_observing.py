"""The commands for susceptibilities and influence, as a user types them."""

import json
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.cli.commands import main
from slt_jax.cli.probes import probe_of, words_of
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.hub import save_decoder
from slt_jax.posterior.data import as_source
from tests.durable import signalled

CONFIG = DecoderConfig(64, 8, 16, 1, 2)
TOKENS = np.random.default_rng(0).integers(0, 64, (100, 8)).astype(np.uint16)
OTHER = np.random.default_rng(1).integers(0, 64, (50, 8)).astype(np.uint16)
QUICK = ["--chains", "2", "--draws", "6", "--warmup", "2", "--batch-size", "4", "--step-size", "1e-5", "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_decoder(folder / "model", Decoder(CONFIG, rngs=nnx.Rngs(0)))
    np.save(folder / "t.npy", TOKENS)
    np.save(folder / "o.npy", OTHER)
    return folder


def call(files, command, *options):
    return main([command, str(files / "model"), "--tokens", str(files / "t.npy"), *QUICK, *options])


def posterior():
    params, loss_fn = slt.from_nnx(Decoder(CONFIG, rngs=nnx.Rngs(0)), sequence_loss)
    return slt.LocalPosterior(loss_fn, params, 100, 30.0, 300.0, chance_loss=np.log(64))


PROBE = np.concatenate([TOKENS[[0, 49, 99]], OTHER[[0, 24, 49]]]).astype(np.int32)


def test_susceptibilities_are_told_and_written(files, tmp_path, capsys):
    """Kills: a probe of other rows; groups on the wrong examples; a result that is not the one that is written."""
    outputs = [
        f"--{name}={tmp_path / file}" for name, file in (("out", "s.zarr"), ("plot", "s.png"), ("page", "s.html"))
    ]
    assert susceptibilities(files, *outputs) == 0
    told = capsys.readouterr().out
    saved = slt.load_susceptibilities(tmp_path / "s.zarr")
    assert saved.components == ["layer 0"]
    assert saved.chi.shape == (1, 6, 7)
    assert [str(g) for g in saved.dataset["group"].values] == ["own"] * 3 + ["other"] * 3
    assert "| component | own | other |" in told
    assert "one-chain" in told
    page = (tmp_path / "s.html").read_text()
    assert "1 component, 6 examples of 7 tokens" in page
    assert all(f" {word}" in page for word in PROBE[0, 1:])
    assert "<script" not in page
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert main(["report", str(tmp_path / "s.zarr"), "--out", str(tmp_path / "again.html")]) == 0
    assert "1 component" in (tmp_path / "again.html").read_text()


def susceptibilities(files, *more):
    probes = ["--probe", f"own={files / 't.npy'}", f"other={files / 'o.npy'}", "--examples", "3"]
    components = ["--components", "layers", "layer 0", "--estimator", "one-chain"]
    return call(files, "susceptibilities", *probes, *components, "--seed", "3", *more)


@pytest.mark.slow
def test_susceptibilities_are_the_librarys_own(files, tmp_path):
    """Kills: options that are not passed on; a probe of other rows."""
    assert susceptibilities(files, "--out", str(tmp_path / "s.zarr")) == 0
    own = slt.susceptibilities(
        posterior(), TOKENS.astype(np.int32), ["layer 0"], slt.Observable(PROBE, level="token"), key=3,
        estimator="one-chain", sampler=slt.underdamped(1e-5), num_chains=2, num_draws=6, num_warmup=2, batch_size=4,
    )  # fmt: skip
    saved = slt.load_susceptibilities(tmp_path / "s.zarr")
    np.testing.assert_allclose(saved.chi, own.chi, rtol=1e-4, atol=1e-7)


def test_influence_is_the_librarys_own(files, tmp_path, capsys):
    """Kills: the target's place among those that influence; words of another text."""
    outputs = [f"--{name}={tmp_path / file}" for name, file in (("out", "r.zarr"), ("page", "i.html"))]
    more = ["--on", f"other={files / 'o.npy'}", "--examples", "4", "--target", "2:3", "--json", *outputs]
    assert call(files, "influence", *more) == 0
    printed = json.loads(capsys.readouterr().out)
    result = slt.load_result(tmp_path / "r.zarr")
    found = slt.influence(result, of="of", on="on")
    assert found.of.size == found.on.size == 28
    assert printed["target"] == "example 2, token 3"
    assert printed["noise_floor"] == pytest.approx(found.noise_floor)
    top = found.top(2 * 7 + 3, 10)
    assert [row["value"] for row in printed["helps"]] == pytest.approx([value for _, value, _ in top.helps])
    words = words_of(OTHER[[0, 16, 32, 49]], None, 64)
    assert f"Influence on “{words[2][3].strip()}”, example 2, token 3" in (tmp_path / "i.html").read_text()


@pytest.mark.slow
def test_influence_of_whole_examples(files, capsys):
    assert call(files, "influence", "--examples", "5", "--target", "1") == 0
    assert "Influence on example 1 (correlations of the losses)" in capsys.readouterr().out


def test_ctrl_c_of_influence_prints_the_estimate_so_far_and_resumes(files, tmp_path, capsys):
    """Kills: half a result in the file that is meant for the whole one; an influence of half the draws."""
    options = ["--examples", "4", "--target", "2:3", "--json", "--sampler", "sgld", "--thinning", "1", "--draws", "30"]
    options += ["--checkpoint-dir", str(tmp_path / "run"), "--out", str(tmp_path / "r.zarr")]
    patch, _ = signalled(signal.SIGINT, 3)
    assert call(files, "influence", *options) == 130
    patch.undo()
    told = capsys.readouterr()
    assert "Interrupted after" in told.out
    assert "of 30 draws" in told.out
    assert "noise_floor" not in told.out
    assert told.err.splitlines()[-1] == "interrupted. The same command resumes it."
    assert not (tmp_path / "r.zarr").exists()
    assert call(files, "influence", *options) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "example 2, token 3"
    whole = slt.load_result(tmp_path / "r.zarr")
    assert not whole.interrupted
    assert whole.loss_trace.shape == (2, 30)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("susceptibilities", ["--components", "layer 9"], "component 'layer 9'"),
        ("susceptibilities", ["--probe", "code"], "--probe takes NAME=FILE, each name once, got 'code'"),
        ("susceptibilities", ["--examples", "0"], "--examples must be"),
        ("susceptibilities", ["--page", "/none/here.html"], "is not a folder that can be written to"),
        ("influence", ["--target", "x"], "--target takes EXAMPLE or EXAMPLE:TOKEN"),
        ("influence", ["--target", "9", "--examples", "4"], "there are 4 examples, numbered from 0"),
        ("influence", ["--target", "1:9"], "an example has 7 predicted tokens"),
        ("influence", ["--probe", "a=x.npy", "--on", "a=y.npy"], "--probe and --on have different files called 'a'"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(files, capsys, command, options, told):
    assert call(files, command, *options) == 2
    assert told in capsys.readouterr().err


@pytest.mark.quick
def test_probes_and_words(tmp_path):
    """Kills: rows that are not spread; groups that are not of the rows; words of the token before."""
    probe = probe_of({"a": as_source(TOKENS.astype(np.int32)), "b": as_source(OTHER.astype(np.int32))}, 60)
    assert probe.groups == ["a"] * 60 + ["b"] * 50
    assert (probe.rows[0], probe.rows[59], probe.rows[60:]) == (0, 99, list(range(50)))
    np.testing.assert_array_equal(probe.tokens[probe.rows.index(99)], TOKENS[99])
    assert words_of(np.array([[65, 66, 10, 7]]), None, 256) == [["B", "\n", "⟨7⟩"]]
    assert words_of(np.array([[65, 66]]), tmp_path, 300) == [[" 66"]]
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"Ġthe": 0, "cat": 1, "▁on": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="cat")).save(str(tmp_path / "tokenizer.json"))
    assert words_of(np.array([[1, 0, 1, 2, 9]]), tmp_path, 10) == [[" the", "cat", " on", " 9"]]
    padded = as_source({"tokens": OTHER.astype(np.int32), "count": np.full(50, 8, np.int32)})
    with pytest.raises(ValueError, match="a, b are not of one kind"):
        probe_of({"a": as_source(TOKENS.astype(np.int32)), "b": padded}, 3)
    assert jax.tree.leaves(probe_of({"b": padded}, 3).data)[0].shape[0] == 3
