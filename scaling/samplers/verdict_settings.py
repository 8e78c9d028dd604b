"""The runs on which the verdict is tested: problems in four sets, and the settings of each run.

Step sizes are multiples of 1 / curvature, the largest curvature of nbeta L that a calibration meets.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import slt_jax as slt
from scaling.samplers.fresh_problems import fresh_problems

PROBLEMS = {
    "in-view": (
        "quadratic, d = 10, 2 decades", "quadratic, d = 20, 1 decades", "noisy regression, d = 10", "|w|^4, d = 4",
        "x^2 + y^4", "deep linear 2-3-3, rank 0",
    ),
    "kept-apart": (
        "quadratic, d = 2", "|w|^4, d = 2", "|w|^6, d = 3", "x^2 y^2", "one tanh unit", "Gaussian mixture",
        "deep linear 2-2-2, rank 0",
    ),
    "second-apart": (
        "quadratic, d = 1", "x^4", "x^6", "(y^2 - x^3)^2", "x^2 y^4", "x^2 y^2 z^2", "x^2 y^2 + z^2",
        "deep linear 1-2-2, rank 0",
    ),
    "fresh": tuple(fresh_problems()),
}  # fmt: skip
FIRST_KEY = {"in-view": 0, "kept-apart": 100, "second-apart": 200, "fresh": 300}
FEW_DRAWS, SMALL_BATCH = 60, 8

MakeSampler = Callable[[float], Any]  # of 1 / curvature


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run. ``sampler``: None for the default. ``options``: the other arguments of ``estimate_llc``.

    The center is w*, unless one of these is above 0. ``away``: the standard deviation of what is added to each weight.
    ``excess``: see ``scaling.samplers.verdicts.stopped_early``.
    """

    problem: str
    name: str
    options: dict[str, Any]
    sampler: MakeSampler | None = None
    away: float = 0.0
    excess: float = 0.0

    @property
    def at_minimum(self) -> bool:
        return not (self.away or self.excess)

    @property
    def unfinished(self) -> bool:
        """The training, or the sampling."""
        return not self.at_minimum or self.options.get("num_draws", math.inf) <= FEW_DRAWS

    @property
    def noisy(self) -> bool:
        return self.options.get("batch_size", math.inf) <= SMALL_BATCH


def settings(problems: str) -> Iterator[Setting]:
    """The runs of a set of problems, in order."""
    of_problem = fresh_settings if problems == "fresh" else first_settings
    for number, name in enumerate(PROBLEMS[problems]):
        yield from of_problem(name, FIRST_KEY[problems], number)


def sgld(share: float) -> MakeSampler:
    return lambda scale: slt.sgld(share * scale)


def underdamped(share: float) -> MakeSampler:
    return lambda scale: slt.underdamped(share * scale, 0.2)


def first_settings(problem: str, first_key: int, number: int) -> Iterator[Setting]:
    """Thirty-five runs: seventeen step sizes, six of few steps, four noisy, four at no minimum, four defaults."""
    lengths = {"num_chains": 4, "num_warmup": 1000, "num_draws": 2000, "key": first_key}
    run = functools.partial(Setting, problem=problem)
    for share in (1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 2.0, 3.5, 10.0):
        yield run(name=f"sgld {share:g}", sampler=sgld(share), options=lengths)
    for share in (1e-3, 1e-2, 0.1, 0.5, 2.0, 3.5, 10.0):
        yield run(name=f"underdamped {share:g}", sampler=underdamped(share), options=lengths)
    for draws in (8, 20, 60):
        for share in (0.01, 0.1):
            few = {**lengths, "num_chains": 2, "num_warmup": draws, "num_draws": draws}
            yield run(name=f"few steps {draws}, sgld {share:g}", sampler=sgld(share), options=few)
    for batch in (2, 8):
        for share in (0.03, 0.3):
            noisy = {"batch_size": batch, **lengths}
            yield run(name=f"batch {batch}, sgld {share:g}", sampler=sgld(share), options=noisy)
    for away in (0.05, 0.3):
        for share in (0.03, 0.1):
            yield run(name=f"no minimum {away:g}, sgld {share:g}", sampler=sgld(share), options=lengths, away=away)
    for key in range(first_key, first_key + 4):
        yield run(name=f"defaults {key}", options={"key": key, "budget": 60_000})


def fresh_settings(problem: str, first_key: int, number: int) -> Iterator[Setting]:
    """Eighteen runs, each of its own key: nine steps, two of few, three noisy, two at no minimum, two defaults."""
    runs = (
        ("sgld 0.003", sgld(0.003), {}, 0.0),
        ("sgld 0.05", sgld(0.05), {}, 0.0),
        ("sgld 0.7", sgld(0.7), {}, 0.0),
        ("sgld 3.5", sgld(3.5), {}, 0.0),
        ("underdamped 0.003", underdamped(0.003), {}, 0.0),
        ("underdamped 0.1", underdamped(0.1), {}, 0.0),
        ("underdamped 2.5", underdamped(2.5), {}, 0.0),
        ("sghmc 0.1", lambda scale: slt.sghmc(0.1 * scale, 0.1), {}, 0.0),
        ("preconditioned sgld 0.1", lambda scale: slt.preconditioned_sgld(0.1 * scale), {}, 0.0),
        ("few steps 10, sgld 0.05", sgld(0.05), {"num_chains": 2, "num_warmup": 10, "num_draws": 10}, 0.0),
        ("few steps 30, underdamped 0.1", underdamped(0.1), {"num_chains": 2, "num_warmup": 30, "num_draws": 30}, 0.0),
        ("batch 2, sgld 0.03", sgld(0.03), {"batch_size": 2}, 0.0),
        ("batch 4, underdamped 0.1", underdamped(0.1), {"batch_size": 4}, 0.0),
        ("batch 8, sgld 0.3", sgld(0.3), {"batch_size": 8}, 0.0),
        ("stopped early 0.5, underdamped 0.1", underdamped(0.1), {}, 0.5),
        ("stopped early 5, sgld 0.1", sgld(0.1), {}, 5.0),
        ("defaults, budget 8000", None, {"budget": 8000}, 0.0),
        ("defaults, budget 60000", None, {"budget": 60_000}, 0.0),
    )
    lengths = {"num_chains": 4, "num_warmup": 500, "num_draws": 1500}
    for count, (name, sampler, options, excess) in enumerate(runs):
        key = first_key + number * len(runs) + count
        given = {**(lengths if sampler else {}), **options, "key": key}
        yield Setting(problem=problem, name=name, options=given, sampler=sampler, excess=excess)
