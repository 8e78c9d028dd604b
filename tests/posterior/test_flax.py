"""Adapters: the adapted loss equals the model's own, and nothing random or running slips through."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slt_jax.posterior.flax import from_linen, from_nnx, next_token_loss


class Net(nnx.Module):
    """Linear, optionally batch norm and dropout, called plainly or through an nnx transformation."""

    def __init__(self, *, norm=False, dropout=False, around=lambda f: f):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(0.5, rngs=rngs) if dropout else None
        self.around = around

    def body(self, x):
        x = self.blocks[0](x)
        x = x if self.norm is None else self.norm(x)
        x = x if self.drop is None else self.drop(x)
        return self.blocks[1](jnp.tanh(x))

    def __call__(self, x):
        return self.around(lambda net, x: net.body(x))(self, x)


class StubbornDropout(Net):
    """Dropout that ``eval()`` does not turn off."""

    def __call__(self, x):
        return self.around(lambda net, x: net.drop(net.blocks[0](x), deterministic=False))(self, x)


class StubbornNorm(Net):
    """Batch statistics that ``eval()`` does not freeze."""

    def __call__(self, x):
        return self.around(lambda net, x: net.norm(net.blocks[0](x), use_running_average=False))(self, x)


class LinenNet(nn.Module):
    dropout: float = 0.0
    deterministic: bool = True
    norm: bool = False
    running: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=self.running)(x) if self.norm else x
        x = nn.Dropout(self.dropout, deterministic=self.deterministic)(x)
        return nn.Dense(3)(jnp.tanh(x))


X = jax.random.normal(jax.random.key(1), (5, 3))
AROUND = {"plain": lambda f: f, "jit": nnx.jit, "remat": nnx.remat}
WAYS = {"eager": lambda f: f, "jit": jax.jit, "grad": lambda f: lambda p, b: jax.grad(lambda q: f(q, b).mean())(p)}


def squares(forward, batch):
    return jnp.mean(forward(batch) ** 2, axis=-1)


def contents(model):
    leaves = jax.tree.leaves(nnx.state(model))
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


@pytest.mark.quick
def test_nnx_loss_is_the_models_own_and_follows_the_weights():
    """Kills: weights baked into the closure, so that params are ignored."""
    model = Net()
    params, loss_fn = from_nnx(model, squares)
    np.testing.assert_array_equal(loss_fn(params, X), squares(model, X))
    by_hand = jnp.tanh(X @ params["blocks"][0]["kernel"]) @ params["blocks"][1]["kernel"] * 2  # biases start at 0
    doubled = {"blocks": {0: params["blocks"][0], 1: jax.tree.map(lambda w: 2 * w, params["blocks"][1])}}
    np.testing.assert_allclose(loss_fn(doubled, X), jnp.mean(by_hand**2, -1), rtol=1e-5)
    assert all(np.any(g) for g in jax.tree.leaves(jax.grad(lambda p: loss_fn(p, X).mean())(params)))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("way", WAYS)
def test_nnx_in_evaluation_mode_is_accepted(around, way):
    """Kills: a variable written back unchanged by nnx.jit or nnx.remat taken for a changed one."""
    params, loss_fn = from_nnx(Net(norm=True, dropout=True, around=AROUND[around]), squares)
    plain = from_nnx(Net(norm=True, dropout=True), squares)[1]
    a, b = WAYS[way](loss_fn)(params, X), WAYS[way](plain)(params, X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [(StubbornDropout, "still random.*drop/rngs"), (StubbornNorm, "changes 'norm/(mean|var)' .BatchStat")],
)
def test_nnx_that_stays_random_or_running_is_refused(model, sentence, around, way):
    """Kills: one fixed dropout mask sampled as if it were the model; statistics updated and thrown away."""
    params, loss_fn = from_nnx(model(norm=True, dropout=True, around=AROUND[around]), squares)
    with pytest.raises(ValueError, match=sentence):
        WAYS[way](loss_fn)(params, X)


def test_nnx_model_is_left_as_it_was():
    """Kills: eval() on the caller's model; random counters moved; buffers shared with the copy."""
    model = Net(norm=True, dropout=True)
    model.train()
    before = contents(model)
    params, loss_fn = from_nnx(model, squares)
    jax.jit(loss_fn)(jax.tree.map(lambda w: w + 1, params), X)
    loss_fn(params, X)
    assert model.drop.deterministic is False
    assert model.norm.use_running_average is False
    assert all(np.array_equal(a, b) for a, b in zip(before, contents(model), strict=True))


def test_nnx_loss_fn_under_vmap_equals_a_loop():
    params, loss_fn = from_nnx(Net(norm=True), squares)
    several = jax.tree.map(lambda w: jnp.stack([w, 1.5 * w, -w]), params)
    together = jax.vmap(loss_fn, (0, None))(several, X)
    one_by_one = [loss_fn(jax.tree.map(lambda w, i=i: w[i], several), X) for i in range(3)]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), rtol=1e-5)


def test_linen_loss_is_the_modules_own():
    module = LinenNet(norm=True, dropout=0.5)
    variables = module.init(jax.random.key(0), X)
    params, loss_fn = from_linen(module, variables, squares)
    np.testing.assert_array_equal(loss_fn(params, X), squares(lambda x: module.apply(variables, x), X))
    assert set(params) == {"Dense_0", "BatchNorm_0", "Dense_1"}
    assert all(np.any(g) for g in jax.tree.leaves(jax.grad(lambda p: loss_fn(p, X).mean())(params)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dropout": 0.5, "deterministic": False}, "still random"),
        ({"norm": True, "running": False}, "changes a frozen variable"),
    ],
)
def test_linen_that_stays_random_or_running_is_refused(settings, sentence):
    module = LinenNet(**settings)
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    params, loss_fn = from_linen(module, variables, squares)
    with pytest.raises(ValueError, match=sentence):
        jax.jit(loss_fn)(params, X)


def test_linen_without_params_is_refused():
    with pytest.raises(ValueError, match=r"collection 'params', got \['batch_stats'\]"):
        from_linen(LinenNet(), {"batch_stats": {}}, squares)


def softmax_loss_by_hand(logits, tokens):
    logits = np.asarray(logits, np.float64)
    losses = np.zeros(len(tokens))
    for row, sequence in enumerate(np.asarray(tokens)):
        for t in range(len(sequence) - 1):
            z = logits[row, t]
            losses[row] += np.log(np.exp(z - z.max()).sum()) + z.max() - z[sequence[t + 1]]
    return losses / (tokens.shape[1] - 1)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint16, jnp.int8])
def test_next_token_loss_against_float64(dtype):
    """Kills: target not shifted by one; the mean taken over T; logits of the last position used."""
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 11).astype(dtype)
    logits = 3 * jax.random.normal(jax.random.key(1), (4, 6, 11))
    loss = next_token_loss(lambda _: logits, tokens)
    assert loss.dtype == jnp.float32
    # 5 terms, each off by a few float32 roundings of numbers below 20
    np.testing.assert_allclose(loss, softmax_loss_by_hand(logits, tokens), atol=20 * 4 * np.finfo(np.float32).eps)


def test_next_token_loss_of_bfloat16_logits_is_computed_in_float32():
    """Kills: log-sum-exp in bfloat16, whose rounding (1/256) is far above the tolerance."""
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)
    logits = jax.random.normal(jax.random.key(1), (4, 6, 11), jnp.bfloat16)
    loss = next_token_loss(lambda _: logits, tokens)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, softmax_loss_by_hand(logits, tokens), atol=20 * 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("bad", [11, 300, -1, -12])
def test_a_target_outside_the_vocabulary_gives_nan_in_its_row_alone(bad):
    """Kills: JAX's clamping of out-of-bounds gathers, and the wrap-around of negative indices."""
    tokens = jnp.ones((3, 4), jnp.int32).at[1, 2].set(bad)
    loss = jax.jit(lambda t: next_token_loss(lambda _: jnp.zeros((3, 4, 11)), t))(tokens)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("tokens", [jnp.ones((3, 1), jnp.int32), jnp.ones(3, jnp.int32), jnp.ones((3, 4))])
def test_tokens_of_the_wrong_shape_or_type_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be whole numbers of shape"):
        next_token_loss(lambda t: jnp.zeros((*t.shape, 5)), tokens)
