"""Checkpoints from disk: both kinds, what is refused by name, and how much memory loading takes."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import save_file

from slt_jax.engine import mesh as meshes
from slt_jax.models import weights
from slt_jax.models.hub import load_checkpoint, load_pretrained, save_decoder
from slt_jax.models.layouts import read_config
from slt_jax.posterior import split
from tests.models import decoder_reference as reference
from tests.models.test_decoder import CONFIG, LAYOUTS, params_of, random_decoder

SHAPE = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 12,
    "intermediate_size": 20, "rope_theta": 100.0, "rms_norm_eps": 0.03, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 37, "n_positions": 12, "n_embd": 24, "n_layer": 2, "n_head": 3,
}  # fmt: skip
NEOX = {
    **SHAPE, "model_type": "gpt_neox", "num_attention_heads": 2, "intermediate_size": 96, "rotary_pct": 0.34,
    "layer_norm_eps": 0.1,
}  # fmt: skip
FALCON = {**SHAPE, "model_type": "falcon"}
FILES = {
    "gpt2": (GPT2, CONFIG, reference.gpt2_tensors),
    "neox": (NEOX, LAYOUTS["neox"], reference.neox_tensors),
    "llama": ({**SHAPE, "model_type": "llama", "tie_word_embeddings": True}, LAYOUTS["llama"], reference.llama_tensors),
    "qwen2": ({**SHAPE, "model_type": "qwen2"}, LAYOUTS["qwen2"], reference.llama_tensors),
    "qwen3": (
        {**SHAPE, "model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True},
        LAYOUTS["qwen3"], reference.llama_tensors,
    ),
    "phi3": (
        {**SHAPE, "model_type": "phi3", "sliding_window": 5, "tie_word_embeddings": True}, LAYOUTS["phi3"],
        reference.phi3_tensors,
    ),
}  # fmt: skip


def tensors_of(kind):
    _, config, to_tensors = FILES[kind]
    params = jax.tree.map(np.asarray, params_of(random_decoder(config)))
    return {name: np.ascontiguousarray(value) for name, value in to_tensors(params, config).items()}


def write(folder, kind, found=None, **fields):
    """A folder as a stranger would have it; ``fields`` change config.json."""
    folder.mkdir(exist_ok=True)
    save_file(tensors_of(kind) if found is None else found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**FILES[kind][0], **fields}))
    return folder


def write_sharded(folder, kind, parts=3):
    folder.mkdir(exist_ok=True)
    found, where = tensors_of(kind), {}
    for i in range(parts):
        names = sorted(found)[i::parts]
        save_file({name: found[name] for name in names}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(names, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(FILES[kind][0]))
    return folder


def assert_same_weights(decoder, config):
    assert dataclasses.replace(decoder.config, rotary_width=config.rotary_width) == config
    want = params_of(random_decoder(config))
    assert jax.tree.structure(params_of(decoder)) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params_of(decoder), want)


@pytest.mark.quick
@pytest.mark.parametrize("kind", FILES)
def test_every_layout_comes_back(kind, tmp_path, monkeypatch):
    """Kills: a transposition, heads in another order, query for key, a layer in another's place; buffers kept."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 3000)  # the embedding in pieces of 15 rows
    decoder, record = load_pretrained(write(tmp_path / "ck", kind))
    assert record["model_type"] == kind.replace("neox", "gpt_neox")
    assert_same_weights(decoder, FILES[kind][1])
    assert {x.dtype for x in jax.tree.leaves(nnx.state(decoder))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", FILES)
def test_several_files_and_several_devices(kind, tmp_path, monkeypatch):
    """Each device holds its own part of what the mesh's model axis divides, where the engine will want it."""
    monkeypatch.setattr(split, "LARGE", 300)
    mesh = jax.make_mesh((2, 2), ("chain", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    decoder, _ = load_checkpoint(write_sharded(tmp_path / "ck", kind), mesh=mesh)
    assert_same_weights(decoder, FILES[kind][1])
    cut = {"blocks/attention/q": 1, "blocks/attention/k": 1, "blocks/attention/o": 3}  # the width
    cut |= {"blocks/mlp/down": 2, "blocks/mlp/up": 1, "embedding/tokens": 1}
    if decoder.config.mlp_width > 24:
        cut |= {"blocks/mlp/down": 1, "blocks/mlp/up": 2}
    for path, x in nnx.to_flat_state(nnx.state(decoder)):
        axis, x = cut.get("/".join(path)), x.get_value()
        if axis is not None:
            assert x.addressable_shards[0].data.shape[axis] * 2 == x.shape[axis], path
        assert x.sharding.mesh == mesh
        assert x.sharding.is_equivalent_to(meshes.weight_sharding(mesh, jax.device_get(x)), x.ndim)


def test_an_own_folder_goes_to_several_devices(tmp_path, monkeypatch):
    """Kills: a mesh that is ignored."""
    monkeypatch.setattr(split, "LARGE", 300)
    mesh = jax.make_mesh((2, 2), ("chain", "model"), devices=jax.devices()[:4])
    save_decoder(tmp_path / "ck", random_decoder(CONFIG))
    decoder, _ = load_checkpoint(tmp_path / "ck", mesh=mesh)
    assert_same_weights(decoder, CONFIG)
    up = decoder.blocks.mlp.up.get_value()
    assert up.addressable_shards[0].data.nbytes * 2 == up.nbytes


def test_a_mesh_of_chains_alone_has_whole_copies(tmp_path):
    mesh = jax.make_mesh((2,), ("chain",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    decoder, _ = load_pretrained(write(tmp_path / "ck", "llama"), mesh=mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(nnx.state(decoder)))
    assert_same_weights(decoder, LAYOUTS["llama"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_types_become_float32(dtype, tmp_path):
    spared = (".masked_bias", ".attention.bias")
    found = {name: x if name.endswith(spared) else x.astype(dtype) for name, x in tensors_of("neox").items()}
    decoder, _ = load_pretrained(write(tmp_path / "ck", "neox", found))
    table = params_of(decoder)["embedding"]["tokens"]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, found["gpt_neox.embed_in.weight"].astype(np.float32))


def changed(kind, **changes):
    found = tensors_of(kind)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


ZEROS = np.zeros((37, 24), np.float32)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {"h__1__mlp__c_fc__bias": None}, r"tensors missing: h\.1\.mlp\.c_fc\.bias"),
        ("neox", {"embed_out__weight": None}, r"tensors missing: embed_out\.weight"),
        ("llama", {"model__layers__2__input_layernorm__weight": ZEROS[0]}, r"no place for: model\.layers\.2\.input_la"),
        ("gpt2", {"score__weight": ZEROS}, r"no place for: score\.weight"),
        ("llama", {"model__layers__0__self_attn__q_proj__bias": ZEROS[0]}, r"no place for: model\.layers\.0\.self_at"),
        ("gpt2", {"transformer__wte__weight": ZEROS}, r"'transformer\.wte\.weight' and 'wte\.weight' are one tensor"),
        ("gpt2", {"wte__weight": ZEROS[1:]}, r"'wte\.weight' has shape \(36, 24\); config\.json asks for \(37, 24\)"),
        ("gpt2", {"wte__weight": ZEROS.astype(np.int8)}, r"'wte\.weight' is of type I8; known are F16"),
        ("llama", {"lm_head__weight": ZEROS}, r"'lm_head\.weight' should repeat 'model\.embed_tokens\.weight'.*rows 0"),
        ("llama", {"lm_head__weight": ZEROS[1:]}, r"should repeat .* and has shape \(36, 24\), not \(37, 24\)"),
        ("neox", {"lm_head__weight": ZEROS}, r"'lm_head\.weight' should repeat 'embed_out\.weight'"),
    ],
)
def test_a_tensor_out_of_place_is_named(kind, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_pretrained(write(tmp_path / "ck", kind, changed(kind, **changes)))


def test_a_tied_head_may_be_left_out(tmp_path):
    decoder, _ = load_pretrained(write(tmp_path / "ck", "llama", changed("llama", lm_head__weight=None)))
    assert_same_weights(decoder, LAYOUTS["llama"])


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gpt2", {"model_type": "mamba", "architectures": ["Mamba"]}, r"'mamba' \(archit.*\['Mamba'.*--backend torch"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function = 'tanh' is not known"),
        ("llama", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True changes the math"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"n_head": 5}, "num_heads = 5 does not divide width = 24"),
        ("gpt2", {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map names code of its own, 'mine.Model'"),
        ("neox", {"rotary_pct": 0.25}, "rotary_width must be even"),
        ("neox", {"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
        ("llama", {"sliding_window": 8}, "sliding_window = 8"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn' is not supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "it needs .*'low_freq_factor'"),
        ("llama", {"rope_parameters": {"mrope_section": [1]}}, "has the fields .*mrope_section"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types holds .'sliding_attention'.*in this archit"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set, or not used"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types holds .'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ("phi3", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported.*--backend torch"),
        ("phi3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("phi3", {"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0"),
        ("phi3", {"model_type": "phi", "sliding_window": None, "qk_layernorm": True}, "qk_layernorm = True"),
        ("phi3", {"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm = True"),
        ("phi3", {"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("phi3", {"model_type": "falcon", "alibi": True}, "alibi = True"),
        (
            "phi3",
            {"model_type": "falcon", "new_decoder_architecture": True, "sliding_window": None},
            "new_decoder_arch",
        ),
        ("phi3", {"model_type": "falcon", "multi_query": False}, "multi_query = False"),
        ("phi3", {"model_type": "opt", "do_layer_norm_before": False, "ffn_dim": 3}, "do_layer_norm_before = False"),
        ("phi3", {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["local"], 3]]}, "each of 2 lay"),
    ],
)
def test_a_field_that_changes_the_mathematics_is_named(kind, fields, words, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        load_pretrained(write(tmp_path / "ck", kind, {}, **fields))


def test_code_that_transformers_has_is_no_code_of_its_own(tmp_path):
    code = {"AutoModelForCausalLM": "someone/model--modeling_phi3.Phi3ForCausalLM"}
    assert_same_weights(load_pretrained(write(tmp_path / "ck", "phi3", auto_map=code))[0], LAYOUTS["phi3"])


def test_the_context_of_an_old_falcon():
    """Its config.json names none: it is the default of transformers."""
    fields = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    _, config = read_config({**fields, "model_type": "falcon", "num_kv_heads": 71}, "here")
    assert (config.context_length, config.num_kv_heads, config.shared_norm) == (2048, 1, True)


def test_a_missing_field_is_named(tmp_path):
    folder = write(tmp_path / "ck", "gpt2")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in GPT2.items() if k != "n_embd"}))
    with pytest.raises(ValueError, match="a gpt2 needs the field 'n_embd'"):
        load_pretrained(folder)


def test_files_that_contradict_each_other_are_named(tmp_path):
    folder = write_sharded(tmp_path / "ck", "llama")
    index = folder / "model.safetensors.index.json"
    (folder / "model-2.safetensors").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=r"names model-2\.safetensors, which is not in the folder"):
        load_pretrained(folder)
    (tmp_path / "aside").rename(folder / "model-2.safetensors")
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if "norm" not in k}}))
    with pytest.raises(ValueError, match=r"tensor 'model\..*norm\.weight' is in model-.*says none"):
        load_pretrained(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is truncated or foreign"):
        load_pretrained(folder)
    index.unlink()
    save_file(tensors_of("llama"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"is in .*model-0\.safetensors and in model\.safetensors"):
        load_pretrained(folder)


def test_a_truncated_file_is_named(tmp_path):
    file = write(tmp_path / "ck", "gpt2") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_pretrained(tmp_path / "ck")


def test_a_folder_with_other_weights_is_named(tmp_path):
    (write(tmp_path / "ck", "gpt2") / "model.safetensors").rename(tmp_path / "ck" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file, but pytorch_model\.bin"):
        load_pretrained(tmp_path / "ck")


def test_a_name_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(write(tmp_path / "ck", "neox"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    decoder, _ = load_pretrained("someone/model-1.4b", revision="step3000")
    assert_same_weights(decoder, LAYOUTS["neox"])
    assert asked[0][:2] == ("someone/model-1.4b", "step3000")
    assert "tokenizer.json" in asked[0][2]


def test_a_name_that_nobody_has(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"'someone/nothing' is no folder here.* ConnectionError: no route"):
        load_checkpoint("someone/nothing")


def test_a_path_is_not_a_name(tmp_path):
    for path in (tmp_path / "no", "a/b/c", "./here"):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            load_checkpoint(path)


GROWTH = """
import sys
import jax
from flax import nnx
from slt_jax.models import hub, weights
weights.PIECE_BYTES = int(sys.argv[2])
def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
jax.block_until_ready(jax.numpy.zeros(3))
with open("/proc/self/clear_refs", "w") as switch:
    switch.write("5")  # the peak so far is forgotten
before = status("VmRSS:")
model, _ = hub.load_pretrained(sys.argv[1])
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
print((status("VmHWM:") - before) / sum(4 * x.size for x in leaves))
"""


def write_gpt2(folder, width, layers, vocab, dtype):
    """Random weights of GPT-2's layout."""
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (1024, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    inner = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": 4 * width, "mlp.c_proj": width}
    for i in range(layers):
        for name, out in inner.items():
            into = 4 * width if name == "mlp.c_proj" else width
            shapes |= {f"h.{i}.{name}.weight": (into, out), f"h.{i}.{name}.bias": (out,)}
        shapes |= {f"h.{i}.ln_{n}.{kind}": (width,) for n in "12" for kind in ("weight", "bias")}
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    save_file(found, folder / "model.safetensors")
    config = {"vocab_size": vocab, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("width", "layers", "vocab", "dtype", "piece"),
    [
        (256, 12, 50257, np.float32, 2**20),  # 90 MB
        pytest.param(768, 12, 50257, np.float32, weights.PIECE_BYTES, marks=pytest.mark.slow),
        pytest.param(768, 12, 50257, ml_dtypes.bfloat16, weights.PIECE_BYTES, marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, width, layers, vocab, dtype, piece):
    """Kills: a second copy on the host; a file that stays mapped. GPT-2 small's shape in the slow ones."""
    write_gpt2(tmp_path, width, layers, vocab, dtype)
    command = [sys.executable, "-c", GROWTH, str(tmp_path), str(piece)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < grown < 1.3


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = write(tmp_path, next(iter(FILES)))
    monkeypatch.setattr("slt_jax.machine.free_of_process", lambda: 1000.0)
    monkeypatch.setattr("slt_jax.models.weights.Plan.array", None)
    with pytest.raises(MemoryError, match=r"float32 takes .* MiB of this process, and 0 MiB are free"):
        load_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_checkpoint_of_a_wrapped_model(tmp_path, prefix):
    found = {prefix + name: value for name, value in tensors_of("llama").items()}
    with pytest.raises(ValueError, match=f"every tensor's name begins with '{prefix}'.*remove the prefix"):
        load_pretrained(write(tmp_path / "wrapped", "llama", found))


def test_an_index_that_names_no_files(tmp_path):
    folder = write_sharded(tmp_path / "sharded", "llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}}))
    with pytest.raises(ValueError, match=r"index.json is truncated or foreign: 'a' is in 5, not in a file"):
        load_pretrained(folder)
