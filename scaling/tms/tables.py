"""The Markdown tables of README.md, from the record."""

from typing import Any

from scaling.tms.curves import STEPS
from scaling.tms.kgons import line, summary
from scaling.tms.polygons import OF_FUNCTION, OF_LOSS


def tables(record: dict[str, Any]) -> str:
    """All of them, under their headings."""
    parts = {
        "Ends of training": of_ends(record["kgons"]["ends"]),
        "Each seed": of_seeds(record["kgons"]["rows"]),
        "Means": of_means(record["kgons"]["rows"]),
        "Levels": of_levels(record["families"]),
        "Stages": of_stages(record["families"]),
    }
    return "\n\n".join(f"{name}\n\n{text}" for name, text in parts.items())


def _table(head: list[str], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def of_ends(ends: dict[str, int]) -> str:
    """How many of the networks ended where."""
    common = sorted(ends.items(), key=lambda item: -item[1])
    return _table([label or "at none" for label, _ in common], [_row(*(count for _, count in common))])


def of_seeds(rows: list[dict[str, Any]]) -> str:
    """Estimates at each k-gon that training ended at."""
    return _table(["k-gon", "seed", "exact", *rows[0]["estimates"]], [line(row) for row in rows])


def of_means(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, beside the coefficient and what the localization leaves of it."""
    found = []
    for label, truth in OF_LOSS.items():
        for name, one in rows[0]["estimates"].items():
            s = summary(rows, label, name)
            mean = f"{s['llc']:.2f} ± {s['llc_stderr']:.2f}"
            cells = (f"{s['expected']:.2f}", mean, f"{s['spread']:.2f}", f"{s['error']:+.1%}", f"{s['worst']:.1%}")
            found.append(_row(label, name, f"{one['nbeta']:,.0f}", f"{truth:g}", *cells))
    head = ["k-gon", "setting", "nβ", "exact", "expected", "LLC", "spread of seeds", "error", "largest error"]
    return _table(head, found)


def _runs(families: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(family["name"], run) for family in families for run in family["runs"]]


def of_levels(families: list[dict[str, Any]]) -> str:
    """Steps of each stage of the weights, with the mean LLC of the function over it."""
    found = []
    for name, run in _runs(families):
        for stage, level in zip(run["stages"], run["levels"], strict=True):
            truth = OF_FUNCTION.get(stage["label"])
            steps = f"{STEPS[stage['first']]} to {STEPS[stage['last']]}"
            told = ("", "") if truth is None else (f"{truth:g}", f"{level['llc'] / truth - 1:+.1%}")
            value = f"{level['llc']:.2f} ± {level['llc_stderr']:.2f}"
            found.append(_row(name, run["seed"], stage["label"], steps, told[0], value, told[1]))
    return _table(["run", "seed", "weights near", "steps", "exact", "LLC of the function", "error"], found)


def of_stages(families: list[dict[str, Any]]) -> str:
    """Changes of the weights beside the jumps of the LLC."""
    found = []
    for name, run in _runs(families):
        ends = {stage["label"]: stage for stage in run["stages"]}
        for match in run["matches"]:
            where = (ends[match["before"]]["last"], ends[match["after"]]["first"])
            jump = "none" if match["jump"] is None else f"{STEPS[match['jump'] - 1]} to {STEPS[match['jump']]}"
            should = "yes" if match["tells"] else "no"
            change = f"{match['before']} to {match['after']}"
            found.append(
                _row(name, run["seed"], change, f"{STEPS[where[0]]} to {STEPS[where[1]]}", should, jump,
                     "" if match["checkpoints"] is None else match["checkpoints"])
            )  # fmt: skip
    head = ["run", "seed", "weights", "steps", "coefficient changes", "nearest jump of the LLC", "checkpoints apart"]
    return _table(head, found)
