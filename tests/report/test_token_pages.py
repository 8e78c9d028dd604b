"""Pages of coloured tokens, and the page and the picture of an influence."""

import dataclasses
import re

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.report.tokens import color_of, limit_of
from tests.results.exact_draws import linear, observed, of_linear
from tests.small import refuses

WORDS = [["The", " <b>", "\n", " end"], [" of", " it"]]


@pytest.mark.quick
def test_a_page_of_tokens(tmp_path):
    """Kills: text taken for HTML; tooltips without errors; a token's colour on its neighbour; scripts."""
    values = [[1.0, -0.5, 0.01, np.nan], [0.2, 0.0]]
    errors = [[0.1, 0.1, 0.1, np.nan], [0.01, 0.1]]
    path = slt.token_page(tmp_path / "a.html", WORDS, values, errors=errors, title="A & B", quantity="influence")
    text = path.read_text()
    assert "<script" not in text
    assert "http" not in text.split("</style>")[1]
    assert "A &amp; B" in text
    assert "2 texts, 5 values" in text
    spans = re.findall(r'<span title="(.*?)"( style=".*?")?>(.*?)</span>', text, re.DOTALL)
    assert [shown for *_, shown in spans] == ["The", "&lt;b&gt;", "↵\n", "of", "it"]
    assert "+1 ± 0.1" in spans[0][0]
    assert "0, 114, 178" in spans[0][1]
    assert "213, 94, 0" in spans[1][1]
    assert spans[2][1] == "" == spans[4][1]
    assert "<span> </span><span>end</span>" in text
    assert "no colour: within two standard errors of 0" in text


@pytest.mark.quick
def test_colours_grow_with_the_value():
    """Kills: colours of noise; a scale that one outlier sets; all zero values."""
    assert color_of(0.19, 0.1, 1.0) == ""
    opacity = [float(color_of(x, 0.1, 1.0).split(",")[-1].strip(" )")) for x in (0.3, 0.6, 1.0, 5.0)]
    assert opacity == sorted(opacity)
    assert opacity[2] == opacity[3] == 0.62
    assert limit_of(np.r_[np.full(1000, 0.1), 50.0]) < 1
    assert limit_of(np.zeros(3)) == limit_of(np.full(3, np.nan)) == 1.0


def test_a_page_refuses(tmp_path):
    page = tmp_path / "a.html"
    refuses(ValueError, lambda: slt.token_page(page, WORDS, [[1.0] * 4]), "2 texts", "1 values")
    refuses(ValueError, lambda: slt.token_page(page, WORDS, [[1.0] * 4, [1.0]]), "text 1 has 2 tokens", "1 values")
    slt.token_page(page, WORDS, [[1.0] * 4, [1.0] * 2])
    refuses(FileExistsError, lambda: slt.token_page(page, WORDS, [[1.0] * 4, [1.0] * 2]), "overwrite=True")


@pytest.fixture(scope="module")
def found():
    """Eight texts of three tokens, of a linear model; the last token of the second does not count."""
    model, rng = linear(n=24, d=2, seed=3), np.random.default_rng(1)
    losses = model.losses(model.draw(rng, 4, 100)).reshape(4, 100, 8, 3)
    valid = np.ones((8, 3), bool)
    valid[1, 2] = False
    return slt.influence(None, *2 * [observed(losses, np.zeros((8, 3)), 8, 24.0, valid=valid, name="texts")])


@pytest.mark.quick
def test_the_page_of_an_influence_on_a_token(found, tmp_path):
    """Kills: values of another token; another text's words; a target that is not framed."""
    texts = [[f" w{i}.{t}" for t in range(3)] for i in range(8)]
    j = 4  # the second token of the second text: one before it does not count
    assert found.on.labels[j].tolist() == [0, 1, 1]
    text = found.report(tmp_path / "a.html", j, texts, k=3).read_text()
    assert "Influence on “w1.1”" in text
    assert re.findall(r'class="aim"[^>]*>(.*?)<', text)[0] == "w1.1"
    ranking = found.top(j, 3)
    table = text.split("The strongest tokens")[1].split("</table>")[0]
    for unit, value, _ in (*ranking.helps, *ranking.harms):
        _, example, token = found.of.labels[unit]
        assert f"⟦w{example}.{token}⟧" in table
        assert f"{value:+.3g}\u00a0±" in table
        assert re.search(rf"{re.escape(f'{value:+.3g}')} ± [^>]*>w{example}\.{token}<", text)
    assert "reliability" in text
    assert "data:image/svg" in text


def test_the_page_of_an_influence_on_an_example(tmp_path):
    seen = of_linear(linear(n=12, d=2), np.random.default_rng(2), chains=1)
    found = slt.influence(None, seen, seen)
    page = found.report(tmp_path / "a.html", 3, [f"text <{i}>" for i in range(12)], groups=["a", "b"] * 6)
    assert "text &lt;3&gt;" in page.read_text()
    assert "one chain" in page.read_text()
    refuses(ValueError, lambda: found.report(tmp_path / "b.html", 3, ["a"]), "12 examples", "1.")
    refuses(ValueError, lambda: found.plot(groups=["a"]), "12 units", "1 names")


def test_texts_that_do_not_fit(found, tmp_path):
    refuses(ValueError, lambda: found.report(tmp_path / "b.html", 0, ["a b c"] * 8), "texts[0]", "the string 'a b c'")
    refuses(ValueError, lambda: found.report(tmp_path / "b.html", 0, [["a"]] * 8), "3 of them", "got 1")
    (seen,) = found.of.parts
    other = slt.influence(None, seen, dataclasses.replace(seen, name="other"))
    refuses(ValueError, lambda: other.report(tmp_path / "b.html", 0, [["a"] * 3] * 8), "on_texts")


@pytest.mark.quick
def test_the_scatter_has_its_groups(found):
    """Kills: a point of each group in the colour of another; axes without their share."""
    groups = ["first" if token == 0 else "rest" for *_, token in found.of.labels]
    figure = found.plot(groups=groups)
    (axis,) = figure.axes
    assert [len(points.get_offsets()) for points in axis.collections] == [15, 8]
    places = found.embedding()[[g == "first" for g in groups]]
    np.testing.assert_allclose(axis.collections[1].get_offsets(), places)
    assert f"{found.spectrum(2)[0]:.0%} of the variance" in axis.get_xlabel()
    assert len(found.plot().axes[0].collections) == 1
