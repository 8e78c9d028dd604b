"""Parts of a decoder by name: which weights move, that they are the right ones, and that heads share one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.restrict import choose, head_names, restricted

CONFIG = DecoderConfig(13, 8, 12, 3, 4, num_kv_heads=2, head_width=3, mlp_width=10, tied_head=False)
ATTENTION = 12 * 4 * 3 + 12 + 2 * (12 * 2 * 3 + 6) + 4 * 3 * 12 + 12
LAYER = {"norm": 4 * 12, "attention": ATTENTION, "mlp": 2 * 120 + 10 + 12}
HEAD = 12 * 3 + 3 + 2 * (12 * 3 + 3) + 3 * 12


def posterior(config=CONFIG, seed=0):
    model = Decoder(config, rngs=nnx.Rngs(seed))
    params, loss_fn = slt.from_nnx(model, lambda m, tokens: m.losses(tokens))
    return slt.LocalPosterior(loss_fn, params, num_data=50, nbeta=10.0, localization=5.0)


def tokens(rows=6):
    return np.random.default_rng(0).integers(0, 13, (rows, 8)).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("layer 1 head 2", HEAD), ("layer 1", sum(LAYER.values())), ("mlp", 3 * LAYER["mlp"]),
        ("layer 2 mlp", LAYER["mlp"]), ("attention", 3 * LAYER["attention"]), ("embedding", 13 * 12 + 8 * 12),
        ("unembedding", 13 * 12), ("norms", 3 * LAYER["norm"] + 24), ("layer 0 norms", LAYER["norm"]),
        ("layer 1 head 0, layer 1 head 2", 2 * HEAD), ("layer 1 head 2, layer 1 head 2", HEAD),
        ("layer 1 head 0, layer 1 head 1", 2 * HEAD - 2 * (12 * 3 + 3)),  # they read the same keys and values
        ("layer 1, layer 1 head 2", sum(LAYER.values())), ("mlp, layer 0 mlp, embedding", 3 * LAYER["mlp"] + 21 * 12),
        ("layer 1 attention, layer 0 head 3", LAYER["attention"] + HEAD),
    ],
)  # fmt: skip
def test_how_many_weights_a_name_frees(name, count):
    assert restricted(posterior(), name).num_free == count


def by_hand(params, name):
    """Boolean arrays of what ``layer 1 head 3`` and ``layer 2 mlp`` are, written out."""
    mask = jax.tree.map(lambda x: np.zeros(x.shape, bool), params)
    if name == "layer 2 mlp":
        for leaf in jax.tree.leaves(mask["blocks"]["mlp"]):
            leaf[2] = True
        return mask
    own = mask["blocks"]["attention"]
    own["q"][1, :, 3], own["q_bias"][1, 3], own["o"][1, 3] = True, True, True
    for leaf in ("k", "v"):
        own[leaf][1, :, 1], own[f"{leaf}_bias"][1, 1] = True, True
    return mask


@pytest.mark.parametrize("name", ["layer 1 head 3", "layer 2 mlp"])
def test_a_restriction_is_the_posterior_of_its_mask(name):
    """The same density wherever the free weights go: compared at moved weights, slice by slice."""
    whole = posterior()
    named, mask = restricted(whole, name), by_hand(whole.center, name)
    shift = lambda w: 0.1 * np.cos(np.arange(w.size)).reshape(w.shape)  # noqa: E731
    moved = jax.tree.map(lambda w, m: w + np.where(m, shift(w), 0), whole.center, mask)
    other = restricted(slt.LocalPosterior(whole.loss_fn, moved, 50, 10.0, 5.0), name)
    center = {**named.center, "part": other.center["part"]}
    found = named.loss_fn(center, tokens())
    np.testing.assert_allclose(found, whole.loss_fn(moved, tokens()), rtol=1e-5)
    assert float(jnp.abs(found - whole.loss_fn(whole.center, tokens())).max()) > 1e-4
    masked = slt.LocalPosterior(whole.loss_fn, whole.center, 50, 10.0, 5.0, mask=mask)
    assert named.num_free == masked.num_free
    start, frozen = named.program.split(named.center)
    away = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(named.program.split(center)[0], start, strict=True))
    exact = sum(float(((a - b) ** 2).sum()) for a, b in zip(*map(jax.tree.leaves, (moved, whole.center)), strict=True))
    assert away == pytest.approx(exact, rel=1e-4)
    grads = jax.grad(named.program.mean_loss)(start, frozen, tokens())
    assert all(float(jnp.abs(g).max()) > 0 for g in grads)


def test_every_head_of_a_model_compiles_once():
    whole, traces = posterior(), []
    loss_fn = whole.loss_fn

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    whole = slt.LocalPosterior(counted, whole.center, 50, 10.0, 5.0)
    names, counts, found = head_names(whole.center), [], []
    assert names[:2] == ["layer 0 head 0", "layer 0 head 1"]
    assert len(names) == 12
    for name in (names[0], names[5], names[11]):
        result = slt.estimate_llc(
            restricted(whole, name), tokens(50), sampler=slt.sgld(1e-3), num_chains=2, num_draws=8, batch_size=10
        )
        counts.append(len(traces))
        found.append(result.llc)
    assert counts[0] == counts[1] == counts[2]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layer 3", "'layer 3': this decoder has layers 0 to 2"),
        ("layer 0 head 4", "each layer has heads 0 to 3"),
        ("head 2", "'head 2' needs a layer: 'layer 0 head 2'"),
        ("layer 1 embedding", "the embedding belongs to no layer"),
        ("heads", "no part of a decoder is called 'heads'. Names are 'layer 3'"),
        ("mlp,", "no part of a decoder is called ''"), ("", "no part of a decoder is called ''"),
        ("layer -1", "no part of a decoder is called 'layer -1'"),
    ],
)  # fmt: skip
def test_a_name_that_means_nothing_is_refused(name, text):
    with pytest.raises(ValueError, match=text):
        choose(posterior().center, name)


def test_a_tied_head_has_no_unembedding():
    tied = posterior(DecoderConfig(13, 8, 12, 2, 4))
    with pytest.raises(ValueError, match="tied to the embedding"):
        restricted(tied, "unembedding")


def test_what_is_no_decoder_is_told_so():
    other = slt.LocalPosterior(lambda p, x: x[:, 0] * p["w"][0], {"w": jnp.ones(2)}, 50, 10.0, 5.0)
    with pytest.raises(ValueError, match=r"with blocks/attention/q; got w, \.\.\. Give LocalPosterior a mask"):
        restricted(other, "mlp")
    masked = slt.LocalPosterior(other.loss_fn, other.center, 50, 10.0, 5.0, mask={"w": np.array([True, False])})
    with pytest.raises(ValueError, match="not both"):
        restricted(masked, "mlp")
