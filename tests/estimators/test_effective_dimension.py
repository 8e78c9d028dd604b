"""The effective dimension against matrices that are written out here, in float64, on ten models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.models.restrict import restricted
from slt_jax.posterior.outputs import parts_of
from slt_jax.results.spectral import EffectiveDimension
from tests.estimators.written_out import GAMMA, INPUTS, MLP, MODELS, NBETA, ROWS, case, decoder, exact, hessian_of
from tests.small import DATA, PLAN, refuses

SLOW = ("decoder", "decoder, rotary")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS]
CONVEX = [name for name in NAMES if name.values != ("two-headed",)]


def same_spectrum(found, matrix):
    h = np.linalg.eigvalsh(matrix)
    assert found.is_exact
    assert found.precision == "float64"
    assert found.notes == ()
    assert np.allclose(found.eigenvalues, h, rtol=1e-9, atol=1e-11 * np.abs(h).max())
    assert found.value == pytest.approx(exact(matrix), rel=1e-7)
    assert found.negative_count == (h < -1e-10 * h.max()).sum()
    assert found.negative_share == pytest.approx(-h[h < 0].sum() / np.abs(h).sum(), abs=1e-9)
    return h


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_sum_over_the_eigenvalues_of_the_matrix_written_out(name):
    """Kills: the Hessian in place of the Gauss-Newton matrix, a sum over examples for their mean, float32."""
    posterior, data, gauss_newton = case(name)
    h = same_spectrum(slt.effective_dimension(posterior, data), gauss_newton)
    assert (h[0] > -1e-10) == (name != "two-headed")


@pytest.mark.parametrize("name", ["autoencoder", "two-headed"])
def test_it_is_the_sum_over_the_eigenvalues_of_the_hessian(name):
    """Kills: the Gauss-Newton matrix in its place; a last block of fewer examples that counts as much as the others."""
    posterior, data, _ = case(name)
    found = slt.effective_dimension(posterior, data, curvature="hessian", batch_size=10)
    assert same_spectrum(found, hessian_of(name))[0] < -1e-3


@pytest.mark.parametrize("name", CONVEX)
def test_the_quadrature_agrees_within_its_error(name):
    """Kills: a product over part of the examples, a start that is no probe, an error without the truncation."""
    posterior, data, gauss_newton = case(name)
    order = min(24, posterior.num_free)
    found = slt.effective_dimension(posterior, data, order=order, probes=8)
    assert (found.order, found.probes, found.eigenvalues) == (order, 8, None)
    off = found.value - exact(gauss_newton)
    assert abs(off) < 3 * found.trace.probes + found.trace.truncation + 1e-3
    assert found.stderr < 0.2 * exact(gauss_newton)


def test_the_quadrature_of_a_hessian_agrees_too():
    posterior, data, _ = case("autoencoder")
    hessian = hessian_of("autoencoder")
    found = slt.effective_dimension(posterior, data, curvature="hessian", order=24, probes=16)
    assert abs(found.value - exact(hessian)) < 3 * found.stderr
    h = np.linalg.eigvalsh(hessian)
    assert 1 <= found.negative_count <= (h < 0).sum() + 3
    assert found.negative_share == pytest.approx(-h[h < 0].sum() / np.abs(h).sum(), rel=0.3)
    assert "are negative" in str(found)


@pytest.mark.quick
def test_a_quadratic_loss_has_the_llc_of_its_posterior():
    """Kills: another nbeta, localization or scale of the loss than the posterior's."""
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32) * [3, 1, 0.3, 0.1, 0.03]
    loss_fn = slt.loss_of_outputs(lambda w, x: x @ w, lambda z, x: 0.5 * z**2)
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(5), 300, localization=2.0)
    curvatures = posterior.nbeta * np.linalg.eigvalsh(x.T @ x / 300)
    expected = (curvatures / (curvatures + 2)).sum() / 2
    for curvature in ("gauss-newton", "hessian"):
        found = slt.effective_dimension(posterior, x, curvature=curvature)
        assert found.value == pytest.approx(expected, rel=1e-6)
        assert found.text("+/-") == f"{expected:.4g}"
    assert found.at(localization=50.0).value == pytest.approx((curvatures / (curvatures + 50)).sum() / 2, rel=1e-6)
    result = slt.estimate_llc(posterior, x, key=1)
    assert abs(result.llc - found.value) < 4 * result.llc_stderr
    assert result.settings.probe["quadratic"] == pytest.approx(expected, rel=1e-3)


def test_only_free_weights_count():
    """Kills: a matrix over all weights, of a mask, of some entries of an array, of a part of a decoder."""
    posterior, data, gauss_newton = case("autoencoder")
    mask = {"in": np.arange(24).reshape(6, 4) % 3 == 0, "out": False}
    some = slt.LocalPosterior(posterior.loss_fn, posterior.center, ROWS, NBETA, GAMMA, mask=mask)
    free = np.arange(0, 24, 3)
    assert slt.effective_dimension(some, data).value == pytest.approx(exact(gauss_newton[np.ix_(free, free)]), rel=1e-6)


@pytest.mark.quick
def test_the_two_parts_of_a_decoders_loss():
    """Kills: outputs that are not those of the loss, of rows that are filled up and of a part of the decoder."""
    params, loss_fn, tokens = decoder(logit_softcap=3.0)
    filled = {"tokens": tokens, "count": np.full(ROWS, 3)}
    for batch in (tokens, filled):
        parts = parts_of(loss_fn)
        assert np.allclose(parts.loss(parts.outputs(params, batch), batch), loss_fn(params, batch), rtol=1e-5)
    head = restricted(slt.LocalPosterior(loss_fn, params, ROWS), "layer 0 head 1")
    parts = parts_of(head.loss_fn)
    assert np.allclose(parts.loss(parts.outputs(head.center, tokens), tokens), loss_fn(params, tokens), rtol=1e-5)


@pytest.mark.slow
def test_only_the_weights_of_a_part_count():
    posterior, data, gauss_newton = case("decoder")
    numbers = jax.tree.unflatten(
        jax.tree.structure(posterior.center), list(np.split(np.arange(posterior.num_free), _ends(posterior.center)))
    )
    head = restricted(posterior, "layer 0 head 1")
    attention = {k: v.reshape(posterior.center["blocks"]["attention"][k].shape)
                 for k, v in numbers["blocks"]["attention"].items()}  # fmt: skip
    own = np.concatenate([(attention[k][0, 1] if k == "o" else attention[k][0, ..., 1, :]).ravel()
                          for k in attention if k != "o_bias"])  # fmt: skip
    assert head.num_free == len(own)
    found = slt.effective_dimension(head, data)
    assert found.value == pytest.approx(exact(gauss_newton[np.ix_(own, own)]), rel=1e-6)


def _ends(params):
    return np.cumsum([x.size for x in jax.tree.leaves(params)])[:-1]


def test_two_devices_give_what_one_gives():
    """Kills: rows of one device only, and zeros behind the weights that become part of the matrix."""
    posterior, data, _ = case("MLP")
    assert posterior.num_free % 2
    pair = jax.make_mesh((2,), ("chain",), devices=jax.devices()[:2])
    for settings in ({}, {"order": 6, "probes": 2}):
        one = slt.effective_dimension(posterior, data, batch_size=10, **settings)
        two = slt.effective_dimension(posterior, data, batch_size=10, mesh=pair, **settings)
        assert two.value == pytest.approx(one.value, rel=1e-5)
        assert two.trace.truncation == pytest.approx(one.trace.truncation, rel=1e-3, abs=1e-6)
        assert (one.devices, two.devices) == ("1 x cpu", "2 x cpu")


def test_weights_that_are_split_over_devices():
    """Kills: products on a mesh with a ``model`` axis that gather or lose a part of the weights."""
    posterior, data, _ = case("autoencoder")
    mesh = jax.make_mesh((2, 2), ("chain", "model"), devices=jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    center = jax.tree.map(lambda x: jax.device_put(x, split), posterior.center)
    sharded = slt.LocalPosterior(posterior.loss_fn, center, ROWS, NBETA, GAMMA)
    one = slt.effective_dimension(posterior, data, order=8, probes=2)
    many = slt.effective_dimension(sharded, data, order=8, probes=2, mesh=mesh)
    assert many.value == pytest.approx(one.value, rel=1e-5)


@pytest.mark.quick
def test_it_stands_beside_an_estimate(tmp_path):
    """Kills: an effective dimension at another localization than the estimate's; one that a saved result loses."""
    loss_fn = slt.loss_of_outputs(lambda w, x: x @ w, lambda z, x: 0.5 * z**2)
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(3), 40, localization=1.0)
    found = slt.effective_dimension(posterior, DATA, localization=7.0)
    plain = slt.estimate_llc(posterior, DATA, sampler=slt.sgld(1e-4), **PLAN)
    result = plain.with_effective_dimension(found)
    assert plain.effective_dimension is None
    assert "Effective dimension" not in str(plain)
    assert result.effective_dimension.value == found.at(localization=1.0).value != found.value
    assert f"Effective dimension {result.effective_dimension.value:.4g} by the Gauss-Newton matrix" in str(result)
    loaded = slt.load_result(result.save(tmp_path / "r.zarr"))
    assert loaded.effective_dimension.value == result.effective_dimension.value
    assert loaded.llc == plain.llc
    other = slt.LocalPosterior(loss_fn, jnp.zeros(2), 40, localization=1.0)
    refuses(ValueError, lambda: plain.with_effective_dimension(slt.effective_dimension(other, DATA[:, :2])), 2, 3)


@pytest.mark.quick
def test_it_is_written_as_plain_values_and_read_again():
    posterior, data, _ = case("MLP")
    for settings in ({}, {"order": 5, "probes": 2}):
        found = slt.effective_dimension(posterior, data, **settings)
        written = json.loads(json.dumps(found.to_dict()))
        again = EffectiveDimension.from_dict(written)
        assert again.trace == found.trace
        assert str(again) == str(found)
        assert again.at(nbeta=3.0).value == found.at(nbeta=3.0).value


@pytest.mark.quick
def test_a_loss_that_casts_to_float32_is_computed_in_it_with_a_note():
    """Kills: a crash, or the word float64 for numbers that never were."""

    def outputs(w, x):
        def step(total, column):
            return total + column, None

        return jax.lax.scan(step, jnp.zeros(len(x), jnp.float32), (x * w).T)[0]

    posterior = slt.LocalPosterior(
        slt.loss_of_outputs(outputs, lambda z, x: 0.5 * z**2), jnp.ones(3), 40, localization=1.0
    )
    found = slt.effective_dimension(posterior, DATA)
    assert found.precision == "float32"
    assert "cannot be in float64" in found.notes[0]
    x = posterior.nbeta * np.linalg.eigvalsh(DATA.T @ DATA / 40)
    assert found.value == pytest.approx((x / (x + 1)).sum() / 2, rel=1e-4)


@pytest.mark.quick
def test_the_rounding_of_a_forward_pass_is_no_curvature():
    """Kills: seven negative eigenvalues, and 0.3 % of another value, of weights that the loss sees in bfloat16."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 3)).astype(np.float32), rng.integers(0, 3, 80)
    shapes = {"a": (3, 6), "o": (6, 3)}
    center = {name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for name, shape in shapes.items()}
    loss = slt.loss_of_outputs(
        lambda w, batch: jnp.tanh(batch[0] @ w["a"]) @ w["o"],
        lambda z, batch: -jnp.take_along_axis(jax.nn.log_softmax(z), batch[1][:, None], 1)[:, 0],
    )
    plain, rounded = (
        slt.effective_dimension(slt.LocalPosterior(loss, center, 80, 200.0, 2.0, forward_dtype=dtype), (x, y))
        for dtype in (None, jnp.bfloat16)
    )
    assert rounded.value == plain.value
    assert rounded.negative_count == 0
    assert "forward_dtype (bfloat16)" in rounded.notes[0]


def plain(w, x):
    return 0.5 * (x @ w) ** 2


OPEN = slt.LocalPosterior(slt.loss_of_outputs(lambda w, x: x @ w, lambda z, x: z**2), jnp.zeros(3), 40)
CLOSED = OPEN.with_numbers(nbeta=10.0, localization=1.0)


@pytest.mark.quick
@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        (ValueError, ("localization", "result.settings.localization"), {"posterior": OPEN}),
        (ValueError, ("nbeta = 0",), {"posterior": OPEN.with_numbers(nbeta=0.0, localization=1.0)}),
        (TypeError, ("LocalPosterior",), {"posterior": plain}),
        (ValueError, ("curvature", "'fisher'"), {"curvature": "fisher"}),
        (ValueError, ("localization", "-1"), {"localization": -1.0}),
        (ValueError, ("examples", "41"), {"examples": 41}),
        (ValueError, ("order", "4", "3 free"), {"order": 4}),
        (ValueError, ("probes", "0"), {"probes": 0}),
        (TypeError, ("order", "2.5"), {"order": 2.5}),
        (ValueError, ("exact=True", "order"), {"exact": True, "order": 2}),
        (TypeError, ("exact", "'yes'"), {"exact": "yes"}),
        (ValueError, ("precision", "'half'"), {"precision": "half"}),
        (ValueError, ("batch_size", "50"), {"batch_size": 50}),
        (TypeError, ("key",), {"key": "x"}),
        (TypeError, ("mesh",), {"mesh": 2}),
        (ValueError, ("num_data", "50"), {"data": np.zeros((50, 3), np.float32)}),
        (FloatingPointError, ("loss", "not finite"), {"data": np.full((40, 3), np.nan, np.float32)}),
    ],
)
def test_bad_inputs_are_named(kind, words, change):
    arguments = {"posterior": CLOSED, "data": DATA, **change}
    refuses(kind, lambda: slt.effective_dimension(**arguments), *words)


@pytest.mark.quick
def test_a_loss_without_outputs_has_no_gauss_newton_matrix():
    """Kills: the Hessian, or an empirical Fisher matrix, in its place without a word."""
    posterior = slt.LocalPosterior(plain, jnp.zeros(3), 40, localization=1.0)
    refuses(ValueError, lambda: slt.effective_dimension(posterior, DATA), "loss_of_outputs", "curvature='hessian'")
    assert slt.effective_dimension(posterior, DATA, curvature="hessian").value > 0
    losses = (
        lambda model, x: jnp.mean(model.hidden(x) ** 2, axis=-1),
        lambda model, x: jax.vmap(lambda row: jnp.mean(model(row) ** 2))(x),
    )
    for loss in losses:
        params, loss_fn = slt.from_nnx(MLP(nnx.Rngs(0)), loss)
        posterior = slt.LocalPosterior(loss_fn, params, ROWS, localization=1.0)
        refuses(ValueError, lambda p=posterior: slt.effective_dimension(p, INPUTS), "cannot be separated", "forward")
        assert slt.effective_dimension(posterior, INPUTS, curvature="hessian", order=2, probes=1).value > 0


@pytest.mark.quick
def test_a_loss_without_a_second_derivative_is_refused():
    """Kills: an error of JAX that names neither the matrix nor the reason."""
    opaque = jax.custom_vjp(lambda z: 2 * z)
    opaque.defvjp(lambda z: (2 * z, None), lambda _, g: (2 * g,))
    square = jax.custom_vjp(lambda z: z**2)
    square.defvjp(lambda z: (z**2, z), lambda z, g: (opaque(z) * g,))
    posterior = slt.LocalPosterior(lambda w, x: square(x @ w), jnp.ones(3), 40, localization=1.0)
    for settings in ({}, {"order": 2}):
        call = functools.partial(slt.effective_dimension, posterior, DATA, curvature="hessian", **settings)
        refuses(ValueError, call, "hessian", "custom_vjp")


@pytest.mark.quick
def test_what_does_not_fit_is_refused_before_it_is_begun(monkeypatch):
    monkeypatch.setattr("slt_jax.estimators.spectral.taken_and_free", lambda devices: (0.0, 0.0, 100.0))
    for settings, words in (({}, ("a matrix of 3 rows", "exact=False")), ({"order": 2}, ("order 2", "lower order"))):
        call = functools.partial(slt.effective_dimension, CLOSED, DATA, **settings)
        refuses(MemoryError, call, *words)
