"""Commands that observe the losses of fixed examples: susceptibilities and influence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slt_jax.cli.language import Case
from slt_jax.cli.options import Influence, Respond
from slt_jax.cli.probes import Probe, probe_of, texts_of, words_of
from slt_jax.cli.wording import result_in_options
from slt_jax.estimators.llc import estimate_llc
from slt_jax.estimators.susceptibilities import susceptibilities
from slt_jax.models.restrict import part_names, restricted
from slt_jax.posterior.observable import Observable
from slt_jax.results.influences import influence
from slt_jax.results.loss_covariance import Influence as Found
from slt_jax.results.ranking import Ranking
from slt_jax.results.susceptibilities import Susceptibilities

_KINDS = ("heads", "layers", "all")


@dataclass(frozen=True)
class Setting:
    """A case and the words of its tokens. ``options``: of the estimators."""

    case: Case
    folder: Path | None
    options: dict[str, Any]

    def probe(self, names: list[str], examples: int) -> Probe:
        """Of these further data sets, or without any of the data that are sampled with."""
        sources = {name: self.case.also[name] for name in names} or {"data": self.case.data}
        return probe_of(sources, examples)

    def texts(self, probe: Probe, joined: bool) -> list[Any]:
        return texts_of(words_of(probe.tokens, self.folder, self.case.vocab_size), joined)


def components_of(case: Case, names: tuple[str, ...]) -> list[str]:
    """Names of parts, with ``heads``, ``layers`` and ``all`` in full; each once."""
    found = [part_names(case.posterior.center, name) if name in _KINDS else [name] for name in names]
    return list(dict.fromkeys(part for parts in found for part in parts))


def susceptibilities_of(command: Respond, setting: Setting, names: list[str]) -> tuple[Susceptibilities, list[Any]]:
    """(the result, the texts of its probe). ``names``: of the data sets of the probe."""
    case, probe = setting.case, setting.probe(names, command.examples)
    found = susceptibilities(
        case.posterior, case.data, components_of(case, command.components), Observable(probe.data, level=command.level),
        estimator=command.estimator, groups=probe.groups if len(set(probe.groups)) > 1 else None,
        checkpoint_dir=command.checkpoint_dir, progress=not command.quiet, **setting.options,
    )  # fmt: skip
    return found, setting.texts(probe, command.level == "example")


def show_susceptibilities(command: Respond, found: Susceptibilities, texts: list[Any]) -> None:
    """Print, and write what was asked for. What is interrupted and can be resumed is not written."""
    print(json.dumps(found.to_dict(), indent=1) if command.json else found)
    if "group" in found.dataset and not command.json:
        print("", *_responses(found), sep="\n")
    if found.interrupted and command.checkpoint_dir is not None:
        return
    if command.out is not None:
        found.save(command.out)
    if command.plot is not None:
        found.plot(command.plot)
    if command.page is not None:
        found.report(command.page, texts=texts, show=command.show)


def _responses(found: Susceptibilities) -> list[str]:
    """Lines of Markdown: the response of each component to each data set, in its standard deviations."""
    each = found.zscored().response()
    names = [str(name) for name in each["group"].values]
    lines = ["Mean susceptibility to each data set, in standard deviations of the component over the probe:", ""]
    lines += [f"| {' | '.join(['component', *names])} |", "|---" * (1 + len(names)) + "|"]
    for component in found.components:
        own = each.sel(component=component)
        cells = [f"{v:+.2f} ± {e:.2f}" for v, e in zip(own["response"].values, own["stderr"].values, strict=True)]
        lines.append(f"| {component} | {' | '.join(cells)} |")
    return lines


def check_target(command: Influence) -> tuple[int, int | None]:
    """(example, token) of ``--target``. Raises ValueError."""
    example, colon, token = command.target.partition(":")
    if not example.isdecimal() or (colon and not token.isdecimal()):
        raise ValueError(f"--target takes EXAMPLE or EXAMPLE:TOKEN, such as 3 or 3:17, got {command.target!r}.")
    return int(example), int(token) if colon else None


def influence_of(command: Influence, setting: Setting, of: list[str], on: list[str]) -> int | None:
    """Sample, print and write. Returns 0, 3 where no chain stayed finite, or None if it was interrupted."""
    case, (example, token) = setting.case, check_target(command)
    left = setting.probe(of, command.examples)
    right = setting.probe(on, command.examples) if on else left
    if example >= len(right.groups):
        raise ValueError(f"--target {command.target}: there are {len(right.groups)} examples, numbered from 0.")
    level = "example" if token is None else "token"
    if token is not None and token >= right.tokens.shape[1] - 1:
        raise ValueError(f"--target {command.target}: an example has {right.tokens.shape[1] - 1} predicted tokens.")
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    observe = {"of": Observable(left.data, level=level, keep="values")}
    if on:
        observe["on"] = Observable(right.data, level=level, keep="values")
    result = estimate_llc(
        posterior, case.data, observe=observe, checkpoint_dir=command.checkpoint_dir, progress=not command.quiet,
        **setting.options,
    )  # fmt: skip
    if result.interrupted or not len(result.kept_chains):
        print(result_in_options(str(result)))
        return None if result.interrupted else 3
    found = influence(result, of="of", on="on" if on else "of")
    unit = _unit(found, example, token)
    ranking = found.top(unit, command.top)
    own, others = setting.texts(left, token is None), setting.texts(right, token is None)
    print(json.dumps(_as_dict(found, ranking), indent=1) if command.json else "\n".join(
        [f"LLC {result.estimate_text('+/-')}, {result.verdict}", f"{found!r}"[1:-1], *_lines(ranking, left, own)]
    ))  # fmt: skip
    if command.out is not None:
        result.save(command.out)
    if command.plot is not None:
        labels = found.of.labels[:, 1]
        found.plot(command.plot, groups=[left.groups[k] for k in labels] if len(set(left.groups)) > 1 else None)
    if command.page is not None:
        found.report(command.page, unit, own, others if on else None, k=command.top)
    return 0


def _unit(found: Found, example: int, token: int | None) -> int:
    labels = found.on.labels
    rows = (labels[:, 1] == example) & (labels[:, 2] == (-1 if token is None else token))
    if not rows.any():
        raise ValueError(f"--target {example}:{token} is a token that does not count.")
    return int(rows.argmax())


def _lines(ranking: Ranking, probe: Probe, texts: list[Any]) -> list[str]:
    """The ranking with the beginning of each text."""
    lines = [f"Influence on {ranking.target} ({ranking.quantity})"]
    for kind, rows in (("helps", ranking.helps), ("harms", ranking.harms)):
        for index, value, error in rows:
            _, example, token = (int(x) for x in ranking.labels[index])
            where = f"{probe.groups[example]} {probe.rows[example]}" + (f", token {token}" if token >= 0 else "")
            words = texts[example] if token < 0 else "".join(texts[example][max(0, token - 12) : token + 1])
            lines.append(f"{kind}  {value:+.3f} +/- {error:.2g}  {where}: {_short(words)}")
        if not rows:
            lines.append(f"{kind}  nothing above the noise")
    return lines


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _as_dict(found: Found, ranking: Ranking) -> dict[str, Any]:
    def rows(units: Any) -> list[dict[str, Any]]:
        return [
            {"example": int(ranking.labels[i][1]), "token": int(ranking.labels[i][2]), "value": v, "stderr": e}
            for i, v, e in units
        ]

    return {
        "target": ranking.target, "quantity": ranking.quantity, "noise_floor": found.noise_floor,
        "reliability": found.reliability if found.of.num_chains > 1 else None, "helps": rows(ranking.helps),
        "harms": rows(ranking.harms),
    }  # fmt: skip
