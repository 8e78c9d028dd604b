"""Pictures: what is drawn is what was estimated, where it was estimated, and nothing else."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import LogNorm, to_hex
from matplotlib.patches import Rectangle

from slt_jax.diagnostics import series
from slt_jax.report import heatmaps
from slt_jax.report import traces as plots
from slt_jax.report.training import plot_training
from tests.small import made_result

SETTINGS = {
    "num_warmup": 10, "thinning": 3, "nbeta": 10.0, "step_size": 1e-3, "localization": 2.0, "num_data": 100,
    "num_free": 6, "sampler": "sgld", "family": "euler", "batch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _known_health(monkeypatch):
    """ESS 50 and R-hat 1.01 of any draws, without a compilation for each shape."""
    monkeypatch.setattr(series, "_ess_and_rhat", lambda halves: (50.0, 1.01))


def run(chains=3, draws=40, stopped=None, warm=10, **settings):
    """A result whose drift_sq gives a bias of the step size that is taken off."""
    rng = np.random.default_rng(0)
    loss = rng.normal(0.7, 0.05, (chains, draws)).astype(np.float32)
    warmup = rng.normal(0.5, 0.05, (chains, warm)).astype(np.float32)
    for chain, step in (stopped or {}).items():
        loss[chain, max(step - warm, 0) // 3 :] = np.nan
        warmup[chain, step:] = np.nan
    settings = {**SETTINGS, "num_warmup": warm, **settings}
    return made_result(loss, warmup, settings, baseline=0.2, drift_sq=2000.0, virial=6.0, stopped=stopped)


def estimate(llc, stderr=0.1, verdict="converged"):
    return SimpleNamespace(llc=llc, llc_stderr=stderr, verdict=verdict)


def line(axis, label):
    return next(x for x in axis.lines if x.get_label() == label)


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.mark.quick
def test_the_running_estimate_ends_at_the_estimate():
    """Kills: the raw draws' running mean beside a band of the corrected estimate; one draw too many or too few."""
    result = run()
    assert result.bias.applied > 0.1
    lower = plots.plot_result(result).axes[1]
    drawn = line(lower, "mean of the chains")
    expected = result.llc_draws[:, :7].mean() - result.bias.applied
    assert drawn.get_ydata()[6] == pytest.approx(expected, rel=1e-6)
    assert drawn.get_ydata()[-1] == pytest.approx(result.llc, rel=1e-6)
    for chain in range(3):
        own = line(lower, f"chain {chain}").get_ydata()
        assert own[-1] == pytest.approx(result.llc_draws[chain].mean() - result.bias.applied, rel=1e-6)
    assert line(lower, "raw: without bias correction").get_ydata()[0] == pytest.approx(result.llc_raw)


def test_losses_are_drawn_at_their_steps():
    """Step t of the warm-up at t; draw k after warm-up and (k + 1) times thinning steps."""
    result = run()
    drawn = line(plots.plot_result(result).axes[0], "chain 1")
    np.testing.assert_array_equal(drawn.get_xdata(), [*range(10), *range(12, 130, 3)])
    np.testing.assert_allclose(drawn.get_ydata(), np.r_[result.warmup_loss[1], result.loss_trace[1]], rtol=1e-6)


def test_long_runs_are_means_of_blocks():
    values = np.arange(1000.0)
    np.testing.assert_allclose(plots.block_means(values), np.arange(200) * 5 + 2)
    assert plots.block_means(values[:400]).size == 400
    uneven = plots.block_means(np.ones((2, 777), np.float32))
    assert uneven.shape == (2, 200)
    np.testing.assert_allclose(uneven, 1.0)
    figure = plots.plot_result(run(draws=1000))
    assert line(figure.axes[0], "chain 0").get_xdata().size == 10 + 200
    assert "lines are means of 5 draws" in figure.axes[0].get_title()


def test_chains_that_went_non_finite_end_at_a_cross():
    result = run(stopped={1: 70})
    figure = plots.plot_result(result)
    assert line(figure.axes[0], "chain went non-finite").get_xdata() == [70]
    assert np.isnan(line(figure.axes[0], "chain 1").get_ydata()[30:]).all()
    assert not [x for x in figure.axes[1].lines if x.get_label() == "chain 1"]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.2
    assert np.nanquantile(result.loss_trace, 0.99) < high < 1.2
    lost = plots.plot_result(run(stopped={0: 5, 1: 6, 2: 7}))
    assert any("no chain stayed finite" in text.get_text() for text in lost.axes[1].texts)


def test_a_divergence_does_not_flatten_the_others():
    """Kills: limits of the axis from all chains."""
    result = run(stopped={1: 70})
    result.loss_trace[1, 19] = 1e30
    assert plots.plot_result(result).axes[0].get_ylim()[1] < 1.2


@pytest.mark.parametrize(("chains", "names"), [(1, {"chain 0"}), (16, {"chains from w*", "chains started hot"})])
def test_the_legend_names_chains_as_long_as_it_can(chains, names):
    figure = plots.plot_result(run(chains, hot=10.0))
    assert {text for text in legend(figure) if text.startswith("chain")} == names
    assert {"loss at w*", "warm-up", "estimate ± standard error"} <= legend(figure)


def test_a_run_without_warm_up_is_drawn(tmp_path):
    figure = plots.plot_result(run(warm=0), tmp_path / "r.pdf")
    assert "warm-up" not in legend(figure)
    assert (tmp_path / "r.pdf").stat().st_size > 5_000


NBETA, LOCALIZATION, STEPS = [10.0, 100.0], [1.0, 10.0, 100.0], [1e-5, 1e-4, 1e-3, 1e-2]


def grid(**changed):
    """2 x 3 x 4 cells that read 1 to 24."""
    axes = ("nbeta", "localization", "step_size")
    llc = np.arange(1.0, 25.0).reshape(2, 3, 4)
    found = {
        "llc": llc, "llc_stderr": 0.01 * llc, "verdict": np.full(llc.shape, "converged", object),
        "diverged": np.zeros(llc.shape, bool), **changed,
    }  # fmt: skip
    places = {"nbeta": NBETA, "localization": LOCALIZATION, "step_size": STEPS}
    return xr.Dataset({name: (axes, values) for name, values in found.items()}, places)


def numbers(axis):
    """(x, y) -> text of the estimates in the cells; their errors, which begin with ±, left out."""
    texts = ((text.get_position(), text.get_text()) for text in axis.texts)
    return {(round(x), round(y)): text for (x, y), text in texts if text[0] != "±"}


def rectangles(axis, **style):
    patches = (p for p in axis.patches if isinstance(p, Rectangle))
    return [p for p in patches if all(getattr(p, f"get_{name}")() == value for name, value in style.items())]


@pytest.mark.quick
def test_each_cell_has_its_own_number():
    """Kills: axes swapped; rows from the top; an order of dims taken for granted."""
    for data in (grid(), grid().transpose("step_size", "nbeta", "localization")):
        figure = heatmaps.plot_sweep(data)
        assert len(figure.axes) == 2 + 1  # one colour bar
        for b in range(2):
            axis = figure.axes[b]
            expected = {(e, g): f"{1 + 12 * b + 4 * g + e}" for g in range(3) for e in range(4)}
            assert numbers(axis) == expected
            assert axis.get_title() == f"nbeta {NBETA[b]:g}"
            assert axis.get_ylim()[0] < axis.get_ylim()[1]
        assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1e-5", "1e-4", "1e-3", "0.01"]
        assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["1", "10", "100"]


def test_cells_that_are_lost_are_hatched_and_have_no_number():
    data = grid()
    data["diverged"][0, 1, 2] = True
    data["llc"][1, 0, 3] = np.nan
    figure = heatmaps.plot_sweep(data)
    for axis, (x, y) in zip(figure.axes, [(2, 1), (3, 0)], strict=False):
        (patch,) = rectangles(axis, hatch="////")
        assert (round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)) == (x, y)
        assert (x, y) not in numbers(axis)
        assert len(numbers(axis)) == 11
    assert "diverged" in legend(figure)
    assert "not converged" not in legend(figure)


def test_what_has_not_converged_has_a_star():
    data = grid()
    data["verdict"][0, 2, 1] = "still rising"
    data["verdict"][0, 0, 0] = "depends on nbeta or localization"
    figure = heatmaps.plot_sweep(data)
    starred = {text.get_position() for text in figure.axes[0].texts if text.get_text().endswith("*")}
    assert {(round(x), round(y)) for x, y in starred} == {(1, 2), (0, 0)}
    assert not [text for text in figure.axes[1].texts if text.get_text().endswith("*")]
    assert legend(figure) == {"not converged"}


def test_what_the_reading_says_is_outlined():
    flat = SimpleNamespace(step_size=(1e-4, 1e-3), localization=(1.0, 10.0), llc=17.0, llc_stderr=0.2)
    best = {"nbeta": 100.0, "localization": 10.0, "step_size": 1e-3}
    figure = heatmaps.plot_sweep(grid(), SimpleNamespace(recommended=best, plateaus={100.0: flat}))
    assert not rectangles(figure.axes[0], fill=False)
    plateau, ring = rectangles(figure.axes[1], fill=False)
    assert (plateau.get_x(), plateau.get_y(), plateau.get_width(), plateau.get_height()) == (0.5, -0.5, 2, 2)
    assert ring.get_x() + ring.get_width() / 2 == pytest.approx(2)
    assert ring.get_y() + ring.get_height() / 2 == pytest.approx(1)
    assert ring.get_linewidth() > plateau.get_linewidth()
    assert legend(figure) == {"recommended", "plateau: estimates agree"}
    assert figure.axes[1].get_title() == "nbeta 100: plateau 17 ± 0.2"
    bare = heatmaps.plot_sweep(grid(), SimpleNamespace(recommended=None, plateaus={}))
    assert not [p for axis in bare.axes for p in rectangles(axis, fill=False)]


def test_one_wild_cell_does_not_swallow_the_colours():
    values = np.arange(1.0, 25.0)
    norm, extend, log = heatmaps.colour_range(values)
    assert (norm.vmin, norm.vmax, extend, log) == (1.0, 24.0, "neither", False)
    # of 24 sorted values the 5th and 95th percentile, towards the middle, are those at 2 and at 21
    for wild, ends, beyond in [(1e9, (1.0, 22.0), "max"), (-1e9, (3.0, 24.0), "min")]:
        found = np.where(values == (24.0 if wild > 0 else 1.0), wild, values)
        norm, extend, log = heatmaps.colour_range(found)
        assert (norm.vmin, norm.vmax, extend, log) == (*ends, beyond, False)


def test_colours_are_logarithmic_over_decades_and_never_of_no_width():
    norm, _, log = heatmaps.colour_range(np.geomspace(0.1, 100, 30))
    assert log
    assert isinstance(norm, LogNorm)
    assert (norm.vmin, norm.vmax) == pytest.approx((0.1, 100))
    same, _, log = heatmaps.colour_range(np.full(5, 3.0))
    assert not log
    assert same.vmin < 3.0 < same.vmax
    assert heatmaps.colour_range(np.full(3, np.nan))[0](0.5) == 0.5


def contrast(one, other):
    """Of two colours, by WCAG 2.2."""
    lights = []
    for color in (one, other):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05)
    return max(lights) / min(lights)


def test_numbers_can_be_read_on_every_colour():
    inks = {"black": (0, 0, 0), "white": (1, 1, 1)}
    assert min(contrast(inks[heatmaps.text_colour(c)], c) for c in heatmaps.CMAP(np.linspace(0, 1, 101))) > 4.4


def test_a_sweep_of_nothing_finite_is_drawn():
    figure = heatmaps.plot_sweep(grid(diverged=np.ones((2, 3, 4), bool)))
    assert len(figure.axes) == 2
    assert legend(figure) == {"diverged"}


def test_numbers_are_short():
    short = {"1e-5": 1e-5, "3.16e-6": 3.16e-6, "0.25": 0.25, "1234": 1234.4, "-12.3": -12.34, "0": 0.0, "4e5": 4e5}
    assert [heatmaps.short_number(x) for x in short.values()] == list(short)


def test_heads_are_rows_of_layers():
    """Kills: layers and heads swapped; layer 0 at the bottom."""
    heads = {f"layer {a} head {b}": estimate(10.0 * a + b + 1) for a in range(3) for b in range(2)}
    del heads["layer 1 head 0"]
    heads["layer 2 head 1"] = estimate(math.nan, math.nan, "diverged")
    heads["layer 0 head 1"] = estimate(2.0, 0.1, "chains disagree")
    figure = heatmaps.plot_heads(heads)
    axis = figure.axes[0]
    assert numbers(axis) == {(0, 0): "1", (1, 0): "2*", (1, 1): "12", (0, 2): "21"}
    assert axis.get_ylim() == (2.5, -0.5)
    (patch,) = rectangles(axis, hatch="////")
    assert (round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)) == (1, 2)
    assert not axis.lines
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("head", "layer")


def test_what_is_no_head_is_refused():
    with pytest.raises(ValueError, match="'layer 3 mlp' is not one head"):
        heatmaps.plot_heads({"layer 3 head 1": estimate(1.0), "layer 3 mlp": estimate(1.0)})
    with pytest.raises(ValueError, match="no heads"):
        heatmaps.plot_heads({})


TRAINING = ([10, 100, 1000], [3.0, 2.0, 1.0])


def test_training_marks_what_has_not_converged():
    """Kills: a mark for some of the verdicts alone; another mark than in tables."""
    results = [estimate(5.0, verdict="not a minimum"), estimate(6.0), estimate(7.0)]
    figure = plot_training(*TRAINING, results, unit="nats per token")
    axis, right = figure.axes
    assert figure.get_suptitle() == "LLC and loss over training"
    assert [text.xy for text in axis.texts if text.get_text() == "*"] == [(10, 5.0)]
    hollow = [list(x.get_ydata()) for x in axis.lines if x.get_markerfacecolor() == "white"]
    assert [values for values in hollow if values] == [[5.0]]
    assert "* not converged" in {text.get_text() for text in axis.get_legend().get_texts()}
    assert list(line(axis, "LLC ± standard error").get_ydata()) == [6.0, 7.0]
    assert right.get_ylabel() == "loss (nats per token)"
    assert axis.get_xscale() == "log"
    assert plot_training([0, 1, 2], [3.0, 2.0, 1.0], results).axes[0].get_xscale() == "linear"


def test_stage_boundaries_are_drawn_and_named_once():
    cuts = [SimpleNamespace(step=3.0 * x, low=2.0 * x, high=5.0 * x, support=0.9) for x in (10, 100)]
    stages = SimpleNamespace(boundaries=cuts, level=0.8)
    axis = plot_training(*TRAINING, [estimate(5.0)] * 3, stages=stages).axes[0]
    drawn = [x.get_xdata()[0] for x in axis.lines if x.get_label() == "stage boundary, 80 % interval"]
    assert drawn == [30.0, 300]
    spans = [p for p in axis.patches if isinstance(p, Rectangle)]
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in spans] == [(20, 50), (200, 500)]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names.count("stage boundary, 80 % interval") == 1


def test_several_series_differ_in_colour_and_in_marker():
    moving = estimate(2.0, verdict="still rising")
    series = {f"layer 0 head {k}": [estimate(1.0 + k), moving, estimate(3.0)] for k in range(8)}
    axis = plot_training(*TRAINING, series).axes[0]
    lines = [line(axis, name) for name in series]
    assert len({x.get_marker() for x in lines}) == 8
    assert len({to_hex(x.get_color()) for x in lines}) == 8
    assert [x.get_ydata()[0] for x in lines] == [1.0 + k for k in range(8)]
    names = {text.get_text() for text in axis.get_legend().get_texts()}
    assert names == {*series, "* not converged", "loss"}


@pytest.mark.parametrize("results", [[estimate(1.0)], {"head": [estimate(1.0)] * 4}])
def test_lists_of_other_lengths_are_refused(results):
    with pytest.raises(ValueError, match="for 3 steps"):
        plot_training(*TRAINING, results)
    with pytest.raises(ValueError, match="losses has 2"):
        plot_training([1, 2, 3], [1.0, 2.0], [estimate(1.0)] * 3)
