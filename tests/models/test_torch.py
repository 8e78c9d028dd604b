"""PyTorch models through from_torch: losses and gradients as torch has them. Skipped without torch and torchax."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.cli.commands import main
from slt_jax.models.hub import load_pretrained
from slt_jax.models.restrict import choose, restricted
from slt_jax.models.torch_checkpoint import load_torch_checkpoint
from slt_jax.posterior.tree import path_of
from tests.models.decoder_reference import llama_tensors

torch = pytest.importorskip("torch", reason="needs the extra 'torch'")
if importlib.util.find_spec("torchax") is None:
    pytest.skip("needs the extra 'torch'", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="needs the extra 'torch'")

# Warnings of the other libraries are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4}
# Layouts that the reader knows, and many that it does not: linear attention, alibi, experts, state spaces.
LANGUAGE = {
    "GPT2LMHeadModel": GPT2, "LlamaForCausalLM": {"num_key_value_heads": 2},
    "MistralForCausalLM": {"sliding_window": 5}, "Gemma2ForCausalLM": {"head_dim": 6, "sliding_window": 5},
    "Qwen3ForCausalLM": {"head_dim": 6},
    "GPTNeoXForCausalLM": {}, "BloomForCausalLM": {"n_layer": 2, "n_head": 4}, "OPTForCausalLM": {"ffn_dim": 30},
    "FalconForCausalLM": {"alibi": True}, "MptForCausalLM": {"d_model": 24, "n_heads": 4, "n_layers": 2},
    "GPTBigCodeForCausalLM": GPT2, "CodeGenForCausalLM": {**GPT2, "n_embd": 32, "rotary_dim": 4},
    "StableLmForCausalLM": {"qk_layernorm": True}, "CohereForCausalLM": {"use_qk_norm": True},
    "NemotronForCausalLM": {"head_dim": 6}, "GlmForCausalLM": {"head_dim": 6}, "BioGptForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2}, "MambaForCausalLM": {"state_size": 4},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 61, (3, 8)).astype(np.int32)
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)


def language_model(kind):
    """Every parameter random, biases and norms too."""
    config = getattr(transformers, kind.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))
    more = {"word_embed_proj_dim": 24} if kind.startswith("OPT") else {}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(**{**SHAPE, **LANGUAGE[kind], **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torch_loss(model, tokens=TOKENS):
    ids = torch.tensor(tokens, dtype=torch.long)
    output = model(ids)
    logits = getattr(output, "logits", output)[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


def assert_same(pair, wanted_losses, model, batch):
    """Losses, and the norm of the gradient of their mean."""
    params, loss_fn = pair
    batch = jnp.asarray(batch)

    @jax.jit
    def own(params):
        losses, backward = jax.vjp(lambda p: loss_fn(p, batch), params)
        (gradient,) = backward(jnp.full(losses.shape, 1 / len(losses)))
        return losses, jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient)))

    losses, norm = own(params)
    np.testing.assert_allclose(losses, wanted_losses.detach().numpy(), rtol=1e-5)
    model.zero_grad()
    wanted_losses.mean().backward()
    wanted_norm = np.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    np.testing.assert_allclose(norm, wanted_norm, rtol=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_language_models_of_transformers(kind):
    """Kills: tied weights taken twice, dropout left on, a buffer as a weight, a weight as a constant."""
    model = language_model(kind)
    pair = slt.from_torch(model, slt.next_token_loss)
    assert model.training
    assert_same(pair, torch_loss(model.eval()), model, TOKENS)


def test_the_same_draws_as_the_reader(tmp_path):
    """One model by both ways, moved in the reader's weights: the losses along the chains differ by rounding alone."""
    model = language_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    decoder, _ = load_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(3, 61, (64, 8)).astype(np.int32)
    params, own = slt.from_nnx(decoder, lambda m, batch: m.losses(batch))
    own_params, of_torch = slt.from_torch(model, slt.next_token_loss)

    def through_torch(params, batch):
        named = llama_tensors(params, decoder.config)
        flat, treedef = jax.tree_util.tree_flatten_with_path(own_params)
        return of_torch(jax.tree.unflatten(treedef, [named[".".join(path_of(path))] for path, _ in flat]), batch)

    first, second = (
        slt.estimate_llc(
            slt.LocalPosterior(loss_fn, params, num_data=64, nbeta=20.0, localization=100.0), tokens,
            sampler=slt.sgld(1e-4), num_chains=2, num_draws=40, num_warmup=20, batch_size=16,
        )
        for loss_fn in (own, through_torch)
    )  # fmt: skip
    np.testing.assert_allclose(second.loss_trace, first.loss_trace, rtol=1e-4)
    assert abs(second.llc - first.llc) < 0.01 * first.llc_stderr


def test_a_vision_model_keeps_its_running_statistics():
    """Kills: BatchNorm's statistics of the batch, or as weights."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    model(torch.tensor(IMAGES * 3 + 1))  # moves the running statistics away from 0 and 1
    params, loss_fn = slt.from_torch(model, lambda forward, x: jax.nn.logsumexp(forward(x), axis=-1))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not any("running" in name or "num_batches" in name for name in names)
    model.eval()
    assert_same((params, loss_fn), model(torch.tensor(IMAGES)).logits.logsumexp(-1), model, IMAGES)


def test_a_vision_transformer():
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=16, patch_size=4)).eval()
    pair = slt.from_torch(model, lambda forward, x: jax.nn.logsumexp(forward(x), axis=-1))
    assert_same(pair, model(torch.tensor(IMAGES)).logits.logsumexp(-1), model, IMAGES)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_transformer_lens_bridges(kind, tmp_path):
    bridge = pytest.importorskip("transformer_lens.model_bridge", reason="needs transformer_lens")
    model = language_model(kind)
    model.save_pretrained(tmp_path / "model")
    hooked = bridge.TransformerBridge.boot_transformers(str(tmp_path / "model"), hf_model=model, device="cpu").eval()
    assert_same(slt.from_torch(hooked, slt.next_token_loss), torch_loss(hooked), hooked, TOKENS)


@pytest.mark.parametrize(
    "options", [{"act_fn": "gelu"}, {"attn_only": True, "normalization_type": "RMS"}], ids=["gelu", "attention only"]
)
def test_hooked_transformers(options):
    lens = pytest.importorskip("transformer_lens", reason="needs transformer_lens")
    try:
        config = lens.HookedTransformerConfig(
            n_layers=2, d_model=32, n_ctx=24, d_head=8, n_heads=4, d_vocab=61, device="cpu", seed=0, **options
        )
        model = lens.HookedTransformer(config).eval()
    except (ImportError, AttributeError):
        pytest.skip("this TransformerLens has no HookedTransformer any more")
    assert_same(slt.from_torch(model, slt.next_token_loss), torch_loss(model), model, TOKENS)


class Linear(torch.nn.Module):
    """What a user's model may do wrong, by name."""

    def __init__(self, fault=""):
        super().__init__()
        self.layer, self.fault = torch.nn.Linear(4, 2), fault
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        if self.fault == "random":
            x = torch.nn.functional.dropout(x, 0.5, training=True)
        if self.fault == "changes in place":
            self.count += 1
        if self.fault == "changes":
            self.count = self.count + 1
        if self.fault == "moves":
            x = x.to("cpu").cpu() + torch.zeros(4, device=torch.device("cpu"))
        return self.layer(x) + self.count


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("random", "the model is still random.*Turn dropout off"),
        ("changes in place", "the forward pass changes 'count'"),
        ("changes", "the forward pass changes 'count'"),
    ],
)
def test_a_loss_that_is_no_function_of_the_weights_is_refused(fault, words):
    params, loss_fn = slt.from_torch(Linear(fault), lambda forward, x: forward(x).sum(-1))
    with pytest.raises(ValueError, match=words):
        jax.jit(loss_fn)(params, np.ones((3, 4), np.float32))


def test_a_model_may_move_its_tensors():
    """Kills: a tensor that the model's code takes off JAX's device, or makes on another."""
    model = Linear("moves")
    params, loss_fn = slt.from_torch(model, lambda forward, x: forward(x).sum(-1))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(loss_fn)(params, x), model(torch.tensor(x)).sum(-1).detach(), rtol=1e-5)


def test_frozen_parameters_and_half_precision():
    model = Linear().to(torch.bfloat16)
    model.layer.bias.requires_grad_(False)
    params, _ = slt.from_torch(model, lambda forward, x: forward(x).sum(-1))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), params) == {"layer": {"weight": ((2, 4), "float32")}}
    assert model.layer.weight.dtype == torch.bfloat16


def test_parts_by_module_name():
    params, loss_fn = slt.from_torch(language_model("GPT2LMHeadModel"), slt.next_token_loss)
    posterior = slt.LocalPosterior(loss_fn, params, num_data=64)
    assert len(choose(params, "transformer.h.*.attn")) == 8
    chosen = choose(params, "transformer.h.1.mlp, transformer.wte")
    assert {path[:4] for path in chosen} == {("transformer", "h", "1", "mlp"), ("transformer", "wte", "weight")}
    assert restricted(posterior, "transformer.h.0.ln_1").num_free == 48
    with pytest.raises(ValueError, match=r"no module is called 'layer 0'.* got transformer\.h\.0\."):
        restricted(posterior, "layer 0")


@pytest.fixture
def unknown_layout(tmp_path):
    """A folder with a checkpoint that the reader refuses, and tokens."""
    language_model("MptForCausalLM").save_pretrained(tmp_path / "model")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(3, 61, 240))
    return tmp_path


def test_the_command_line_with_the_torch_backend(unknown_layout, capsys):
    words = [
        "llc",
        str(unknown_layout / "model"),
        "--tokens",
        str(unknown_layout / "t.npy"),
        "--seq-len",
        "8",
        "--quiet",
    ]
    assert main(words) == 2
    assert "model_type 'mpt'" in (said := capsys.readouterr().err)
    assert "--backend torch" in said
    part = ["--backend", "torch", "--only", "transformer.blocks.0.attn", "--step-size", "1e-5", "--json"]
    assert main([*words, *part, "--chains", "2", "--draws", "6", "--warmup", "2", "--batch-size", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["num_free"] == 4 * 24 * 24
    assert main([*words, "--backend", "torch", "--heads"]) == 2
    assert "Name modules with --only" in capsys.readouterr().err


def test_padding_through_torch(unknown_layout):
    model = load_torch_checkpoint(unknown_layout / "model")
    assert (model.vocab_size, model.context_length) == (61, 24)
    tokens = np.where(np.arange(8) < np.array([[8], [5], [3]]), TOKENS, 0)
    loss_fn = jax.jit(model.loss_fn)
    losses = loss_fn(model.params, {"tokens": tokens, "count": np.array([8, 5, 3])})
    alone = [float(loss_fn(model.params, jnp.asarray(TOKENS[i : i + 1, :n]))[0]) for i, n in enumerate((8, 5, 3))]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match="transformers cannot load"):
        load_torch_checkpoint(unknown_layout / "nothing")


def test_wrong_arguments(wrong_types):
    with pytest.raises(TypeError, match="wrong order"):
        slt.from_torch(slt.next_token_loss, Linear())
    with pytest.raises(TypeError, match="loss must be a function"):
        slt.from_torch(Linear(), None)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        slt.from_torch(Linear().requires_grad_(False), slt.next_token_loss)


def test_torch_is_not_imported_unless_asked_for():
    code = "import sys, slt_jax, slt_jax.cli.commands, slt_jax.models.hub; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
