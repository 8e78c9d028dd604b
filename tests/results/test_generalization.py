"""Equations of state against exact posteriors: linear models, and y = w^k x with its singular minimum."""

import dataclasses
import math

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.results.averages import averages_of
from slt_jax.results.observed import moments_of
from tests.results.exact_draws import Singular, linear, observed, of_linear
from tests.small import made_result, refuses


def moments_only(seen):
    return dataclasses.replace(seen, values=None, moments=seen.as_moments())


def within(found, truth, errors=3.0):
    assert abs(found.value - truth) < errors * found.stderr, f"{found} is not {truth}"


@pytest.mark.quick
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.3, 20.0)])
def test_the_linear_model_is_exact(beta, gamma):
    """Kills: nu without its half or its beta; V without n / m; WAIC with V instead of beta V / n; errors that are far
    too large."""
    model = linear(beta=beta, gamma=gamma)
    covariance, gibbs, bayes = model.exact()
    v, n = np.trace(covariance), len(model.y)
    found = slt.generalization(None, of_linear(model, np.random.default_rng(1), draws=2000))
    h = np.linalg.eigvalsh(model.x.T @ model.x)
    within(found.llc, float((beta * h / (beta * h + gamma)).sum() / 2))
    within(found.functional_variance, v)
    within(found.fluctuation, beta * v / 2)
    within(found.gibbs_train, gibbs.mean())
    within(found.gibbs_predicted, gibbs.mean() + beta * v / n)
    within(found.bayes_train, bayes.mean())
    within(found.waic, bayes.mean() + beta * v / n)
    assert found.functional_variance.stderr < 0.04 * v
    assert found.waic.stderr < 0.01
    assert 0.75 < found.ess / 8000 <= 1
    assert found.num_examples == found.num_data == n


@pytest.mark.quick
def test_errors_are_those_of_many_runs():
    """The spread of 120 runs of correlated draws, and their mean: no bias of order 1 / ESS.

    Kills: variances over ddof 0 or without the correlation; errors of independent draws (half as large here); the
    sampling of examples forgotten, or without the finite population.
    """
    model, rng = linear(n=30, d=3), np.random.default_rng(2)
    covariance, _, bayes = model.exact()
    root, center = np.linalg.cholesky(model.covariance), model.losses(model.center)
    found, phi = [], 0.6
    for _ in range(120):
        rows = rng.choice(30, 15, replace=False)
        z = rng.standard_normal((4, 101, 3))
        for t in range(1, 101):
            z[:, t] = phi * z[:, t - 1] + math.sqrt(1 - phi**2) * z[:, t]
        losses = model.losses(model.mean + z[:, 1:] @ root.T)[..., rows]
        found.append(slt.generalization(None, observed(losses, center[rows], 30, 30.0)))
    for name, truth in (("functional_variance", np.trace(covariance)), ("bayes_train", bayes.mean())):
        values, errors = np.array([getattr(f, name) for f in found]).T
        assert abs(values.mean() - truth) < 3 * values.std(ddof=1) / math.sqrt(120)
        assert 0.75 < errors.mean() / values.std(ddof=1) < 1.3


@pytest.mark.quick
def test_errors_of_all_examples_are_those_of_independent_draws():
    """Each against the spread of a single draw's share in it. Kills: a jackknife that has the mean twice."""
    model, rng = linear(n=30, d=3), np.random.default_rng(15)
    losses = model.losses(model.draw(rng, 1, 20_000))[0]
    away = losses - losses.mean(0)
    share = {
        "gibbs_train": losses.mean(1),
        "functional_variance": (away**2).sum(1),
        "bayes_train": (np.exp(-losses) / np.exp(-losses).mean(0)).mean(1),
        "waic": (away**2).mean(1) - (np.exp(-losses) / np.exp(-losses).mean(0)).mean(1),
    }
    runs = [slt.generalization(None, of_linear(model, rng)) for _ in range(12)]
    for name, single in share.items():
        errors = [getattr(found, name).stderr for found in runs]
        assert 0.88 < np.sqrt(np.mean(np.square(errors))) / (single.std() / math.sqrt(2000)) < 1.12, name


@pytest.mark.quick
def test_few_correlated_draws_do_not_bias_the_variance():
    """All examples, 2 chains of 40 draws. Kills: V of ddof 1, a tenth low here."""
    model, rng, found = linear(n=30, d=3), np.random.default_rng(3), []
    root, phi = np.linalg.cholesky(model.covariance), 0.7
    for _ in range(300):
        z = rng.standard_normal((2, 40, 3))
        for t in range(1, 40):
            z[:, t] = phi * z[:, t - 1] + math.sqrt(1 - phi**2) * z[:, t]
        seen = observed(model.losses(model.mean + z @ root.T), model.losses(model.center), 30, 30.0)
        found.append(averages_of(seen).values[1] * 30)
    truth, error = np.trace(model.exact()[0]), np.std(found, ddof=1) / math.sqrt(300)
    assert abs(np.mean(found) - truth) < 0.03 * truth + 3 * error


@pytest.mark.quick
def test_differences_between_chains_give_the_same_variance():
    """Of chains that move slowly, where the variance within a chain needs a correction; the errors are right.

    Kills: a variance over ddof 0; one over draws; the number of examples that were observed in the place of all; texts
    whose tokens are taken one by one.
    """
    model, rng = linear(n=30, d=3), np.random.default_rng(5)
    v, root, phi = np.trace(model.exact()[0]), np.linalg.cholesky(model.covariance), 0.7
    found = []
    for _ in range(60):
        z = rng.standard_normal((4, 200, 3))
        for t in range(1, 200):
            z[:, t] = phi * z[:, t - 1] + math.sqrt(1 - phi**2) * z[:, t]
        losses = model.losses(model.mean + z @ root.T)
        seen = observed(losses, model.losses(model.center), 30, 30.0)
        found.append(slt.generalization(None, seen).functional_variance_between_chains)
    away = np.array([x.value for x in found]) - v
    assert abs(away.mean()) < 3 * away.std(ddof=1) / math.sqrt(60)
    z = away / [x.stderr for x in found]
    assert 0.75 < z.std() < 1.35
    some = observed(losses[..., ::2], model.losses(model.center)[::2], 30, 30.0, gap=losses.mean(-1))
    of_some = slt.generalization(None, some).functional_variance_between_chains
    assert of_some.value == pytest.approx(30 * losses[..., ::2].var(0, ddof=1).mean(), rel=1e-4)
    assert of_some.stderr > 1.5 * found[-1].stderr
    texts = observed(losses.reshape(4, 200, 10, 3), model.losses(model.center).reshape(10, 3), 10, 30.0)
    summed = 10 * losses.reshape(4, 200, 10, 3).sum(-1).var(0, ddof=1).mean()
    of_texts = slt.generalization(None, texts).functional_variance_between_chains
    assert of_texts.value == pytest.approx(summed, rel=1e-4)
    assert slt.generalization(None, moments_only(seen)).functional_variance_between_chains is None


@pytest.mark.quick
def test_nu_is_not_the_variance_of_the_mean_loss():
    """With noise of sd 1.5, nu = 2.25 d / 2 and beta^2 Var(n L_n) = d / 2. Kills: nu computed from the mean loss."""
    n, d = 4000, 5
    model, rng = linear(n=n, d=d, noise=1.5, seed=4), np.random.default_rng(5)
    seen = of_linear(model, rng, draws=400)
    found = slt.generalization(None, seen)
    residual = model.y - model.x @ model.center
    limit = 0.5 * np.sum(residual**2 * np.einsum("ij,jk,ik->i", model.x, model.covariance, model.x))
    within(found.fluctuation, limit + 0.5 * d**2 / n)  # the second term of C_ii, of order 1 / n
    assert abs(limit - 2.25 * d / 2) < 3 * 2.25 * d / 2 * math.sqrt(10 / n)  # of this data set
    mean_loss = n * seen.gap
    error = mean_loss.var() * math.sqrt(2 * (1 + 6 / d) / 1600)  # kurtosis of a chi-square of d degrees
    assert abs(mean_loss.var() - d / 2) < 3 * error


NU = {2: (0.17297, 0.14182, 0.13670), 3: (0.27837, 0.18185, 0.16890), 4: (0.13786, 0.09546, 0.08974)}


@pytest.mark.quick
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_singular_fluctuation_of_singular_models(k, at):
    """nu averaged over data sets against its limit by quadrature, and each data set's against its own.

    Kills: nu taken for lambda (1 / 2k, or 1 / 2); nu without beta.
    """
    n, beta, rng = 20_000, (1.0, 1 / math.log(2000), 0.02)[at], np.random.default_rng(10 * k + at)
    exact = []
    for _ in range(100):
        model = Singular(k, rng.standard_normal(n), rng.standard_normal(n), beta)
        exact.append(beta * model.moments()[2] / 2)
    error = np.std(exact, ddof=1) / math.sqrt(100)
    assert abs(np.mean(exact) - NU[k][at]) < 3 * error + 0.01 * NU[k][at]  # of order 1 / (n beta)
    small = Singular(k, model.x[:2000], model.y[:2000], beta)
    losses = 0.5 * (small.y - small.draw(rng, 4, 500)[..., None] * small.x) ** 2
    found = slt.generalization(None, observed(losses, 0.5 * small.y**2, 2000, 2000 * beta))
    within(found.fluctuation, beta * small.moments()[2] / 2)
    assert found.fluctuation.stderr < 0.2 * found.fluctuation.value


def regular_case(seed, rng):
    """n times the excess over the loss of the truth: (predicted on new data, on new data, on the training data)."""
    model = linear(n=400, d=4, seed=seed)
    found, away = slt.generalization(None, of_linear(model, rng, draws=200)), model.mean - model.truth
    truth = model.losses(model.truth).mean()
    actual = 0.5 * (away @ away + np.trace(model.covariance))
    return 400 * np.array([found.gibbs_predicted.value - truth, actual, found.gibbs_train.value - truth])


def singular_case(seed, rng):
    model = Singular(2, rng.standard_normal(400), rng.standard_normal(400), 1.0)
    losses = 0.5 * (model.y - model.draw(rng, 4, 200)[..., None] * model.x) ** 2
    found, truth = slt.generalization(None, observed(losses, 0.5 * model.y**2, 400, 400.0)), 0.5 * (model.y**2).mean()
    actual = 0.5 * model.moments()[1]
    return 400 * np.array([found.gibbs_predicted.value - truth, actual, found.gibbs_train.value - truth])


@pytest.mark.quick
@pytest.mark.parametrize("case", [regular_case, singular_case])
def test_predicted_losses_of_data_sets_are_those_of_new_data(case):
    """The mean over 240 data sets; the study in ``scaling/observables`` has 400.

    Kills: the correction beta V / n left out, halved or doubled.
    """
    rng = np.random.default_rng(6)
    predicted, actual, trained = np.array([case(seed, rng) for seed in range(240)]).T
    error = (predicted - actual).std(ddof=1) / math.sqrt(240)
    assert abs((predicted - actual).mean()) < 3 * error
    assert actual.mean() - trained.mean() > 3 * error


def of_tokens(rng, *, n=12, tokens=5, draws=300, lengths=None):
    """A linear model whose examples are texts of tokens: (model of all tokens, Observed)."""
    model = linear(n=n * tokens, d=3, seed=7)
    losses = model.losses(model.draw(rng, 4, draws)).reshape(4, draws, n, tokens)
    valid = None if lengths is None else np.arange(tokens) < np.array(lengths)[:, None]
    return model, observed(losses, model.losses(model.center).reshape(n, tokens), n, 60.0, valid=valid)


@pytest.mark.quick
def test_tokens_and_their_texts():
    """Kills: V of texts taken for that of tokens; beta of texts for tokens; tokens that do not count counted."""
    model, seen = of_tokens(np.random.default_rng(8))
    covariance = model.exact()[0]
    of_texts = covariance.reshape(12, 5, 12, 5).sum((1, 3))
    found = slt.generalization(None, seen)
    assert found.beta == 1.0
    within(found.functional_variance, np.trace(of_texts), 3)
    within(found.functional_variance_of_tokens, np.trace(covariance), 3)
    within(found.gibbs_predicted, model.exact()[1].mean() + np.trace(of_texts) / 60)
    assert not any("texts" in flag or "nbeta" in flag for flag in found.flags)
    more = of_tokens(np.random.default_rng(8), n=100, draws=100)[1]
    copied = dataclasses.replace(more, values=np.repeat(more.values[..., :1], 5, -1))
    wrong = slt.generalization(None, copied)
    assert any("V of whole texts is 5.00 times" in flag for flag in wrong.flags)
    lengths = [5, 3] * 6
    padded = dataclasses.replace(seen, valid=np.arange(5) < np.array(lengths)[:, None])
    padded.values[:, :, 1::2, 3:] = np.nan
    found = slt.generalization(None, padded)
    mask = padded.valid.reshape(-1)
    within(found.gibbs_train, model.exact()[1][mask].mean())
    within(found.functional_variance_of_tokens, np.diag(covariance)[mask].sum())
    assert found.beta == 60 / 48


def test_moments_give_the_same_without_bayes():
    """Kills: a Bayes loss made up from moments; V of tokens that is silently called V."""
    seen = of_linear(linear(), np.random.default_rng(9))
    whole, part = slt.generalization(None, seen), slt.generalization(None, moments_only(seen))
    for name in ("functional_variance", "fluctuation", "gibbs_train", "gibbs_predicted", "large_share"):
        assert np.allclose(getattr(whole, name), getattr(part, name), rtol=1e-6)
    assert part.bayes_train is None
    assert part.waic is None
    assert "moments" in part.missing["waic"]
    assert "not known: only moments" in str(part)
    tokens = slt.generalization(None, moments_only(of_tokens(np.random.default_rng(8))[1]))
    assert tokens.functional_variance == tokens.functional_variance_of_tokens
    assert any("single tokens" in flag for flag in tokens.flags)


@pytest.mark.quick
@pytest.mark.parametrize("piece", [1 << 24, 300])
def test_moments_are_those_of_a_plain_loop(monkeypatch, piece):
    """Kills: parts of a block that are joined wrong; blocks over the border of chains; co-moments without center."""
    monkeypatch.setattr("slt_jax.results.observed._PIECE", piece)
    rng = np.random.default_rng(10)
    values, gap = 3 + rng.standard_normal((2, 43, 70)), rng.standard_normal((2, 43))
    found = moments_of(observed(values, np.zeros(70), 70, 70.0, gap=gap))
    edges = np.linspace(0, 43, 9).astype(int)
    for c in range(2):
        for b in range(8):
            part, loss = values[c, edges[b] : edges[b + 1]], gap[c, edges[b] : edges[b + 1]]
            assert found.count[c, b] == len(part)
            np.testing.assert_allclose(found.mean[c, b], part.mean(0), rtol=1e-5)
            np.testing.assert_allclose(found.m2[c, b], part.var(0) * len(part), rtol=1e-5)
            np.testing.assert_allclose(found.loss_mean[c, b], loss.mean(), rtol=1e-5)
            np.testing.assert_allclose(found.loss_m2[c, b], loss.var() * len(loss), rtol=1e-5)
            co = ((loss - loss.mean())[:, None] * part).sum(0)
            np.testing.assert_allclose(found.co[c, b], co, atol=1e-5)


SETTINGS = {"nbeta": 40.0, "num_data": 40, "num_chains": 4, "num_draws": 500, "localization": 0.0, "num_free": 4}


def run(seen, **changes):
    loss = (seen.gap + 1.0).astype(np.float32)
    settings = {**SETTINGS, "num_draws": loss.shape[1], "nbeta": seen.nbeta, "num_data": seen.num_data, **changes}
    return dataclasses.replace(
        made_result(loss, loss[:, :20], settings, baseline=np.ones_like(loss), virial=4.0), observed={"train": seen}
    )


def test_with_the_result_of_a_run():
    """Kills: a LLC that is not the result's; the heat left in V; held-out data taken for training data."""
    model, rng = linear(noise=0.3), np.random.default_rng(11)
    seen = of_linear(model, rng)
    hot = run(seen)
    bias = dataclasses.replace(hot.bias, step_size=0.2, stderr=0.05, applied=0.2)
    hot.__dict__["bias"] = bias
    found, plain = slt.generalization(hot, "train"), slt.generalization(None, seen)
    factor = hot.llc / hot.llc_raw
    assert found.heat == factor < 1
    assert found.llc == (hot.llc, hot.llc_stderr)
    assert math.isclose(found.functional_variance.value, factor * plain.functional_variance.value)
    error = math.hypot(factor * plain.functional_variance.stderr, 0.05 / hot.llc_raw * plain.functional_variance.value)
    assert math.isclose(found.functional_variance.stderr, error)
    excess = found.gibbs_train.value - seen.center.mean(dtype=np.float64)
    raw = plain.gibbs_train.value - seen.center.mean(dtype=np.float64)
    assert math.isclose(excess, factor * raw, rel_tol=1e-6)
    other = observed(seen.values + 1.0, seen.center + 1.0, 40, 40.0, name="new")
    both = slt.generalization(dataclasses.replace(run(seen), observed={"train": seen, "new": other}), "train", "new")
    assert math.isclose(both.gibbs_heldout.value - both.gibbs_train.value, 1.0, rel_tol=1e-5)
    assert both.gibbs_heldout.stderr > 3 * both.gibbs_train.stderr  # all of the training set, but 40 of infinitely many
    assert "heldout" not in str(plain)
    assert "nbeta = n / log n = 10.84" in both.missing["wbic"]
    at_wbic = dataclasses.replace(seen, nbeta=40 / math.log(40))
    found = slt.generalization(run(at_wbic), "train")
    assert math.isclose(found.wbic.value, 40 * (seen.gap.mean() + 1), rel_tol=1e-5)
    assert 0.8 < found.wbic.stderr / (40 * seen.gap.std() / math.sqrt(2000)) < 1.25


def test_cautions_and_what_is_shown():
    """Kills: WAIC at nbeta = 30 without a word; large variances without a word."""
    wide = slt.generalization(None, of_linear(linear(beta=0.05), np.random.default_rng(12)))
    assert wide.large_share.value > 0.1
    assert any("WAIC are not valid" in flag for flag in wide.flags)
    assert any("nbeta is 2 and there are 40 examples" in flag for flag in wide.flags)
    fine = slt.generalization(None, of_linear(linear(n=400), np.random.default_rng(13)))
    assert fine.flags == ()
    assert "<script" not in fine._repr_html_()
    assert "Caution" in wide._repr_html_()
    assert len(repr(wide)) < 200
    assert str(fine).count("\n") == 9
    assert fine.to_dict()["functional_variance"]["value"] == fine.functional_variance.value


@pytest.mark.quick
def test_two_draws_have_no_errors():
    """Without either of two draws the other's variance is 0. Kills: V +/- 0; "nan effective draws"."""
    seen = of_linear(linear(), np.random.default_rng(15), draws=2, chains=1)
    found = slt.generalization(None, seen)
    assert found.functional_variance.value > 0
    assert math.isnan(found.functional_variance.stderr)
    assert "nan" not in " ".join(found.flags)
    assert math.isfinite(slt.generalization(None, of_linear(linear(), np.random.default_rng(15), draws=4)).waic.stderr)


@pytest.mark.quick
def test_without_draws_there_is_a_reason():
    """Kills: a division by zero for chains that all diverged, or for a single draw."""
    seen = of_linear(linear(), np.random.default_rng(16), draws=3, chains=1)
    none = dataclasses.replace(seen, values=seen.values[:0], gap=seen.gap[:0])
    refuses(ValueError, lambda: slt.generalization(None, none), "train='train'", "no chain", "step_size")
    refuses(ValueError, lambda: slt.influence(None, none, none), "of='train'", "no chain")
    one = dataclasses.replace(seen, values=seen.values[:, :1], gap=seen.gap[:, :1])
    refuses(ValueError, lambda: slt.generalization(None, one), "at least 2", "has 1")


def test_refusals(wrong_types):
    seen = of_linear(linear(), np.random.default_rng(14))
    result = run(seen)
    refuses(ValueError, lambda: slt.generalization(result, "test"), "'test'", "'train'", "observe=")
    refuses(TypeError, lambda: slt.generalization(result, 3), "train", "int")
    refuses(ValueError, lambda: slt.generalization(None, dataclasses.replace(seen, level="custom")), "custom")
    tokens = of_tokens(np.random.default_rng(8))[1]
    refuses(ValueError, lambda: slt.generalization(None, seen, tokens), "'example'", "'token'")
    broken = dataclasses.replace(seen, values=np.where(np.arange(40) == 3, np.inf, seen.values))
    refuses(ValueError, lambda: slt.generalization(None, broken), "not finite")
