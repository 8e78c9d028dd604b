"""Transformers of known learning coefficient: the gauge formula, the carried difference, spectra, rows and tables."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from scaling.dln.records import Store
from scaling.transformers import (
    carried,
    configurations,
    difference,
    methods,
    rank,
    run,
    singular,
    spectrum,
    tables,
    teachers,
)
from scaling.transformers.gauge import gauge_dimension, product_gauge, terms
from scaling.transformers.networks import AttentionConfig, MLPConfig
from slt_jax.models import DecoderConfig

RESULTS = Path(rank.__file__).parent / "results"
CONFIGURATIONS = configurations.CONFIGURATIONS
FAST = ("layernorm, no bias of the output", "rms rotary tied", "mlp relu")


def wide(tree):
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), tree)


# --- the formula


@pytest.mark.quick
def test_ranks_that_were_published_with_the_design_of_the_study():
    """Counted by hand and found numerically before this code was written."""
    everything = {"tied_head": False, "activation": "gelu"}
    small = DecoderConfig(7, 5, 4, 1, 2, mlp_width=6, **everything)
    large = DecoderConfig(7, 5, 6, 1, 2, mlp_width=8, **everything)
    plain = {"norm": "rms", "qkv_bias": False, "out_bias": False, "mlp_bias": False, "gated_mlp": True}
    rms = DecoderConfig(7, 5, 6, 1, 2, mlp_width=8, activation="silu", tied_head=False, **plain)
    found = [(teachers.num_weights(c), teachers.num_weights(c) - gauge_dimension(c)) for c in (small, large, rms)]
    assert found == [(238, 138), (428, 269), (420, 331)]
    without = [teachers.num_weights(c) - gauge_dimension(c, epsilon=False) for c in (small, rms)]
    assert without == [137, 330]


def test_matrices_with_the_same_product():
    """Kills GL(inner) where the inner width is not the smallest."""
    rng = np.random.default_rng(0)
    for inner, before, after in ((2, 3, 4), (5, 3, 4), (3, 2, 6), (4, 4, 2)):
        x, y = rng.standard_normal((before, inner)), rng.standard_normal((inner, after))
        jacobian = np.concatenate([np.kron(np.eye(before), y.T), np.kron(x, np.eye(after))], axis=1)
        assert product_gauge(inner, before, after) == jacobian.shape[1] - np.linalg.matrix_rank(jacobian)


@pytest.mark.parametrize("name", FAST)
def test_the_formula_is_the_numerical_rank(name):
    row = rank.row_of(name)
    assert row["rank"] == row["formula"]
    assert row["gap"] > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in FAST])
def test_the_formula_is_the_numerical_rank_of_every_configuration(name):
    row = rank.row_of(name, seed=1)
    assert row["rank"] == row["formula"]
    assert row["gap"] > 4


def test_the_formula_is_that_of_the_committed_ranks():
    """Kills a change of any term, without a Jacobian: the numerical ranks are in the file."""
    rows = {row["configuration"]: row for row in json.loads((RESULTS / "rank.json").read_text())["rows"]}
    assert set(rows) == set(CONFIGURATIONS)
    assert len(rows) >= 40
    for name, (config, epsilon) in CONFIGURATIONS.items():
        assert rows[name]["rank"] == teachers.num_weights(config) - gauge_dimension(config, epsilon), name


def test_every_term_is_seen_by_a_configuration():
    """A term that is 0 everywhere would not be tested by the ranks."""
    found = [terms(config, epsilon) for config, epsilon in CONFIGURATIONS.values()]
    for name in {name for one in found for name in one}:
        assert len({one[name] for one in found if name in one}) > 1, name


def test_layouts_without_a_formula_are_refused():
    after = configurations.tiny(norm_placement="after", tied_head=False)
    with pytest.raises(ValueError, match="no gauge formula for this layout: norm_placement 'after' is derived for RMS"):
        gauge_dimension(after)
    few = configurations.tiny(vocab_size=6, positions="rotary", parallel_residual=True, tied_head=False)
    with pytest.raises(ValueError, match="sees too few different vectors: raise vocab_size"):
        gauge_dimension(few)
    with pytest.raises(ValueError, match="tokens must span it"):
        gauge_dimension(AttentionConfig(4, 5, 6, 1, 2))


def test_no_gap_is_full_rank_and_the_gap_is_the_widest():
    assert rank.rank_of(np.array([1.0, 0.1, 1e-4])).rank == 3
    found = rank.rank_of(np.array([1.0, 1e-3, 1e-7, 3e-16, 1e-16]))
    assert found.rank == 3
    assert found.gap == pytest.approx(math.log10(1e-7 / 3e-16))


# --- the carried difference

CARRIED = ("layernorm, softcaps", "rms rotary, joint query-key norm, grouped", "norms around, 2 layers, query-key norm")
CARRIED_SLOW = (
    "layernorm, parallel, shared norm", "layernorm, head bias", "rms rotary, one layer without", "rms rotary, offset",
    "norms after", "layernorm, partly rotary", "layernorm, relu", "layernorm, no bias of the output",
)  # fmt: skip


@pytest.mark.parametrize("name", [*CARRIED, *(pytest.param(n, marks=pytest.mark.slow) for n in CARRIED_SLOW)])
def test_the_carried_difference_is_that_of_the_decoder(name):
    """Against the decoder of slt_jax.models, float64: its logits, and the difference for a large displacement."""
    config, _ = CONFIGURATIONS[name]
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        center, away = (wide(teachers.draw_weights(config, rng)) for _ in range(2))
        change = jax.tree.map(lambda w: 0.3 * w, away)
        tokens = jnp.asarray(teachers.make_inputs(config, 7, 0))
        pair = jax.jit(functools.partial(carried.logits, config))(center, change, tokens)
        decoder = jax.jit(rank.forward(config))
        base, moved = decoder(center, tokens), decoder(jax.tree.map(jnp.add, center, change), tokens)
    scale = float(np.abs(base).max())
    # rotary tables are float32 in both; the rest is float64
    np.testing.assert_allclose(pair.base, base, atol=1e-12 * scale)
    np.testing.assert_allclose(pair.change, moved - base, atol=1e-10 * scale)


@pytest.mark.parametrize("config", [MLPConfig((4, 5, 3)), MLPConfig((4, 5, 3), "relu"), AttentionConfig(9, 5, 4, 2, 2)])
def test_the_difference_of_the_other_networks(config):
    """Teacher at w* + v, no change, minus teacher at w*: the two bases."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        center, change = (wide(teachers.draw_weights(config, rng)) for _ in range(2))
        inputs = jnp.asarray(teachers.make_inputs(config, 7, 0))
        pair = carried.logits(config, center, change, inputs)
        zero = jax.tree.map(jnp.zeros_like, center)
        moved = carried.logits(config, jax.tree.map(jnp.add, center, change), zero, inputs).base
    np.testing.assert_allclose(pair.change, moved - pair.base, atol=1e-10)


@pytest.mark.parametrize("name", ["layernorm", "norms around, softcaps"])
def test_float32_holds_the_loss_and_its_gradient_near_the_teacher(name):
    """Exactly 0 at w*; at 1e-6 of the weights, where a difference of logits would have lost all digits, to 1e-4.

    The loss there is 1e-12: rounding errors of 1e-7 of the logits, squared, are 1e-14.
    """
    config, _ = CONFIGURATIONS[name]
    rng = np.random.default_rng(4)
    center, away = (jax.tree.map(np.float32, teachers.draw_weights(config, rng)) for _ in range(2))
    inputs = jnp.asarray(teachers.make_inputs(config, 20, 0))

    def loss(change, teacher):
        return carried.divergences(config, teacher, change, inputs).mean()

    both = jax.jit(jax.value_and_grad(loss))
    value, grad = both(jax.tree.map(np.zeros_like, center), center)
    assert value == 0.0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grad))
    change = jax.tree.map(lambda w: np.float32(1e-6) * w, away)
    value, grad = both(change, center)
    with jax.enable_x64(True):
        exact, slope = both(wide(change), wide(center))
    assert 0 < float(exact) < 1e-9
    assert float(value) == pytest.approx(float(exact), rel=1e-4)
    for found, expected in zip(jax.tree.leaves(grad), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(np.abs(g).max() for g in jax.tree.leaves(slope)))


def test_the_divergence_near_and_far():
    """Kills a branch that overflows, in the value or through the other branch's gradient."""
    rng = np.random.default_rng(5)
    base, direction = rng.standard_normal((2, 3, 6)).astype(np.float32)
    both = jax.jit(jax.value_and_grad(lambda c: difference.divergence(difference.Pair(base, c)).sum()))
    for size in (1e-10, 1e-3, 0.3, 3.0, 300.0):
        change = np.float32(size) * direction
        value, slope = both(change)
        with jax.enable_x64(True):
            a, c = np.float64(base), np.float64(change)
            p = np.exp(a - np.log(np.exp(a).sum(-1, keepdims=True)))
            c = c - (p * c).sum(-1, keepdims=True)
            top = c.max(-1, keepdims=True)
            mean = (p * c * c).sum(-1) / 2 + (p * c**3).sum(-1) / 6  # of small c
            exact = (mean if size < 1e-2 else top[..., 0] + np.log((p * np.exp(c - top)).sum(-1))).sum()
        assert float(value) == pytest.approx(float(exact), rel=1e-5 if size != 1e-3 else 1e-4)
        assert np.isfinite(slope).all()


# --- posterior and spectrum


def tiny_teacher(name="layernorm", seed=0):
    config, _ = CONFIGURATIONS[name]
    weights = jax.tree.map(np.float32, teachers.draw_weights(config, np.random.default_rng(seed)))
    gauge = gauge_dimension(config)
    return teachers.Teacher("layernorm", "1K", seed, config, weights, (teachers.count(weights) - gauge) / 2, gauge)


def test_curvatures_are_those_of_the_loss():
    """The squared singular values of the root, in blocks, against the Hessian of the carried loss."""
    teacher = tiny_teacher("mlp tanh")
    inputs = teachers.make_inputs(teacher.config, 1400, 0)  # two blocks
    h = spectrum.curvatures(teacher.config, teacher.weights, inputs)
    with jax.enable_x64(True):
        zero, unravel = ravel_pytree(jax.tree.map(np.zeros_like, wide(teacher.weights)))
        x = jnp.asarray(inputs, jnp.float64)
        loss = lambda v: carried.divergences(teacher.config, wide(teacher.weights), unravel(v), x).mean()  # noqa: E731
        exact = np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(zero))[::-1]
    np.testing.assert_allclose(h, exact, atol=1e-13 * exact[0])
    assert np.sum(h > 1e-24 * h[0]) == 2 * teacher.truth


def test_the_quadratic_value_between_the_ratios():
    h = 10 ** np.random.default_rng(0).uniform(-12, 1, 300)
    values = spectrum.quadratic_values(h)
    assert values[-1] == pytest.approx(150, rel=1e-3)
    for ratio in (0.1, 82.0, 3.3e6):
        assert spectrum.value_at(values, ratio) == pytest.approx(spectrum.quadratic_values(h, (ratio,))[0], rel=2e-4)
    with pytest.raises(ValueError, match=r"ratio of nbeta to localization must be from 0.001 to 1e\+20, got 0.0"):
        spectrum.value_at(values, 0.0)


@pytest.mark.slow
def test_hmc_draws_the_value_of_the_spectrum_where_the_posterior_is_narrow():
    """Kills a wrong factor in the loss or in H: the posterior is quadratic at this localization."""
    teacher = tiny_teacher("mlp tanh")
    method = methods.Method("hmc", 1e4, 1e4, num_data=64)
    posterior, data = methods.posterior_and_data(teacher, method)
    found = slt.estimate_llc(posterior, data, sampler=slt.hmc(num_steps=8), num_chains=2, num_draws=150, num_warmup=50)
    h = spectrum.curvatures(teacher.config, teacher.weights, teachers.make_inputs(teacher.config, 64, 0))
    assert abs(found.llc - spectrum.quadratic_values(h, (1.0,))[0]) < 4 * found.llc_stderr


def test_sampled_labels_shift_the_loss_by_a_part_of_mean_zero():
    """Over all labels with their probabilities the loss is the divergence; at w* it is 0 for each."""
    teacher = tiny_teacher("mlp tanh")
    inputs = jnp.asarray(teachers.make_inputs(teacher.config, 5, 0))
    moved = jax.tree.map(lambda w: 1.2 * w, teacher.weights)
    params = {"teacher": teacher.weights, "weights": moved}
    p = jax.nn.softmax(carried.logits(teacher.config, teacher.weights, jax.tree.map(np.zeros_like, moved), inputs).base)
    each = [methods.sampled_loss(teacher.config, params, {"inputs": inputs, "labels": np.full(5, y)}) for y in range(3)]
    mean = sum(p[:, y] * each[y] for y in range(3))
    np.testing.assert_allclose(mean, methods.divergence_loss(teacher.config, params, inputs), rtol=1e-4)


def test_methods_that_contradict_themselves():
    with pytest.raises(ValueError, match="needs stored data, got --data drawn"):
        methods.Method("hmc", data="drawn")
    with pytest.raises(ValueError, match="Give one"):
        methods.Method(budget=100, num_draws=10)
    assert methods.filled(methods.Method("published", localization=100.0), "layernorm", "1K").localization == 100.0


# --- singular teachers

NET = AttentionConfig(5, 4, 3, 1, 2)


def test_heads_of_full_rank_have_the_coefficient_of_the_gauge():
    """The detour over the lifted network and the bounds of two-layer linear networks: half of d minus the gauge."""
    weights = teachers.draw_weights(NET, np.random.default_rng(0))
    exact = (teachers.num_weights(NET) - gauge_dimension(NET)) / 2
    assert singular.coefficient_bounds(NET, weights) == (exact, exact)


@pytest.mark.parametrize("product", ["query-key", "value-output"])
def test_a_product_of_reduced_rank(product):
    """Two layers 3-2-3 at rank 1: Aoyagi's 7/2, where the full rank's is 4; the Hessian sees only 5/2 of it."""
    weights = singular.reduced_heads(NET, product, 1)
    exact = (teachers.num_weights(NET) - gauge_dimension(NET)) / 2
    found = singular.coefficient_bounds(NET, weights)
    assert found == (exact - 0.5, exact - 0.5)
    inputs = teachers.make_inputs(NET, 60, 0)
    hessian = rank.rank_of(np.linalg.svd(rank.jacobian(NET, weights, inputs), compute_uv=False)).rank / 2
    assert hessian == exact - 1.5


def test_scores_of_a_head_that_writes_nothing_are_not_called_known():
    with pytest.raises(ValueError, match="not known here"):
        singular.coefficient_bounds(NET, singular.reduced_heads(NET, "value-output", 0))
    with pytest.raises(ValueError, match="rank from 0 to head_width - 1 = 1"):
        singular.reduced_heads(NET, "query-key", 2)


def test_dead_units_are_flat():
    """Half the rank of the whole network's Jacobian, to the last unit, and a neighbourhood in which nothing changes."""
    config = MLPConfig((4, 6, 3), "relu")
    inputs = teachers.make_inputs(config, 200, 0)
    weights, exact = singular.dead_units(config, 2, inputs)
    assert rank.rank_of(np.linalg.svd(rank.jacobian(config, weights, inputs), compute_uv=False)).rank / 2 == exact
    change = jax.tree.map(np.zeros_like, weights)
    change["layer0"]["weight"][:, :2] = 0.1
    assert np.all(carried.divergences(config, weights, change, inputs) == 0)
    with pytest.raises(ValueError, match="wider than dead"):
        singular.dead_units(config, 5, inputs)


# --- rows and tables


def test_drawn_shapes_are_of_their_size_and_have_a_formula():
    for layout in ("layernorm parallel", "norms around", "mlp relu", "attention"):
        found = [teachers.make_teacher(layout, "1K", seed) for seed in range(2)]
        assert all(1000 / 1.5 <= t.num_weights <= 1500 for t in found)
        assert found[0].config != found[1].config
        again = teachers.make_teacher(layout, "1K", 0)
        assert all(map(np.array_equal, jax.tree.leaves(found[0].weights), jax.tree.leaves(again.weights)))


def test_rows_resume_and_make_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "make_teacher", lambda layout, size, seed: tiny_teacher("mlp tanh", seed))
    asked = ["--layout", "layernorm", "--count", "2", "--num-data", "40", "--out", str(tmp_path / "rows.jsonl")]
    sample = ["--method", "published", "--draws", "5", "--warmup", "5", "--batch-size", "8"]
    assert run.main([*asked]) == 0
    assert run.main([*asked, *sample]) == 0
    before = (tmp_path / "rows.jsonl").read_text()
    assert run.main([*asked, *sample]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before
    rows = [json.loads(line) for line in before.splitlines()]
    assert [r["request"]["sampler"] for r in rows] == ["spectrum", "spectrum", "published", "published"]
    assert rows[2]["nbeta"] == 30
    assert {"device", "versions"} <= rows[0].keys() & rows[2].keys()
    capsys.readouterr()
    assert run.main([*asked, "--table"]) == 0
    assert "| 1K | layernorm | published (num_data 40) | 2 | 0.1 |" in capsys.readouterr().out


def test_where_a_share_of_the_truth_is_reached():
    row = {"truth": 10.0, "values": spectrum.quadratic_values(np.full(20, 1e-3)).tolist()}
    assert tables.reached(row, 0.5) == pytest.approx(1e3, rel=0.01)
    assert tables.reached({**row, "truth": 11.0}, 0.95) == math.inf


def test_the_page_shows_its_rows():
    """The tables of the README are those of the committed rows, and its count of configurations that of the ranks."""
    page = (RESULTS.parent / "README.md").read_text()
    assert tables.table(list(Store(run.RESULTS, run.KEY).rows.values())) in page
    assert f"on {len(CONFIGURATIONS)} tiny configurations" in page
