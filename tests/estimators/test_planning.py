"""Plans, with this machine's own devices in the place of those that are described: all but their compilers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.cli.commands import main
from slt_jax.engine.topology import Devices
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.hub import describe_checkpoint, save_decoder
from slt_jax.models.restrict import restricted
from tests.small import leaking, refuses

CONFIG = DecoderConfig(61, 12, 16, 2, 2)
WIDTH, ROWS = 40, 64
WEIGHTS = WIDTH * WIDTH
DATA = np.ones((ROWS, WIDTH), np.float32)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(Devices, "describe", lambda self: jax.devices()[: self.count])


def square(w, x):
    return jnp.sum((x @ w) ** 2, axis=-1)


SHAPES = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)


def posterior(center=SHAPES, loss_fn=square):
    return slt.LocalPosterior(loss_fn, center, ROWS, 30.0, 300.0)


def planned(target=None, **more):
    given = {"device": "h100x4", "num_draws": 8, "num_warmup": 4, "batch_size": 4, "chunk_size": 12, **more}
    return slt.plan(posterior() if target is None else target, DATA, **{"sampler": slt.sgld(1e-5), **given})


def described_decoder(only=None):
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    target = slt.LocalPosterior(*reversed(slt.from_nnx(model, sequence_loss)), ROWS, 30.0, 300.0)
    return target if only is None else restricted(target, only)


def test_shapes_and_weights_have_one_plan():
    """Kills: a plan that depends on values; weights that are counted wrongly."""
    from_shapes, from_weights = planned().to_dict(), planned(posterior(jnp.zeros((WIDTH, WIDTH)))).to_dict()
    for found in (from_shapes, from_weights):
        assert found.pop("compile_seconds") > 0
    assert from_shapes == from_weights
    assert from_shapes["weights_free"] == WEIGHTS
    assert 4 * WEIGHTS < from_shapes["bytes_per_chain"] < 4 * WEIGHTS + 12 * 15 * 4  # and some numbers of each step
    assert from_shapes["collectives"] == {}


def test_memory_of_more_chains_is_predicted():
    """Kills: chains that count on all devices, a state that counts twice, a planner that is off by a third."""
    few, many = planned(num_chains=4), planned(num_chains=512)
    assert few.predicted(512) == pytest.approx(many.account.total, rel=0.15)
    assert few.predicted(512) > 10 * few.account.total
    assert few.chains_that_fit == pytest.approx(4 * few.devices.kind.memory / 1.05 / few.memory.chain, rel=0.01)


def test_the_sampler_and_what_is_observed_take_memory():
    """Kills: a second copy, or moments, that are not counted."""
    watched = slt.Observable(DATA[:8], keep="moments")
    both = planned(sampler=slt.underdamped(1e-5), observe={"probe": watched})
    assert both.memory.chain > 8 * WEIGHTS + 3 * 8 * 8 * 4
    assert both.draw.total == planned().draw.total * (1 + 8 / 4)


def test_a_collective_on_the_chain_axis_is_found():
    """Kills: a search that looks past it."""

    assert list(planned(posterior(loss_fn=leaking(square))).collectives) == ["chain"]


def test_time_follows_operations_length_and_utilization():
    """Kills: chains of one device at once; draws that cost nothing; a utilization that is not used."""
    one, two = planned(num_chains=4), planned(num_chains=8, utilization=0.2)
    arithmetic, traffic = one.step_seconds - one.moved / 3.35e12, one.moved / 3.35e12
    assert two.step_seconds == pytest.approx(2 * arithmetic + traffic)
    (part,) = one.parts
    assert (part.steps, part.draws, part.gradients) == (12, 8, 48)
    assert one.seconds(part) == pytest.approx(12 * one.step_seconds + 8 * one.draw_seconds)
    (part,) = two.parts
    assert two.seconds(part) == pytest.approx(2 * (12 * two.step_seconds + 8 * two.draw_seconds))
    assert 0 < one.draw_seconds < one.step_seconds


def test_a_precision_has_a_first_round_and_a_limit():
    """Kills: the limit of the budget in the place of the first round."""
    found = planned(num_draws=None, num_warmup=None, target_error=0.05, budget=40_000)
    first, most = found.parts
    assert (first.name, most.name) == ("first round", "at most, for an error of 5.0%")
    assert first.gradients == 10_000  # 16 % of the default for so few weights
    assert (most.gradients, most.steps) == (40_000, 10_000)
    assert "first round" in str(found)


def test_what_is_refused():
    """Kills: a number that is rounded in silence; weights of shapes that are sampled."""
    refuses(ValueError, lambda: planned(num_chains=6), "num_chains = 6", "Take 8")
    refuses(ValueError, lambda: planned(utilization=1.5), "utilization", "1.5")
    refuses(ValueError, lambda: planned(device="h1000"), "'h1000'")
    scalar = slt.LocalPosterior(lambda w, x: w * x[:, 0], jax.ShapeDtypeStruct((), jnp.float32), ROWS, 30.0, 300.0)
    refuses(ValueError, lambda: planned(scalar, model=2), "axis 'model' of 2", "Leave the axis out")
    refuses(ValueError, lambda: slt.estimate_llc(posterior(), DATA, num_draws=4), "shapes", "plan")


def test_a_model_that_does_not_fit_says_so():
    """Kills: chains that fit nowhere and are planned all the same."""
    found = planned(num_chains=4)
    tight = type(found)(**{**vars(found), "memory": type(found.memory)(**{**vars(found.memory), "available": 1000.0})})
    assert tight.chains_that_fit == 0
    assert "4 do not fit: the run needs about" in str(tight)


def test_parts_of_a_model_that_is_not_read():
    """Kills: a part's slices that need the weights."""
    assert described_decoder("layer 1 head 0").num_free == 4 * 16 * 8 + 3 * 8


def test_the_command_reads_no_weights(tmp_path, capsys):
    """Kills: a command that loads the checkpoint, or drops an option."""
    save_decoder(tmp_path / "model", Decoder(CONFIG, rngs=nnx.Rngs(0)))
    for file in (tmp_path / "model").rglob("*"):
        if file.is_file() and file.name != "config.json":
            file.unlink()
    assert describe_checkpoint(tmp_path / "model").config == CONFIG
    call = ["plan", str(tmp_path / "model"), "--device", "h100x2", "--batch-size", "4", "--quiet"]
    assert main([*call, "--json", "--draws", "5", "--warmup", "3", "--chains", "4", "--bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["chains"], found["devices"], found["weights_free"]) == (4, 2, described_decoder().num_free)
    assert found["lengths"][0]["steps"] == 8
    assert max(found["step_products"], key=found["step_products"].get) == "bfloat16"
    assert main([*call, "--draws", "5", "--precision", "0.1"]) == 2
    assert "Leave --draws out" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "model"), "--device", "v5e"]) == 2
    assert "Write v5e:2x2" in capsys.readouterr().err


@pytest.mark.quick
def test_the_text_has_all_that_was_asked_for():
    """Kills: a line that is forgotten."""
    found = planned()
    assert repr(found).startswith("<Plan: 4 chains on h100x4, ")
    text = str(found)
    for words in ("h100x4: H100 SXM, 4 devices", " fit; 4 planned", "a chain", "collectives: none", "FLOP a step",
                  "at 40% of the peak", "run: 12 steps", "compilation:", "note: "):  # fmt: skip
        assert words in text
