"""The page and the pictures of susceptibilities."""

import re

import numpy as np
import pytest

from slt_jax.report.susceptibilities import plot_components, plot_susceptibilities
from slt_jax.results.susceptibilities import Susceptibilities
from slt_jax.results.susceptibilities_data import dataset_of
from slt_jax.results.susceptibility_columns import ONE_CHAIN, column_of
from tests.results.susceptible import Linear, observed

ATTRIBUTES = {"estimator": ONE_CHAIN, "level": "example", "nbeta": 30.0, "beta": 0.5, "localization": 1.0,
              "num_data": 60, "num_chains": 4, "num_draws": 64}  # fmt: skip


def by_example():
    model, rng = Linear(), np.random.default_rng(0)
    columns = {name: column_of(model.observed(free, 4, 64, rng), ONE_CHAIN) for name, free in
               (("first", [0, 1, 2]), ("last", [5, 6, 7]), ("a <b>", [3, 4]))}  # fmt: skip
    groups = ["left"] * 20 + ["right"] * 40
    return Susceptibilities(dataset_of(columns, None, None, "example", groups, ATTRIBUTES))


def by_token():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(4, 64, 1, 1))
    values = (1 + z * np.array([[1.0, -1.0, 0.0], [0.5, 0.0, 0.0]]) + 0.1 * rng.normal(size=(4, 64, 2, 3))) ** 2
    one = observed(values, np.ones((2, 3)), gap=z[..., 0, 0])
    data = dataset_of({"part": column_of(one, ONE_CHAIN)}, None, None, "token", None, {**ATTRIBUTES, "level": "token"})
    return Susceptibilities(data)


@pytest.mark.quick
def test_a_page_by_example(tmp_path):
    """Kills: text taken for HTML; another component's values; values within their noise."""
    found = by_example()
    page = found.report(tmp_path / "a.html", texts=[f"<text {k}>" for k in range(60)], show="last").read_text()
    assert "<script" not in page
    assert "a &lt;b&gt;" in page
    assert "3 components, 60 examples" in page
    assert "Strongest responses of last" in page
    chi, error = found.chi.sel(component="last").values, found.stderr.sel(component="last").values
    rows = re.findall(r"([+-][\d.e-]+)\xa0±\xa0([\d.e-]+)</t\w>\s*<td[^>]*>(left|right): example (\d+)", page)
    assert 3 < len(rows) <= 10
    for value, stderr, group, k in rows:
        assert float(value) == pytest.approx(chi[int(k)], rel=0.01)
        assert abs(float(value)) > 1.9 * float(stderr)
        assert group == ("left" if int(k) < 20 else "right")
        assert f"&lt;text {k}&gt;" in page
    strong = np.flatnonzero(np.abs(chi) > 2 * error)
    assert {int(k) for *_, k in rows} >= {int(strong[chi[strong].argmin()]), int(strong[chi[strong].argmax()])}


@pytest.mark.quick
def test_a_page_by_token(tmp_path):
    """Kills: words of another token; a token that does not respond with a colour."""
    words = [["one", " two", "\n"], [" ", "five", "six"]]
    page = by_token().report(tmp_path / "b.html", texts=words).read_text()
    assert "⟦one⟧ two↵" in page
    assert "one ⟦two⟧↵" in page
    spans = re.findall(r'<span title="(.*?)"( style=".*?")?>(.*?)</span>', page, re.DOTALL)
    colored = {shown for _, style, shown in spans if style}
    assert {"one", "two"} <= colored


@pytest.mark.quick
def test_the_heat_map_has_the_means_of_groups():
    """Kills: groups in another order; sums in the place of means; chi that was not scaled."""
    found = by_example()
    axis = plot_susceptibilities(found).axes[0]
    shown = axis.images[0].get_array()
    np.testing.assert_allclose(shown, found.zscored().response()["response"].values.T, atol=1e-5)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["left", "right"]
    assert axis.get_yticklabels()[0].get_text() == f"first ({found.reliability['first']:.2f})"
    assert plot_susceptibilities(found, by="example").axes[0].images[0].get_array().shape == (3, 60)
    assert plot_susceptibilities(by_token()).axes[0].images[0].get_array().shape == (1, 3)
    scatter = plot_components(found).axes[0].collections
    assert [len(points.get_offsets()) for points in scatter] == [40, 20]
    with pytest.raises(ValueError, match="by must be one of 'group', 'example', got 'token'"):
        plot_susceptibilities(found, by="token")


@pytest.mark.quick
def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="texts must have a text for each of the 60 examples, got 2"):
        by_example().report(tmp_path / "a.html", texts=["a", "b"])
    with pytest.raises(
        ValueError, match=r"texts\[1\] must be a list with the string of each predicted token, 3 of them"
    ):
        by_token().report(tmp_path / "a.html", texts=[["a", "b", "c"], "abc"])
    with pytest.raises(ValueError, match=r"show names 'x'\. The components are part"):
        by_token().report(tmp_path / "a.html", show="x")
