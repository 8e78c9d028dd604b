"""Rows of results in groups, and the Markdown tables of README.md."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scaling.dln.records import Errors, Pair, errors_of
from scaling.dln.teachers import KINDS, SIZES

Row = dict[str, Any]
HEAD = (
    "| class | type | method | against | teachers | median error | 90th percentile | pairs right | non-finite "
    "| converged | other verdicts |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


class Group(NamedTuple):
    """Rows of one class and type that were sampled in one way."""

    size: str
    kind: str
    method: str
    rows: list[Row]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Rows by class, type and request, in the order of classes and types; each row's place is by its seed.

    Where two requests of one class have the same method, its name gets what tells them apart.
    """
    by_request: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_request.setdefault((row["class"], row["kind"], json.dumps(row["request"], sort_keys=True)), []).append(row)
    names = _names([found[0] for found in by_request.values()])
    groups = [
        Group(size, kind, names[size, request], sorted(found, key=lambda r: r["seed"]))
        for (size, kind, request), found in by_request.items()
    ]
    return sorted(groups, key=lambda g: (list(SIZES).index(g.size), KINDS.index(g.kind), g.method))


def _names(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """What to call a class's request: its method, and the settings in which methods of that name differ."""
    found = {}
    for row in rows:
        same = [r["request"] for r in rows if (r["class"], r["method"]) == (row["class"], row["method"])]
        mine = row["request"]
        differ = [name for name in mine if any(other.get(name) != mine[name] for other in same)]
        told = ", ".join(f"{name} {_setting(mine[name])}" for name in differ)
        found[row["class"], json.dumps(mine, sort_keys=True)] = row["method"] + (f" ({told})" if told else "")
    return found


def _setting(value: Any) -> str:
    return "chosen" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def against_theorem(rows: Iterable[Row]) -> list[Pair]:
    """(theorem's value, estimate)."""
    return [(row["truth"], row["llc"]) for row in rows]


def against_local(rows: Iterable[Row]) -> list[Pair]:
    """(local learning coefficient, estimate) of the teachers whose bounds meet."""
    return [(row["bounds"][0], row["llc"]) for row in rows if row["bounds"][0] == row["bounds"][1]]


def comparisons(group: Group) -> dict[str, list[Pair]]:
    """What a group is held against: the theorem, and where that is not always the local value, also that."""
    local = against_local(group.rows)
    if local == against_theorem(group.rows):
        return {"truth": local}
    return {"quoted truth": against_theorem(group.rows), "local truth": local}


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _line(group: Group, against: str, errors: Errors) -> str:
    verdicts = Counter(row["verdict"] for row in group.rows)
    others = ", ".join(f"{name} {n}" for name, n in verdicts.most_common() if name != "converged")
    cells = [
        group.size, group.kind, group.method, against, errors.count, _percent(errors.median),
        _percent(errors.ninetieth), _percent(errors.ranked), errors.non_finite, verdicts["converged"], others,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table(groups: Sequence[Group]) -> str:
    """Errors, order, failures and verdicts. An error is |estimate / truth - 1|, of the finite estimates."""
    lines = [
        _line(group, against, errors_of(pairs))
        for group in groups
        for against, pairs in comparisons(group).items()
        if pairs
    ]
    return "\n".join([HEAD, *lines])
