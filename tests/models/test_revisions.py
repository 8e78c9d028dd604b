"""Revisions of a repository, from an offline cache; torch's files; the checkpoints of a trajectory, one ahead."""

import shutil
import sys
import threading

import numpy as np
import pytest

from slt_jax.cli import course
from slt_jax.cli.course import open_course
from slt_jax.cli.language import Model, load_model
from slt_jax.models.hub import folder_of, load_checkpoint, name_and_revision
from tests.models.test_hub import FILES, assert_same_weights, write

REPOSITORY, COMMITS = "someone/model-1.4b", {"step1000": "a" * 40, "step2000": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub as huggingface_hub leaves it, with two revisions, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / ("models--" + REPOSITORY.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    for kind, (revision, commit) in zip(("llama", "qwen3"), COMMITS.items(), strict=True):
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        write(repository / "snapshots" / commit, kind)
        (repository / "snapshots" / commit / "tokenizer.json").write_text("{}")
    return repository


def test_a_revision_by_name_or_option(cache):
    """Kills: a revision that is dropped, so that all are the same."""
    for kind, revision in zip(("llama", "qwen3"), COMMITS, strict=True):
        for path, option in ((f"{REPOSITORY}@{revision}", None), (REPOSITORY, revision)):
            decoder, record = load_checkpoint(path, revision=option)
            assert record["model_type"] == kind
            assert_same_weights(decoder, FILES[kind][1])
            assert (folder_of(path, option) / "tokenizer.json").is_file()


def test_a_revision_that_is_not_there(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"its download at revision 'step3000' failed"):
        load_checkpoint(f"{REPOSITORY}@step3000")
    with pytest.raises(ValueError, match=r"names a revision, and revision = 'step2000' another"):
        load_checkpoint(f"{REPOSITORY}@step1000", revision="step2000")
    with pytest.raises(ValueError, match=r"is a folder, which has no revision 'step1000'"):
        folder_of(tmp_path, "step1000")


def test_a_folder_may_have_the_sign_in_its_name(tmp_path):
    folder = write(tmp_path / "model@best", "llama")
    assert name_and_revision(folder) == (str(folder), None)
    assert_same_weights(load_checkpoint(folder)[0], FILES["llama"][1])


def tokens(folder):
    np.save(folder / "t.npy", np.random.default_rng(0).integers(0, 37, 240))
    return folder / "t.npy"


def test_the_revisions_of_a_trajectory(cache, tmp_path):
    shutil.rmtree(cache / "snapshots" / COMMITS["step2000"])
    write(cache / "snapshots" / COMMITS["step2000"], "llama")
    case, centers = open_course([REPOSITORY], revisions=list(COMMITS), tokens=tokens(tmp_path))
    assert (case.length, list(centers)) == (12, [1000, 2000])
    want = load_model(f"{REPOSITORY}@step2000").params
    np.testing.assert_array_equal(centers[2000]()["embedding"]["tokens"], want["embedding"]["tokens"])


def test_steps_by_hand(tmp_path):
    names = [str(write(tmp_path / name, "llama")) for name in ("early", "late")]
    _, centers = open_course(names, steps=[7, 3], tokens=tokens(tmp_path))
    assert list(centers) == [7, 3]
    with pytest.raises(ValueError, match=r"has no training step. Name it step-100, or give --steps"):
        open_course(names, tokens=tokens(tmp_path))
    with pytest.raises(ValueError, match=r"--steps names 1 steps for 2 checkpoints"):
        open_course(names, steps=[1], tokens=tokens(tmp_path))
    with pytest.raises(ValueError, match=r"early and .*late are both of step 1"):
        open_course(names, steps=[1, 1], tokens=tokens(tmp_path))
    with pytest.raises(ValueError, match=r"--revisions are of one repository"):
        open_course(names, revisions=["a"], tokens=tokens(tmp_path))


def test_the_next_checkpoint_loads_meanwhile_and_no_other(monkeypatch):
    """Kills: every checkpoint in memory at once; one that is loaded twice on the way."""
    loaded = []

    def load(path, backend, revision):
        loaded.append((path, threading.current_thread() is threading.main_thread()))
        return Model(path, None, None, None)

    monkeypatch.setattr(course, "load_model", load)
    loaders = course.Ahead({step: course.Checkpoint(f"c{step}") for step in (1, 2, 3)}, "jax").loaders()
    assert [loaders[step]() for step in (1, 2, 3)] == ["c1", "c2", "c3"]
    assert loaded == [("c1", True), ("c2", False), ("c3", False)]
    assert loaders[1]() == "c1"
    loaders[2]()
    assert [path for path, _ in loaded[3:5]] == ["c1", "c2"]


def test_consolidated_weights_beside_the_others(tmp_path):
    folder = write(tmp_path / "ck", "llama")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert_same_weights(load_checkpoint(folder)[0], FILES["llama"][1])


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_torch_are_converted(wrapped, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = write(tmp_path / "ck", "llama")
    found = load_file(folder / "model.safetensors")
    torch.save({"state_dict": found} if wrapped else found, folder / "pytorch_model.bin")
    torch.save({"step": 3}, folder / "optimizer.pt")
    (folder / "model.safetensors").unlink()
    assert_same_weights(load_checkpoint(folder)[0], FILES["llama"][1])
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a file of weights that torch can load"):
        load_checkpoint(folder)


def test_weights_of_torch_without_torch(tmp_path, monkeypatch):
    folder = write(tmp_path / "ck", "llama")
    (folder / "model.safetensors").rename(folder / "model.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        FileNotFoundError, match=r"no \.safetensors file, but model\.pt\. Convert .*torch\.load\('model\.pt'"
    ):
        load_checkpoint(folder)
