"""What a result of susceptibilities computes: z-scores, centering, principal components, responses, patterns, files."""

import math

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.results import patterns
from slt_jax.results.susceptibilities_data import dataset_of
from slt_jax.results.susceptibility_columns import column_of
from tests.results.susceptible import BETA, GROUPS, PARTS, Linear, N, observed, result_of
from tests.small import refuses


@pytest.fixture
def found():
    return result_of(np.random.default_rng(0))


@pytest.mark.quick
def test_zscores_are_of_each_component(found):
    """Kills: one scale for all components, errors that are not scaled, a chi that is changed in place."""
    before = found.chi.values.copy()
    scored = found.zscored()
    sd = before.std(1, keepdims=True)
    np.testing.assert_allclose(scored.chi.values, before / sd, 1e-5)
    np.testing.assert_allclose(scored.stderr.values, found.stderr.values / sd, 1e-5)
    np.testing.assert_array_equal(found.chi.values, before)
    np.testing.assert_allclose(scored.response()["response"].values, found.response()["response"].values / sd.T, 1e-4)
    np.testing.assert_allclose(scored.response()["stderr"].values, found.response()["stderr"].values / sd.T, 1e-4)


@pytest.mark.quick
def test_centering_takes_off_the_mean_over_components(found):
    """Kills: the mean over examples in its place; errors as if the mean were known."""
    centered = found.centered()
    np.testing.assert_allclose(centered.chi.values, found.chi.values - found.chi.values.mean(0), 1e-4, 1e-7)
    weights = np.eye(3) - 1 / 3
    expected = np.sqrt(weights**2 @ found.stderr.values.astype(float) ** 2)
    np.testing.assert_allclose(centered.stderr.values, expected, 1e-5)
    refuses(ValueError, centered.response, "centered", "response()")


@pytest.mark.quick
def test_principal_components_are_white_and_give_chi_back(found):
    """Kills: coordinates that are correlated or scaled, loadings of another order, shares that are not of variance."""
    white = found.whitened()
    coordinates, loading = white["coordinate"].values, white["loading"].values
    np.testing.assert_allclose(np.cov(coordinates), np.eye(3), atol=1e-5)
    away = found.chi.values - found.chi.values.mean(1, keepdims=True)
    np.testing.assert_allclose(loading.T @ coordinates, away, 1e-4, 1e-6)
    variances = np.linalg.eigvalsh(np.cov(away))[::-1]
    np.testing.assert_allclose(white["share"].values, variances / variances.sum(), 1e-4)
    np.testing.assert_allclose(found.whitened(2)["coordinate"].values, coordinates[:2], 1e-5)
    assert (loading[np.arange(3), np.abs(loading).argmax(1)] > 0).all()
    refuses(ValueError, lambda: found.whitened(4), "dims", "1 to 3", "4")


@pytest.mark.parametrize("estimator", ["one-chain", "two-chain"])
def test_responses_are_means_of_groups_with_their_errors(estimator):
    """Kills: a group's mean over other rows; errors as if examples were independent, or without the reference's."""
    rng, model, each = np.random.default_rng(1), Linear(), []
    first = result_of(rng, estimator)
    labels = np.array(GROUPS)
    means = np.stack([first.chi.values[:, labels == name].mean(1) for name in "abc"])
    np.testing.assert_allclose(first.response()["response"].values, means, 1e-4, 1e-6)
    by_rows = first.response({"x": np.flatnonzero(labels == "b")})
    np.testing.assert_allclose(by_rows["response"].values[0], means[1], 1e-4, 1e-6)
    assert first.response()["count"].values.tolist() == [20, 25, 15]
    exact = np.stack([model.chi(free, estimator) for free in PARTS.values()])
    exact = np.stack([exact[:, labels == name].mean(1) for name in "abc"])
    for _ in range(60):
        response = result_of(rng, estimator).response()
        each.append((response["response"].values - exact) / response["stderr"].values)
    z = np.array(each)  # of 60 runs, 3 components and 2 independent groups: its own error is about 0.04
    assert 0.85 < math.sqrt((z**2).mean()) < 1.25


@pytest.mark.quick
def test_a_pattern_is_the_pseudo_inverse_with_the_noise_as_ridge(found):
    """Kills: nbeta left out or twice, the transpose, a ridge that is not the variance of the responses."""
    response, nbeta = found.response(), BETA * N
    matrix, error = nbeta * response["response"].values, nbeta * response["stderr"].values
    wanted = np.array([0.0, -0.01, 0.0])
    pattern = found.pattern({"last": -0.01})
    direct = np.linalg.solve(matrix @ matrix.T + np.diag((error**2).sum(1)), matrix @ wanted)
    np.testing.assert_allclose(pattern.weights.values, direct, 1e-5, 1e-8)
    refuses(ValueError, lambda: found.pattern({"none": 1.0}), "none", "first, last, mixed")
    refuses(ValueError, lambda: found.zscored().pattern({"last": 1.0}), "zscored")
    found.dataset.attrs["nbeta"] = 0.0
    refuses(ValueError, lambda: found.pattern({"last": 1.0}), "nbeta = 0")


@pytest.mark.parametrize(("estimator", "draws"), [("one-chain", 128), ("two-chain", 64)])
def test_what_a_pattern_reaches_is_told_with_its_error(estimator, draws):
    """Weights of 60 single examples for 3 components follow the noise of the draws that chose them.

    Kills: the effect on those very draws, with errors as if the responses to the examples were independent (mean z^2
    of twice this); weights that the block itself has chosen, which reach the target too well by 0.7 to 1 error.
    """
    singles, model, scores, plain = {str(k): [k] for k in range(N)}, Linear(), [], []
    exact = np.stack([model.chi(free, estimator) for free in PARTS.values()])
    for seed in range(24):
        found = result_of(np.random.default_rng(seed), estimator, draws=draws)
        pattern = found.pattern({"first": -0.02, "mixed": 0.01}, singles)
        weights, response = pattern.weights.values, found.response(singles)
        true = BETA * N * exact @ weights
        scores.append((pattern.reached.values - true) / pattern.reached_stderr.values)
        spread = np.sqrt(weights**2 @ response["stderr"].values ** 2)
        plain.append((weights @ response["response"].values - true / (BETA * N)) / spread)
    assert abs(np.mean(scores, 0)[0]) < 0.5  # of 24 runs: 0.2 is one standard error
    assert np.mean(np.square(scores)) < 1.7
    assert np.mean(np.square(plain)) > 1.3 * np.mean(np.square(scores))  # else there is nothing to tell


@pytest.mark.quick
def test_a_block_that_is_left_out_has_no_part_in_the_draws_of_all_weights():
    """The response moves by phi times what their mean moves. Kills: the mean over all of them; another sign."""
    found = result_of(np.random.default_rng(3), "two-chain")
    chosen = {"a": np.arange(20), "b": np.arange(20, N)}
    whole, data = found._by_block(chosen), found.dataset
    rest, here = patterns._without(whole, 5)
    others, means = (
        np.arange(32) != 5,
        np.stack([data["full_blocks"].values[:, rows].mean(1) for rows in chosen.values()]),
    )
    for c, phi in enumerate(data["phi"].values):
        moved = phi * (means[:, others].mean(1) - means.mean(1))
        np.testing.assert_allclose(
            patterns.matrix_of(rest)[0][:, c], whole.parts[c, others].mean(0) + moved, 1e-4, 1e-7
        )
        np.testing.assert_allclose(here[c], whole.parts[c, 5] + phi * (means[:, 5] - means.mean(1)), 1e-4, 1e-7)


@pytest.mark.quick
def test_what_a_pattern_reaches_is_not_known_from_few_draws():
    """Kills: an error of 0 for two draws, of which either block is the other's whole sample."""
    model = Linear()
    columns = {"first": column_of(model.observed(PARTS["first"], 1, 2, np.random.default_rng(0)), "one-chain")}
    attributes = {"estimator": "one-chain", "level": "example", "nbeta": BETA * N, "beta": BETA}
    found = slt.Susceptibilities(dataset=dataset_of(columns, None, None, "example", GROUPS, attributes))
    assert np.isnan(found.stderr.values).all()
    assert np.isnan(found.response()["stderr"].values).all()
    refuses(ValueError, lambda: found.pattern({"first": 0.1}), "more draws")


@pytest.mark.quick
@pytest.mark.usefixtures("wrong_types")
def test_bad_groups_and_changes_are_refused(found):
    """Kills: an error of numpy's, or weights of NaN without a word."""
    refuses(ValueError, lambda: found.response({}), "groups is empty")
    refuses(ValueError, lambda: found.response({"q": []}), "'q' has no examples")
    refuses(ValueError, lambda: found.response({"q": [[1, 2], [3, 4]]}), "'q' must hold indices")
    refuses(TypeError, lambda: found.response(5), "groups must be a list", "5")
    refuses(TypeError, lambda: found.pattern("first"), "delta must be a mapping", "'first'")
    refuses(ValueError, lambda: found.pattern({"first": "x"}), "delta['first']", "'x'")
    refuses(ValueError, lambda: found.pattern({"first": float("nan")}), "delta['first']", "nan")


@pytest.mark.quick
def test_chi_times_nbeta_is_the_change_when_the_data_shift():
    """Kills: a sign, a factor of nbeta or of n. phi is a quadratic form: its mean is known for any weights."""
    model, free, step = Linear(), PARTS["first"], 1e-4
    found = result_of(np.random.default_rng(4), draws=256, parts={"first": free})
    x, r = model.x[:, free], model.r
    derivative = []
    for chosen in range(N):
        means = []
        for sign in (1, -1):
            weights = (1 - sign * step) / N + sign * step * (np.arange(N) == chosen)
            information = N * BETA * x.T @ (weights[:, None] * x)
            center = np.linalg.solve(information, N * BETA * x.T @ (weights * r))
            hessian = x.T @ x / N
            means.append(0.5 * (np.trace(hessian @ np.linalg.inv(information)) + center @ hessian @ center))
        derivative.append((means[0] - means[1]) / (2 * step))
    np.testing.assert_allclose(derivative, N * BETA * model.chi(free, "one-chain"), 1e-4, 1e-6)
    z = (BETA * N * found.chi.values[0] - derivative) / (BETA * N * found.stderr.values[0])
    assert np.abs(z).max() < 5
    assert (z**2).mean() < 3  # of about nine independent directions


@pytest.mark.parametrize("level", ["example", "token"])
def test_saved_ones_come_back(tmp_path, level):
    """Kills: a variable, a label or an attribute that is lost."""
    rng = np.random.default_rng(2)
    if level == "example":
        found = result_of(rng, "two-chain").zscored()
    else:
        valid = rng.random((6, 5)) < 0.7
        own = observed(rng.gamma(2.0, size=(2, 16, 6, 5)), np.ones((6, 5)), valid)
        attributes = {"estimator": "one-chain", "level": "token", "nbeta": 1.0}
        columns = {"x": column_of(own, "one-chain")}
        found = slt.Susceptibilities(dataset=dataset_of(columns, None, valid, "token", None, attributes))
    found.save(tmp_path / "s.zarr")
    again = slt.load_susceptibilities(tmp_path / "s.zarr")
    assert again.dataset.identical(found.dataset)
    assert (again.full, again.interrupted) == (None, 0)
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "s.zarr")


@pytest.mark.quick
def test_noise_is_called_noise():
    """Kills: a limit on the wrong side, a reliability that is not known and is called good."""
    found = result_of(np.random.default_rng(3), groups=None)
    found.dataset["reliability"].values[:] = [0.5, 0.49, math.nan]
    assert [found.quality(name) for name in PARTS] == ["more signal than noise", "mostly noise", "not known"]
    assert "1 of 2 reliable" in repr(found)
    refuses(ValueError, found.response, "groups")
