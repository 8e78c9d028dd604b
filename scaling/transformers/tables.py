"""Markdown tables of the rows of ``run``."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from scaling.dln.records import errors_of, ranked_right
from scaling.transformers.spectrum import RATIOS, value_at
from scaling.transformers.teachers import KINDS, TARGETS, num_data_of

Row = dict[str, Any]
SHOWN = (0.1, 1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12)  # ratios of nbeta to localization in the table
NAMED = ("nbeta", "localization", "budget", "num_draws", "data", "labels")  # settings that tell methods apart


def spectra(rows: Iterable[Row]) -> list[Row]:
    """Of the usual data set; others are only held against estimates on the same data."""
    return [r for r in rows if "values" in r and r["request"]["num_data"] == num_data_of(r["layout"], r["size"])]


def sampled(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "values" not in row]


def place(row: Row) -> tuple[int, int]:
    return list(TARGETS).index(row["size"]), KINDS.index(row["layout"])


def by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (place(r), r["seed"])):
        groups.setdefault(key(row), []).append(row)
    return groups


def reached(row: Row, share: float) -> float:
    """The ratio of nbeta to localization from which the quadratic posterior holds this share of the truth; or inf."""
    fractions = np.asarray(row["values"]) / row["truth"]
    above = np.flatnonzero(fractions >= share)
    if not len(above):
        return math.inf
    i = int(above[0])
    if i == 0:
        return RATIOS[0]
    part = (share - fractions[i - 1]) / (fractions[i] - fractions[i - 1])
    return float(RATIOS[i - 1] * (RATIOS[i] / RATIOS[i - 1]) ** part)


def resolved_table(rows: Sequence[Row]) -> str:
    """What share of the truth the quadratic posterior holds, medians over the teachers of a layout."""
    head = ["size", "layout", "teachers", "weights", "truth", *(f"{r:g}" for r in SHOWN), "95 % from", "99 % from"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (size, layout), mine in by(spectra(rows), lambda r: (r["size"], r["layout"])).items():
        shares = np.median([[value_at(r["values"], x) / r["truth"] for x in SHOWN] for r in mine], axis=0)
        ends = [np.median([reached(r, share) for r in mine]) for share in (0.95, 0.99)]
        cells = [size, layout, len(mine), _range(r["weights"] for r in mine), _range(r["truth"] for r in mine)]
        cells += [f"{share:.1%}" for share in shares] + [f"{end:.0e}" for end in ends]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def order_table(rows: Sequence[Row]) -> str:
    """Couples of teachers in the order of their truths, by the quadratic posterior's values."""
    head = ["size", "couples", "teachers", *(f"{r:g}" for r in SHOWN)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for size, mine in by(spectra(rows), lambda r: r["size"]).items():
        within = by(mine, lambda r: r["layout"])
        cells = [f"{_share_within(within, x):.0%}" for x in SHOWN]
        if len(mine) > len(within):
            lines.append(f"| {size} | within a layout | {len(mine)} | {' | '.join(cells)} |")
        cells = [f"{ranked_right([(r['truth'], value_at(r['values'], x)) for r in mine]):.0%}" for x in SHOWN]
        lines.append(f"| {size} | of all layouts | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share_within(groups: dict[str, list[Row]], ratio: float) -> float:
    """Mean over layouts with couples of different truths."""
    found = [ranked_right([(r["truth"], value_at(r["values"], ratio)) for r in mine]) for mine in groups.values()]
    known = [share for share in found if math.isfinite(share)]
    return float(np.mean(known)) if known else math.nan


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:g}" if found[0] == found[-1] else f"{found[0]:g} to {found[-1]:g}"


def name_of(row: Row) -> str:
    """Its method, and what of its settings was asked for; a posterior that was taken from another row is not told."""
    asked = row["request"]
    usual = num_data_of(row["layout"], row["size"])
    told = [f"num_data {asked['num_data']}"] if asked["num_data"] != usual else []
    told += [
        f"{n} {asked[n]:g}" if isinstance(asked[n], float) else f"{n} {asked[n]}" for n in NAMED if _special(asked, n)
    ]
    return asked["sampler"] + (f" ({', '.join(told)})" if told else "")


def _special(asked: dict[str, Any], name: str) -> bool:
    if asked["sampler"] in ("published", "hmc") and name in ("nbeta", "localization", "num_draws"):
        return False
    return asked[name] not in (None, "stored", "teacher")


def quadratic_value(row: Row, known: dict[Any, Row]) -> float:
    """The quadratic posterior's value at a row's nbeta and localization; NaN without a spectrum."""
    spectrum = known.get(_data(row))
    if spectrum is None or row.get("llc") is None:
        return math.nan
    return value_at(spectrum["values"], row["nbeta"] / row["localization"])


def _data(row: Row) -> tuple[Any, ...]:
    return row["size"], row["layout"], row["seed"], row["request"]["num_data"]


def references(rows: Iterable[Row]) -> dict[str, Row]:
    """HMC rows by the posterior that they are of."""
    return {_posterior(row): row for row in rows if row["request"]["sampler"] == "hmc" and row.get("llc") is not None}


def _posterior(row: Row) -> str:
    return json.dumps([row["size"], row["layout"], row["seed"], row.get("nbeta"), row.get("localization")])


def estimates_table(rows: Sequence[Row]) -> str:
    """Estimates against the truth, the quadratic posterior's value, and HMC on the same posterior."""
    head = ["size", "layout", "method", "teachers", "nbeta / localization", "of the truth", "of the quadratic value",
            "of HMC", "within 3 errors of HMC", "order", "converged", "other verdicts"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    known = {_data(r): r for r in rows if "values" in r}
    exact = references(rows)
    for (size, layout, name), mine in by(sampled(rows), lambda r: (r["size"], r["layout"], name_of(r))).items():
        good = [r for r in mine if r["llc"] is not None]
        verdicts = Counter(r["verdict"] for r in mine)
        pairs = [(r, exact[_posterior(r)]) for r in good if _posterior(r) in exact and exact[_posterior(r)] is not r]
        near = sum(abs(a["llc"] - b["llc"]) <= 3 * math.hypot(a["llc_stderr"], b["llc_stderr"]) for a, b in pairs)
        order = errors_of([(r["truth"], r["llc"]) for r in mine]).ranked
        ratios = [round(float(f"{r['nbeta'] / r['localization']:.2g}"), 6) for r in good]
        cells = [
            size, layout, name, len(mine), _range(ratios) if ratios else "",
            _median([r["llc"] / r["truth"] for r in good]),
            _median([r["llc"] / quadratic_value(r, known) for r in good]),
            _median([a["llc"] / b["llc"] for a, b in pairs]), f"{near} of {len(pairs)}" if pairs else "",
            "" if math.isnan(order) else f"{order:.0%}", verdicts["converged"],
            ", ".join(f"{v} {n}" for v, n in verdicts.most_common() if v != "converged"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> str:
    found = [v for v in values if math.isfinite(v)]
    return f"{np.median(found):.1%}" if found else ""


def table(rows: Sequence[Row]) -> str:
    parts = []
    if spectra(rows):
        parts += [resolved_table(rows), order_table(rows)]
    if sampled(rows):
        parts.append(estimates_table(rows))
    return "\n\n".join(parts)
