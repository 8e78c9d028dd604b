"""The call for susceptibilities: exact leverages, names and masks, one program for all heads, resuming, refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slt_jax as slt
from slt_jax.estimators import susceptibilities as call
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.restrict import part_names, restricted
from tests.durable import watched
from tests.results.susceptible import BETA, D, Linear, N
from tests.small import refuses

PARTS = {"first": [0, 1, 2], "last": [5, 6, 7], "mixed": [1, 4]}
CONFIG = DecoderConfig(11, 6, 8, 2, 2, mlp_width=8)
TOKENS = np.random.default_rng(0).integers(0, 11, (40, 6)).astype(np.int32)
SMALL = {"sampler": slt.sgld(1e-3), "num_chains": 2, "num_draws": 8, "thinning": 1, "batch_size": 8}
LINEAR = {
    "sampler": slt.underdamped(1e-2, 0.3), "num_chains": 8, "num_draws": 240, "num_warmup": 200, "thinning": 8,
    "batch_size": N, "key": 1,
}  # fmt: skip
SHORT = {"num_draws": 16, "num_chains": 2}


def mask_of(free):
    mask = np.zeros(D, bool)
    mask[free] = True
    return mask


@pytest.fixture(scope="module")
def linear():
    """(model, posterior, data): with full batches BAOAB draws from a Gaussian exactly; the localization is nothing."""
    model = Linear()
    data = (model.x.astype(np.float32), model.y.astype(np.float32))
    target = slt.LocalPosterior(
        lambda w, batch: 0.5 * (batch[1] - batch[0] @ w) ** 2, jnp.asarray(model.center, jnp.float32), N,
        nbeta=BETA * N, localization=1e-4,
    )  # fmt: skip
    return model, target, data


def of_linear(linear, estimator, parts=tuple(PARTS), **more):
    _, target, data = linear
    masks = {name: mask_of(PARTS[name]) for name in parts}
    return slt.susceptibilities(target, data, masks, data, estimator=estimator, **{**LINEAR, **more})


@pytest.fixture(scope="module", params=["one-chain", "two-chain"])
def sampled(request, linear):
    return request.param, of_linear(linear, request.param)


@pytest.mark.quick
def test_a_linear_model_has_its_leverages(linear, sampled):
    """Kills: the gap of another batch, moments of another probe, a component's mask, the draws of another run."""
    model, (estimator, found) = linear[0], sampled
    assert found.components == list(PARTS)
    assert found.dataset.attrs["estimator"] == estimator
    assert found.dataset.attrs["beta"] == pytest.approx(BETA)
    exact = np.array([model.chi(free, estimator) for free in PARTS.values()])
    z = (found.chi.values - exact) / found.stderr.values
    assert 0.6 < z.std() < 1.5  # of about 20 independent directions; test_susceptibility_columns has many runs
    assert np.abs(z).max() < 5
    away = (found.chi.values - exact) / exact.std(1, keepdims=True)
    assert np.sqrt((away**2).mean()) < 0.25
    assert all(value > (0.9 if estimator == "one-chain" else 0.8) for value in found.reliability.values())
    assert found.quality("first") == "more signal than noise"
    assert (found.full is not None) == (estimator == "two-chain")


def test_the_llc_of_each_component_comes_with_it(linear, sampled):
    """d_C / 2. Kills: results of other components; observed values that stay in memory."""
    for name, free in PARTS.items():
        result = sampled[1].results[name]
        assert abs(result.llc - len(free) / 2) < 4 * result.llc_stderr
        assert result.observed == {}
        assert result.settings.num_free == len(free)


@pytest.fixture(scope="module")
def whole(linear):
    return of_linear(linear, "one-chain", **SHORT)


def test_a_component_does_not_depend_on_the_others(linear, whole):
    """Kills: keys by number, which would change with the list of components."""
    alone = of_linear(linear, "one-chain", parts=["last"], **SHORT)
    np.testing.assert_array_equal(alone.chi.values[0], whole.chi.values[1])
    assert not np.array_equal(whole.chi.values[0], whole.chi.values[1])


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, sequence_loss)
    return slt.LocalPosterior(loss_fn, params, num_data=40, nbeta=10.0, localization=5.0)


@pytest.fixture(scope="module")
def heads(decoder):
    """(susceptibilities of tokens, what ``on_component`` heard, times that the loss was traced by then)."""
    traces, told, loss_fn = [], [], decoder.loss_fn

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    def heard(name, so_far):
        told.append((name, so_far.components, len(traces)))

    counted.token_losses = loss_fn.token_losses
    target, names = dataclasses.replace(decoder, loss_fn=counted), part_names(decoder.center, "heads")
    probe = slt.Observable(TOKENS[:5], level="token")
    return slt.susceptibilities(target, TOKENS, names, probe, on_component=heard, estimator="one-chain", **SMALL), told


def test_heads_share_one_program_and_read_tokens(heads):
    """Kills: a program for each head; the loss of tokens at the weights w*; a callback that is called too late."""
    found, told = heads
    names = ["layer 0 head 0", "layer 0 head 1", "layer 1 head 0", "layer 1 head 1"]
    assert [(name, so_far) for name, so_far, _ in told] == [(name, names[: k + 1]) for k, name in enumerate(names)]
    assert len({count for _, _, count in told}) == 1
    assert found.chi.dims == ("component", "example", "token")
    assert found.chi.shape == (4, 5, 5)
    assert np.abs(found.chi.values).min() > 0


def test_a_function_of_the_probe_gets_all_parameters(decoder, heads):
    """Kills: an Observable's function that is called with the parameters of a restriction; tokens in another order."""
    by_hand = slt.Observable(TOKENS[:5], fn=lambda params, batch: decoder.loss_fn(params, batch), level="example")
    own = slt.susceptibilities(decoder, TOKENS, ["layer 0 head 1"], by_hand, estimator="one-chain", **SMALL)
    tokens = heads[0].chi.values[1].mean(-1)
    np.testing.assert_allclose(own.chi.values[0], tokens, 1e-3, 1e-3 * np.abs(tokens).max())


def test_names_and_masks_are_parts(decoder, monkeypatch):
    """Kills: a name in a mapping that is taken for a mask, a posterior's own mask that is lost."""

    class Seen(Exception):
        pass

    def seen(request, screen):
        raise Seen(request.posterior.num_free)

    monkeypatch.setattr(call, "estimate", seen)
    mlp = restricted(decoder, "layer 0 mlp").num_free
    both, frozen = (lambda path: path[:2] == ("blocks", "mlp")), lambda path: path[-1] != "up"
    for rule, mask, count in [("layer 0 mlp", None, mlp), (both, None, 2 * mlp), (both, frozen, 2 * (mlp - 64))]:
        target = dataclasses.replace(decoder, mask=mask)
        with pytest.raises(Seen) as error:
            slt.susceptibilities(target, TOKENS, {"x": rule}, TOKENS[:5], estimator="one-chain", **SMALL)
        assert error.value.args == (count,)


def test_a_call_is_resumed_without_what_is_finished(linear, whole, tmp_path):
    """Kills: components that run again; a state that is lost; a folder of another probe that is taken."""
    short = {**SHORT, "checkpoint_dir": tmp_path / "run", "checkpoint_seconds": 0, "chunk_size": 100}
    with watched(stop_at=250, part=1) as begun:
        part = of_linear(linear, "one-chain", **short)
    assert (part.interrupted, part.components) == (3, ["first"])
    assert "of 3: interrupted" in repr(part)
    np.testing.assert_array_equal(part.chi.values[0], whole.chi.values[0])
    with watched() as begun:
        resumed = of_linear(linear, "one-chain", **short)
    assert begun[0] >= 250
    assert begun.count(0) == 1  # the third component alone begins
    with watched() as begun:
        again = of_linear(linear, "one-chain", **short)
    assert begun == []
    for found in (resumed, again):
        np.testing.assert_array_equal(found.chi.values, whole.chi.values)
        np.testing.assert_array_equal(found.stderr.values, whole.stderr.values)
    _, target, data = linear
    other = tuple(x[:7] for x in data)
    with pytest.raises(ValueError, match=str(tmp_path / "run")):
        slt.susceptibilities(target, data, {"first": mask_of(PARTS["first"])}, other, **{**LINEAR, **short})


def test_the_first_component_that_is_interrupted_gives_nothing(linear):
    """Kills: an empty result in the place of KeyboardInterrupt."""
    with watched(stop_at=0), pytest.raises(KeyboardInterrupt):
        of_linear(linear, "one-chain", **SHORT)


@pytest.mark.quick
@pytest.mark.parametrize(("changed", "kind", "words"), [
    ({"estimator": "three"}, ValueError, ["estimator", "'two-chain'", "three"]),
    ({"components": "layer 0"}, TypeError, ["components", "layer 0"]),
    ({"components": []}, TypeError, ["components"]),
    ({"components": ["layer 0", "layer 0"]}, ValueError, ["'layer 0' twice"]),
    ({"components": {"all weights": "layer 0"}}, ValueError, ["all weights"]),
    ({"components": ["layer 9"]}, ValueError, ["component 'layer 9'", "layers 0 to 1"]),
    ({"components": {"x": lambda path: False}}, ValueError, ["component 'x'", "no weight free"]),
    ({"on_component": 3}, TypeError, ["on_component", "3"]),
    ({"groups": ["a"]}, ValueError, ["groups", "5 examples"]),
    ({"observe": slt.Observable(TOKENS, keep="values")}, ValueError, ["moments", "keep='values'"]),
    ({"observe": slt.Observable(TOKENS, fn=lambda p, b: b)}, ValueError, ["level='custom'"]),
    ({"sampler": slt.underdamped(metric="kronecker")}, ValueError, ["metric"]),
    ({"num_chains": 0}, ValueError, ["num_chains"]),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_arguments_are_refused_in_words(decoder, changed, kind, words):
    given = {"components": ["layer 0"], "observe": TOKENS[:5], **SMALL, **changed}
    refuses(kind, lambda: slt.susceptibilities(decoder, TOKENS, **given), *words)


@pytest.mark.quick
def test_a_localization_is_needed(decoder):
    free = dataclasses.replace(decoder, localization=None)
    refuses(ValueError, lambda: slt.susceptibilities(free, TOKENS, ["layer 0"], TOKENS[:5]), "localization", "300")


def test_without_the_data_a_control_is_left(linear):
    """At nbeta = 0 the draws are N(w*, 1 / localization). Kills: a control that still feels the data."""
    model, target, data = linear
    gamma, free = 4.0, PARTS["first"]
    control = dataclasses.replace(target, nbeta=0.0, localization=gamma)
    given = {**LINEAR, "estimator": "one-chain"}
    found = slt.susceptibilities(control, data, {"first": mask_of(free)}, data, **given)
    x = model.x[:, free]
    a = x.T @ x / N
    exact = -(np.einsum("id,de,ie->i", x, a, x) - np.trace(a @ a)) / (2 * gamma**2)
    z = (found.chi.values[0] - exact) / found.stderr.values[0]
    assert np.abs(z).max() < 5
    assert 3 * np.sqrt((found.stderr.values**2).mean()) < exact.std()  # so that the test can fail
    assert found.dataset.attrs["nbeta"] == 0
