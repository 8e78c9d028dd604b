"""Observables: what is refused and how, levels, masks, losses of tokens; moments of draws of unequal time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.engine.observe import MOST_PARTS, Seen, Watch, blank_sums, lengthened_sums, recorded
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.posterior.observable import Evaluation
from tests.small import DATA, estimate, posterior, refuses

PROBE = DATA[:6]


def observing(value, target=None, data=DATA, **more):
    return lambda: estimate(target, data, observe={"probe": value}, **more)


def of(fn, **more):
    return slt.Observable(PROBE, fn=fn, **more)


REFUSED = {
    "no dict": (lambda: estimate(observe=PROBE), TypeError, ["observe must be a dict", "held-out"]),
    "a name that is a path": (lambda: estimate(observe={"a/b": PROBE}), ValueError, ["'a/b'", "leave out '/'"]),
    "no arrays": (observing({}), ValueError, ["observe['probe']", "no arrays"]),
    "no rows": (observing(np.zeros((0, 3), np.float32)), ValueError, ["observe['probe']", "no examples"]),
    "another structure": (observing({"x": PROBE}), ValueError, ["observe['probe'] has the structure", "'x'"]),
    "a name of also": (lambda: estimate(also={"a": PROBE}, observe={"a": PROBE}), ValueError, ["also", "'a'"]),
    "no per-token loss": (observing(slt.Observable(PROBE, level="token")), ValueError, ["no per-token", "fn(params"]),
    "a scalar": (observing(of(lambda w, x: jnp.sum(x @ w))), ValueError, ["observe['probe']", "shape ()"]),
    "other rows": (observing(of(lambda w, x: (x @ w)[:-1])), ValueError, ["one row for each of the 6", "(5,)"]),
    "a dict": (observing(of(lambda w, x: {"a": x @ w})), ValueError, ["returned a dict"]),
    "complex": (observing(of(lambda w, x: 1j * (x @ w))), TypeError, ["real numbers", "complex"]),
    "a mask of another shape": (
        observing(of(lambda w, x: (x @ w, x > 0))), ValueError, ["mask of booleans of the shape (6,)", "(6, 3)"]
    ),
    "a mask of numbers": (observing(of(lambda w, x: (x @ w, x @ w))), ValueError, ["mask of booleans"]),
    "nothing counts": (observing(of(lambda w, x: (x @ w, x[:, 0] > 99))), ValueError, ["false everywhere"]),
    "tokens without an axis": (observing(of(lambda w, x: x @ w, level="token")), ValueError, ["(example, token)"]),
    "examples with two axes": (observing(of(lambda w, x: x * w, level="example")), ValueError, ["(6, 3) for 6"]),
    "not finite": (
        observing(of(lambda w, x: jnp.log(x[:, 0] + 0 * w[0]))), FloatingPointError, ["observe['probe']", "rows"]
    ),
    "too long a run for a path": (
        lambda: estimate(
            observe={"probe": slt.Observable(PROBE, path="x")}, target_error=0.1, num_draws=None
        ), ValueError, ["target_error", "path"],
    ),
    "no level": (lambda: slt.Observable(PROBE, level="batch"), ValueError, ["level must be one of", "'batch'"]),
    "no way to keep": (lambda: slt.Observable(PROBE, keep="all"), ValueError, ["keep must be one of", "'all'"]),
    "no function": (lambda: slt.Observable(PROBE, fn=3), TypeError, ["fn must be a function", "3"]),
    "custom without one": (lambda: slt.Observable(PROBE, level="custom"), ValueError, ["give fn(params, batch)"]),
    "moments in a path": (lambda: slt.Observable(PROBE, keep="moments", path="x"), ValueError, ["keep='moments'"]),
    "a path of numbers": (lambda: slt.Observable(PROBE, path=3), TypeError, ["path must name a folder", "3"]),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_observed_is_refused(case, wrong_types):
    call, kind, words = REFUSED[case]
    refuses(kind, call, *words)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    """Kills: a zarr group made in somebody's folder; values among those of a saved result, which is then damaged."""
    (tmp_path / "thesis.tex").write_text("")
    refuses(FileExistsError, observing(slt.Observable(PROBE, path=tmp_path)), "no zarr group", tmp_path)
    saved = estimate().save(tmp_path / "result.zarr")
    refuses(FileExistsError, observing(slt.Observable(PROBE, path=saved)), "a saved result", saved)
    slt.load_result(saved)


def test_a_loss_that_returns_its_mean_is_observed_by_example():
    """Kills: the mean of a block for each of its examples."""

    def mean(w, x):
        return jnp.mean(0.5 * (x @ w - 1.0) ** 2)

    both = {"probe": PROBE, "weights": of(lambda w, x: jnp.broadcast_to(w, (len(x), 3)))}
    result = estimate(posterior(mean), observe=both)
    drawn = result.observed["weights"].values[:, :, 0]
    expected = 0.5 * (np.einsum("nk,cdk->cdn", PROBE, drawn) - 1.0) ** 2
    np.testing.assert_allclose(result.observed["probe"].values, expected, 1e-5)


TOKENS = np.random.default_rng(1).integers(0, 16, (12, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(DecoderConfig(16, 7, 8, 1, 2), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("loss", [slt.next_token_loss, sequence_loss], ids=lambda f: f.__name__)
def test_a_flax_loss_has_its_version_by_token(decoder, loss):
    """Kills: losses of other positions; a loss that loses its per-token version on its way through Flax."""
    params, loss_fn = slt.from_nnx(decoder, loss)
    found = Evaluation("tokens", posterior(loss_fn, params).program, loss_fn.token_losses)
    tokens = found(*found.program.split(params), jnp.asarray(TOKENS))
    logits = np.asarray(decoder(jnp.asarray(TOKENS)), np.float64)[:, :-1]
    exact = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(tokens, exact, 1e-4)
    np.testing.assert_allclose(tokens.mean(-1), loss_fn(params, jnp.asarray(TOKENS)), 1e-5)


def test_tokens_that_fill_up_a_row_do_not_count(decoder):
    """Kills: padding among the tokens; a mask that is not that of the losses."""
    rows = {"tokens": jnp.asarray(TOKENS), "count": jnp.arange(12, dtype=jnp.int32) % 6 + 2}
    params, loss_fn = slt.from_nnx(decoder, sequence_loss)
    found = Evaluation("tokens", posterior(loss_fn, params).program, loss_fn.token_losses)
    tokens, valid = found.with_mask(*found.program.split(params), rows)
    assert valid.sum(-1).tolist() == 2 * [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(jnp.where(valid, tokens, 0).sum(-1) / valid.sum(-1), loss_fn(params, rows), 1e-5)


def test_masked_tokens_at_the_draws():
    """Kills: a mask that is lost on its way, or of other examples; NaN where nothing counts."""
    lengths = np.array([2, 5, 3, 4, 5, 5, 1], np.int32)

    def by_token(table, batch):
        tokens, length = batch
        losses = -jnp.take_along_axis(jax.nn.log_softmax(table)[tokens[:, :-1]], tokens[:, 1:, None], -1)[..., 0]
        own = jnp.arange(4) < length[:, None] - 1
        return jnp.where(own, losses, jnp.nan), own

    def loss(table, batch):
        losses, own = by_token(table, batch)
        return jnp.where(own, losses, 0).sum(-1)

    loss.token_losses = by_token
    rows = np.random.default_rng(0).integers(0, 6, (7, 5)).astype(np.int32), lengths
    target = slt.LocalPosterior(loss, jnp.zeros((6, 6)), 7, nbeta=5.0, localization=1.0)
    observe = {"sequences": rows, "tokens": slt.Observable(rows, level="token")}
    result = estimate(target, rows, observe=observe, batch_size=4, sampler=slt.sgld(0.1))
    tokens, sequences = (result.observed[name] for name in ("tokens", "sequences"))
    assert (tokens.level, tokens.values.shape) == ("token", (4, 4, 7, 4))
    assert tokens.valid.sum(-1).tolist() == (lengths - 1).tolist()
    assert not tokens.values[:, :, ~tokens.valid].any()
    np.testing.assert_allclose(tokens.values.sum(-1), sequences.values, 1e-5)


def test_draws_count_by_the_time_of_their_steps():
    """Moments of weighted draws over two blocks. Kills: a weight left out of one of the six numbers."""
    random = np.random.default_rng(0)
    values, gap, time = random.normal(2, 1, (30, 4)), random.normal(1, 1, 30), random.uniform(0.2, 1, 30)
    watch = Watch(evaluate=None, shape=(4,), blocks=1, parts=2)
    seen = Seen((), (blank_sums(watch),))
    for draw in range(30):
        given = (jnp.float32(x) for x in (values[draw], time[draw], gap[draw]))
        row, weight, loss = given
        step = {"slot": jnp.int32(0), "part": jnp.int32(draw // 15), "weight": weight, "gap": loss}
        seen = recorded((watch,), seen, (row,), kept=jnp.bool(True), **step)
        seen = recorded((watch,), seen, (row * jnp.nan,), kept=jnp.bool(False), **step)
    for block in range(2):
        own = slice(15 * block, 15 * block + 15)
        x, g, t = values[own], gap[own], time[own]
        mean, loss = t @ x / t.sum(), t @ g / t.sum()
        away, gap_away = x - mean, g - loss
        exact = (t.sum(), mean, t @ away**2, loss, t @ gap_away**2, (t * gap_away) @ away)
        for name, found, value in zip(seen.sums[0]._fields, seen.sums[0], exact, strict=True):
            np.testing.assert_allclose(found[block], value, 1e-5, err_msg=name)


def test_two_blocks_become_one_when_a_run_is_lengthened():
    """Kills: deviations of the blocks' own means left out of the sum of squares."""
    random = np.random.default_rng(0)
    values, gap = random.normal(2, 1, (64, 3)), random.normal(1, 1, 64)
    watch = Watch(evaluate=None, shape=(3,), blocks=1, parts=MOST_PARTS)
    seen = Seen((), (blank_sums(watch),))
    for draw in range(64):
        seen = recorded(
            (watch,), seen, (jnp.float32(values[draw]),), slot=jnp.int32(0), part=jnp.int32(draw // 2),
            kept=jnp.bool(True), weight=jnp.float32(1), gap=jnp.float32(gap[draw]),
        )  # fmt: skip
    chains = jax.tree.map(lambda x: x[None], seen.sums)
    (sums,), parts = lengthened_sums(chains, (1, 2), 200)
    assert parts == (1, 8)
    assert sums.weight[0, :9].tolist() == 8 * [8] + [0]
    for block in range(8):
        x, g = values[8 * block : 8 * block + 8], gap[8 * block : 8 * block + 8]
        np.testing.assert_allclose(sums.m2[0, block], x.var(0) * 8, 1e-5)
        np.testing.assert_allclose(sums.loss_m2[0, block], g.var() * 8, 1e-5)
        np.testing.assert_allclose(sums.co[0, block], (g - g.mean()) @ (x - x.mean(0)), 1e-4, 1e-5)
