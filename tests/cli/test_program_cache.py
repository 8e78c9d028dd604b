"""Compiled programs kept on disk for the next command."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from slt_jax.cli import program_cache as programs
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.hub import save_decoder

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def untold(tmp_path, monkeypatch):
    """JAX as it is before anybody has told it of a cache, and a user's cache folder."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.quick
def test_where_and_how_much_is_kept(untold):
    folder = programs.keep_programs()
    assert folder is not None
    assert folder.parent == untold / "slt-jax" / "programs"
    assert folder.is_dir()
    told = [getattr(jax.config, name) for name in SETTINGS]
    assert told == [str(folder), programs.MAX_BYTES, programs.MIN_SECONDS, True]


def test_without_a_cache_folder_of_its_own_it_is_the_home_s(untold, monkeypatch):
    monkeypatch.setenv("HOME", str(untold))
    for nowhere in ("", "relative/is/ignored"):  # as the XDG base directory specification says
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        folder = programs.keep_programs()
        assert folder is not None
        assert folder.parent == untold / ".cache" / "slt-jax" / "programs"


@pytest.mark.quick
def test_a_cache_that_the_user_chose_stays(untold, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert programs.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not untold.exists()


@pytest.mark.quick
def test_a_user_who_wants_none_has_none(untold):
    jax.config.update("jax_enable_compilation_cache", False)
    assert programs.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not untold.exists()


def test_where_nothing_can_be_written_nothing_is_kept(untold, monkeypatch):
    untold.write_text("a file where the folder would be")
    assert programs.keep_programs() is None
    untold.unlink()
    monkeypatch.setattr(programs.os, "access", lambda path, mode: False)
    assert programs.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_another_processor_has_another_folder(untold, monkeypatch):
    folders = set()
    for features in ("flags : sse4_2 avx2\n", "flags : sse4_2 avx2 avx512f\n", OSError):

        def read(path, features=features):
            assert path == Path("/proc/cpuinfo")
            if features is OSError:
                raise OSError("no such file")
            return f"processor : 0\n{features}"

        monkeypatch.setattr(programs.Path, "read_text", read)
        jax.config.update("jax_compilation_cache_dir", None)
        folders.add(programs.keep_programs())
    assert len(folders) == 3


def test_another_checkpoint_of_the_same_shapes_is_not_compiled_again(tmp_path):
    """By the command itself, in processes of their own."""
    tokens = np.random.default_rng(0).integers(0, 64, 800).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def kept_after(seed):
        model = tmp_path / f"model-{seed}"
        save_decoder(model, Decoder(DecoderConfig(64, 8, 16, 1, 2), rngs=nnx.Rngs(seed)))
        words = [sys.executable, "-m", "slt_jax.cli", "llc", str(model), "--tokens", str(tmp_path / "tokens.npy")]
        words += ["--quiet", "--seed", str(seed), "--step-size", f"{seed + 1}e-5"]
        words += ["--chains", "2", "--draws", "6", "--warmup", "2", "--batch-size", "4"]
        run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return {path.name for path in tmp_path.glob("cache/slt-jax/programs/*/*-cache")}

    first = kept_after(0)
    assert any("run_chunk" in name for name in first)
    assert not [name for name in kept_after(1) - first if "run_chunk" in name]
