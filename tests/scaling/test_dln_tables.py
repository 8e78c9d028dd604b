"""Tables and pictures of finished rows, and how many published truths are impossible."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling.dln import plot, published_truths, records, rows, tables, teachers
from scaling.dln.methods import Method, filled, published

ROOT = Path(__file__).parents[2]
TINY = ("--num-data", "300", "--batch-size", "20", "--chains", "4")
FIXED = Method("sgld", 1e-6, localization=1.0, num_warmup=4, num_draws=4, batch_size=20, num_data=300)


# --- tables, pictures, the published truths


def made_row(size, kind, seed, llc, method, verdict="converged"):
    shape = teachers.draw_shape(kind, size, seed)
    truth, _ = teachers.truth.learning_coefficient(shape.widths, min(shape.layer_ranks))
    bounds = teachers.truth.table_bounds(teachers.truth.generic_rank_table(*shape))
    return {
        **rows.identity(size, kind, seed, method), "method": method.name, "truth": float(truth),
        "bounds": [*map(float, bounds)], "llc": None if llc is None else llc * float(bounds[0]),
        "llc_stderr": None if llc is None else 0.1, "verdict": verdict,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path):
    ours, short, theirs = filled(Method(), "1K"), filled(Method(budget=50), "1K"), published("1K", 100)
    found = [made_row("1K", "B", seed, 1.0 + 0.01 * seed, ours) for seed in (2, 1, 0)]
    found += [made_row("1K", "B", seed, 1.2, theirs, "still rising") for seed in range(3)]
    found += [made_row("1K", "B", 3, None, theirs, "diverged"), made_row("1K", "A", 0, 0.5, short, "too few draws")]
    found += [made_row("1K", "published", seed, 1.0, ours) for seed in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.quick
def test_tables_count_what_is_there(made):
    groups = tables.grouped(records.read_rows(made)[0])
    names = [(g.kind, g.method, [r["seed"] for r in g.rows]) for g in groups]
    assert names[:3] == [
        ("A", "default (budget 50)", [0]),
        ("B", "default (budget 10000)", [0, 1, 2]),
        ("B", "published", [0, 1, 2, 3]),
    ]
    lines = tables.table(groups).splitlines()[2:]
    assert lines[0] == "| 1K | A | default (budget 50) | truth | 1 | 50.0% | 50.0% |  | 0 | 0 | too few draws 1 |"
    assert lines[1] == "| 1K | B | default (budget 10000) | truth | 3 | 1.0% | 1.8% | 100.0% | 0 | 3 |  |"
    assert lines[2].endswith("| truth | 4 | 20.0% | 20.0% | 100.0% | 1 | 0 | still rising 3, diverged 1 |")


def test_published_teachers_are_held_against_the_quoted_and_the_local_truth(made):
    rows_ = [r for r in records.read_rows(made)[0] if r["kind"] == "published"]
    quoted, local = (tables.comparisons(tables.grouped(rows_)[0])[name] for name in ("quoted truth", "local truth"))
    assert len(quoted) == 12
    assert 0 < len(local) < 12
    assert np.abs(records.relative_errors(local)).max() < 1e-12  # they were made to hit the local value
    assert np.abs(records.relative_errors(quoted)).max() > 0.01


def test_pictures_are_drawn_from_the_rows(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["plot", str(made), "--out", str(tmp_path / "p"), "--ours", "default (budget 10000)"]
    )
    plot.main()
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"truth.png", "errors.png", "order.png", "protocols.png"}
    assert capsys.readouterr().out.startswith("| class | type | method |")
    pairs = plot.protocol_pairs(tables.grouped(records.read_rows(made)[0]), "default (budget 10000)")
    expected = [(0.01 * seed, 0.2) for seed in range(3)]
    np.testing.assert_allclose(sorted(pairs["B"]), expected, atol=1e-12)


def test_impossible_truths_are_counted(tmp_path):
    found = published_truths.count("1K", 40)
    nets = [teachers.make_teacher("published", "1K", seed) for seed in range(40)]
    impossible = [t.bounds[0] > 1.01 * t.truth for t in nets]
    by_jacobian = [teachers.truth.jacobian_rank(t.weights) / 2 > 1.01 * t.truth for t in nets]
    assert found["impossible"]["share"] == np.mean(impossible)
    assert found["impossible_by_jacobian_rank"]["share"] == np.mean(by_jacobian)
    assert found["not_the_local_value"]["share"] == np.mean([t.doubtful for t in nets])
    assert found["local_known"]["share"] == np.mean([t.bounds[0] == t.bounds[1] for t in nets])
