"""A trained checkpoint end to end: IgLM-S, an antibody language model in GPT-2's layout, from its wheel on PyPI.

Its licence is academic: it is fetched into a temporary folder and nothing of it is kept. The data are sequences sampled
from the model itself, so that its weights are the minimum of the expected loss.
"""

import json
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_jax.cli import language
from slt_jax.cli.commands import main
from slt_jax.models.hub import load_checkpoint

LENGTH, COUNT = 32, 512


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("iglm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "iglm==0.1.0"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("iglm 0.1.0 cannot be downloaded here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if "IgLM-S/" in n])
    source = next(folder.rglob("IgLM-S"))
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = folder / "model"
    model.mkdir()
    safetensors.save_file({k: v.clone().contiguous() for k, v in weights.items()}, str(model / "model.safetensors"))
    shutil.copy(source / "config.json", model)
    return model


def sampled(model, prefix, count, length, key):
    """``count`` sequences of the model's own, after a fixed prefix, uint16."""
    tokens = jnp.zeros((count, length), jnp.int32).at[:, : len(prefix)].set(jnp.asarray(prefix))
    step = jax.jit(
        lambda tokens, t, key: tokens.at[:, t].set(jax.random.categorical(key, model(tokens)[:, t - 1], axis=-1))
    )
    for t in range(len(prefix), length):
        tokens = step(tokens, t, jax.random.fold_in(key, t))
    return np.asarray(tokens, np.uint16)


@pytest.mark.slow
def test_the_llc_of_a_trained_checkpoint_and_of_its_layers(checkpoint, tmp_path, capsys):
    model, record = load_checkpoint(checkpoint)
    assert record["architectures"] == ["GPT2LMHeadModel"]
    data = sampled(model, [5, 6], COUNT, LENGTH, jax.random.key(0))
    np.save(tmp_path / "own.npy", data.ravel())
    common = ["llc", str(checkpoint), "--tokens", str(tmp_path / "own.npy"), "--seq-len", str(LENGTH), "--quiet"]
    short = ["--draws", "60", "--batch-size", "16", "--json"]
    assert main([*common, *short]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["settings"]["num_free"] > 1_000_000
    assert whole["llc"] > 5 * whole["llc_stderr"] > 0
    case = language.open_case(checkpoint, tokens=tmp_path / "own.npy", seq_len=LENGTH)
    names = [f"layer {i}" for i in range(model.config.num_layers)]
    import slt_jax as slt

    layers = language.refined(
        case.posterior, case.data, names, sampler=slt.sgld(), num_chains=4, num_draws=60, batch_size=16
    )
    for name, result in layers.items():
        print(name, result)
        assert 5 * result.llc_stderr < result.llc < whole["llc"] + 4 * whole["llc_stderr"]
