"""Checkpoints in this library's own format: what comes back, and what is refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from slt_jax.models import hub
from slt_jax.models.hub import load_checkpoint, load_decoder, load_pretrained, save_decoder
from tests.models.test_decoder import CONFIG, LAYOUTS, losses_of, random_decoder


@pytest.mark.quick
def test_disk_gives_back_the_same_model(tmp_path):
    for name in ("gpt2", "llama", "olmo3", "smollm3"):
        config = dataclasses.replace(LAYOUTS[name], rope_scaling=None)
        model = random_decoder(config)
        save_decoder(tmp_path / name, model, {"step": 7})
        loaded, record = load_checkpoint(tmp_path / name)
        assert record["step"] == 7
        assert loaded.config == config
        np.testing.assert_array_equal(losses_of(loaded), losses_of(model))


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    for load in (load_decoder, load_checkpoint, load_pretrained):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            load(tmp_path)


@pytest.mark.parametrize("decoder", [{"vocab_size": 3}, {"width": "wide"}, [], {"rope_scaling": 3}])
def test_a_foreign_config_is_named(tmp_path, decoder):
    for text in ("{", "{}", "[]", json.dumps({"format": hub.FORMAT, "decoder": decoder})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is truncated or foreign"):
            load_checkpoint(tmp_path)


def test_a_folder_of_an_earlier_version_says_so(tmp_path):
    """Format 1 had the six fields of GPT-2, and an array for each layer."""
    old = {"vocab_size": 37, "context_length": 12, "width": 24, "num_layers": 2, "num_heads": 3, "norm_epsilon": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({"decoder": old, "step": 4}))
    with pytest.raises(ValueError, match=r"is in format 1 .* reads format 2\. .*demo, remove its folder"):
        load_checkpoint(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_decoder(tmp_path / "ck", random_decoder(CONFIG))
    config = tmp_path / "ck" / "config.json"
    record = json.loads(config.read_text())
    record["decoder"] |= {"width": 48, "head_width": 16, "rotary_width": 16}
    config.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not match its config"):
        load_decoder(tmp_path / "ck")


def test_truncated_weights_are_refused(tmp_path):
    save_decoder(tmp_path / "ck", random_decoder(CONFIG))
    files = [p for p in (tmp_path / "ck" / "params").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert files
    with pytest.raises(ValueError, match="params is truncated"):
        load_decoder(tmp_path / "ck")
