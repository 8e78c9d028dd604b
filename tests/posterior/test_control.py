"""The Gaussian control: the expansion of a loss, its estimate, and losses of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.restrict import restricted

X = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)


def curved(w, batch):
    """x^2 terms in the first weight, and a quartic in the second."""
    return 0.5 * (batch[:, 0] * w["a"]) ** 2 + (batch[:, 1] * w["b"]) ** 4 + w["a"] ** 3


def posterior(**numbers):
    center = {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}
    return slt.LocalPosterior(curved, center, 64, **{"nbeta": 500.0, "localization": 1.0, **numbers})


@pytest.mark.quick
def test_the_expansion_is_of_second_order():
    """Kills: a term without its half, an expansion around the weights instead of w*."""
    fn = lambda w, x: jnp.exp(x @ w)  # noqa: E731
    center, w = jnp.array([0.1, -0.2]), jnp.array([0.5, 0.3])
    target = slt.LocalPosterior(fn, center, 64, nbeta=1.0, localization=1.0)
    found = slt.gaussian_control(target).loss_fn(w, X)
    at, away = np.exp(X @ np.asarray(center)), X @ np.asarray(w - center)
    np.testing.assert_allclose(found, at * (1 + away + away**2 / 2), rtol=1e-5)


@pytest.mark.quick
def test_the_control_has_the_gaussians_estimate():
    """Half a direction less for a quartic. Kills: the loss itself in the place of its expansion."""
    control = slt.gaussian_control(posterior())
    found = slt.estimate_llc(
        control, X, sampler=slt.underdamped(3e-3, 0.3), num_chains=4, num_draws=400, num_warmup=200, batch_size=64,
        thinning=4,
    )  # fmt: skip
    curvature = 500.0 * float((X[:, 0] ** 2).mean())
    assert abs(found.llc - 0.5 * curvature / (curvature + 1)) < 4 * found.llc_stderr
    assert found.llc_stderr < 0.03


@pytest.mark.quick
def test_tokens_and_parts_of_a_decoder():
    """Kills: losses of tokens that are not expanded; a part whose frozen weights are expanded."""
    params, loss_fn = slt.from_nnx(Decoder(DecoderConfig(11, 6, 8, 1, 2, mlp_width=8), rngs=nnx.Rngs(0)), sequence_loss)
    tokens = np.random.default_rng(0).integers(0, 11, (8, 6)).astype(np.int32)
    target = slt.LocalPosterior(loss_fn, params, 8, nbeta=30.0, localization=300.0)
    control = slt.gaussian_control(target)
    near = jax.tree.map(lambda w: w + 1e-3 * jax.random.normal(jax.random.key(w.size), w.shape), params)
    exact, values = loss_fn(near, tokens), control.loss_fn(near, tokens)
    first = exact - loss_fn(params, tokens)
    assert float(jnp.abs(values - exact).max()) < 0.02 * float(jnp.abs(first).max())
    by_token, counts = control.loss_fn.token_losses(near, tokens)
    np.testing.assert_allclose(by_token.mean(-1), values, rtol=1e-4)
    assert counts.all()
    part = restricted(control, "layer 0 mlp")
    assert part.num_free < target.num_free
    observe = {"probe": slt.Observable(tokens, level="token")}
    run = {"sampler": slt.sgld(1e-4), "num_chains": 2, "num_draws": 4, "num_warmup": 2, "batch_size": 8}
    result = slt.estimate_llc(part, tokens, observe=observe, **run)
    assert result.observed["probe"].values.shape == (2, 4, 8, 5)
    with pytest.raises(AttributeError):
        slt.gaussian_control(posterior()).loss_fn.token_losses  # noqa: B018
