"""Cross-entropy in chunks of rows against all logits at once: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_jax.kernels.cross_entropy import chunked, cross_entropy, reference, shapes


def problem(rows, width, vocabulary, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden, table = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (vocabulary, width))
    return hidden, table, jax.random.randint(keys[2], (rows,), 0, vocabulary), jax.random.uniform(keys[3], (rows,))


def weighted(function, weights):
    return jax.value_and_grad(lambda h, e, y: jnp.vdot(weights, function(h, e, y)), argnums=(0, 1))


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.quick
@pytest.mark.parametrize("equal", [True, False], ids=["mean", "weighted"])
@pytest.mark.parametrize("shape", shapes.TESTED, ids=lambda s: "x".join(map(str, s)))
def test_losses_and_gradients_are_those_of_the_plain_version(shape, equal, monkeypatch):
    """With blocks of tokens that end inside the vocabulary, and rows that do not fill the last chunk."""
    monkeypatch.setattr(chunked, "TOKENS", 32)
    hidden, table, targets, weights = problem(*shape)
    weights = jnp.full_like(weights, 1 / len(weights)) if equal else weights
    close(cross_entropy(hidden, table, targets, 64), reference.cross_entropy(hidden, table, targets))
    found = jax.jit(weighted(lambda *a: cross_entropy(*a, 64), weights))(hidden, table, targets)
    close(found, weighted(reference.cross_entropy, weights)(hidden, table, targets))


@pytest.mark.parametrize("rows", [7, 64, 300])
def test_a_mean_makes_no_second_scan(rows, monkeypatch):
    """Whether or not the rows fill the last chunk; unequal weights make one."""
    hidden, table, targets, weights = problem(300, 8, 97)
    scans, real = [], chunked.gradient_step

    def counted(*args):
        jax.debug.callback(lambda: scans.append(1))
        return real(*args)

    monkeypatch.setattr(chunked, "gradient_step", counted)
    for given, times in ((jnp.full(300, 0.5), 1), (weights, 2)):
        scans.clear()
        jax.block_until_ready(weighted(lambda *a: cross_entropy(*a, rows), given)(hidden, table, targets))
        jax.effects_barrier()
        assert len(scans) == times * -(-300 // rows)


def test_the_reference_is_the_definition():
    hidden, table, targets, _ = problem(6, 3, 5)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    exact = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), targets]
    np.testing.assert_allclose(reference.cross_entropy(hidden, table, targets), exact, rtol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, table, targets, _ = problem(5, 4, 9)
    found = weighted(cross_entropy, jnp.ones(5))(1e3 * hidden, table, targets)
    close(found, weighted(reference.cross_entropy, jnp.ones(5))(1e3 * hidden, table, targets))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("outside", [-1, 11, 2**30])
def test_an_id_outside_the_vocabulary_is_nan_and_no_other_row_is(outside):
    hidden, table, targets, _ = problem(7, 4, 11)
    for function in (cross_entropy, reference.cross_entropy):
        found = np.asarray(function(hidden, table, targets.at[3].set(outside)))
        assert np.flatnonzero(np.isnan(found)).tolist() == [3]
    ones = jnp.ones(7)
    _, slopes = weighted(cross_entropy, ones)(hidden, table, targets.at[3].set(outside))
    close(slopes, weighted(reference.cross_entropy, ones)(hidden, table, targets.at[3].set(outside))[1])


def test_vmap_is_a_loop():
    """Equal weights in one chain and unequal ones in the other."""
    hidden, table, targets, weights = problem(20, 4, 11)
    weights = jnp.stack([jnp.ones(20), weights])
    chains = jnp.stack([hidden, 2 * hidden]), jnp.stack([table, table + 1])
    run = lambda h, e, w: weighted(lambda *a: cross_entropy(*a, 8), w)(h, e, targets)  # noqa: E731
    together = jax.vmap(run)(*chains, weights)
    for i in range(2):
        close(jax.tree.map(lambda x, i=i: x[i], together), run(chains[0][i], chains[1][i], weights[i]))


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    hidden, table, targets, weights = (problem(40, 16, 64)[i] for i in range(4))
    low = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    losses = cross_entropy(*low, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference.cross_entropy(*low, targets), atol=0.05)
    _, slopes = weighted(cross_entropy, weights)(*low, targets)
    assert [x.dtype for x in slopes] == [jnp.bfloat16, jnp.bfloat16]


def test_nothing_to_do():
    assert cross_entropy(jnp.zeros((0, 3)), jnp.zeros((5, 3)), jnp.zeros(0, int)).shape == (0,)


def test_shapes_that_do_not_fit_are_named():
    hidden, table, targets, _ = problem(7, 4, 11)
    with pytest.raises(ValueError, match=r"got \(7, 4\), \(11, 4\) and \(6,\)"):
        cross_entropy(hidden, table, targets[:6])
    with pytest.raises(ValueError, match=r"got \(7, 4\), \(4, 11\)"):
        cross_entropy(hidden, table.T, targets)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        cross_entropy(hidden, table, targets, 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the temporaries of XLA's CPU compiler")
def test_a_quarter_of_the_plain_memory_at_gpt2s_head():
    """Compiled, not run: 1024 tokens, vocabulary 50257."""
    rows, width, vocabulary = shapes.TIMED["gpt2, 1024 tokens"]
    like = jax.ShapeDtypeStruct
    given = like((rows, width), jnp.float32), like((vocabulary, width), jnp.float32), like((rows,), jnp.int32)
    sizes = []
    for function in (cross_entropy, reference.cross_entropy):
        mean = jax.value_and_grad(lambda *a, f=function: f(*a).mean(), argnums=(0, 1))
        sizes.append(jax.jit(mean).lower(*given).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] < sizes[1] / 4
