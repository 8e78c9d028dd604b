"""An estimate that goes on until it is as precise as was asked for: the same chains, taken further."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.mesh import allgather
from slt_jax.engine.plan import Schedule
from slt_jax.engine.run import draws_of
from slt_jax.engine.screen import Screen
from slt_jax.estimators.request import Request
from slt_jax.results.llc import LLCResult

WANTS_MORE = ("still rising", "still falling", "chains disagree", "too few draws")  # verdicts that more steps can mend
# After these, more steps say nothing.
HOPELESS = ("diverged", "not a minimum", "not resolved in float32", "no better than chance")
_FIRST = 1_600  # gradients of the first round, at least
_FIRST_SHARE = 0.16  # of the default budget, for the first round
_MOST_BUDGETS = 10.0  # default budgets for all rounds together, where no budget is given
_GROWTH = (1.25, 2.0)  # times as many steps after a round, at least and at most
_LEAST_GROWTH = 1.1  # that a budget or a clock has to leave for another round
_FIRST_THINNING = 4  # a loss at w* for each draw costs a forward pass
_ENDS = 0.06  # of the steps' gradients, for the measurements at the end of a round


def first_round(request: Request) -> Request:
    """The request whose budget is that of the first round."""
    first, _ = round_budgets(request.default_budget, request.budget)
    least = max(_FIRST_THINNING, math.ceil(request.observing))
    thinning = least if request.thinning is None and first >= _FIRST else request.thinning
    return dataclasses.replace(request, budget=int(first), thinning=thinning)


def round_budgets(default: int, budget: int | None) -> tuple[int, int]:
    """(gradients of the first round, of all rounds together at most). ``default``: the default budget."""
    most = int(_MOST_BUDGETS * default) if budget is None else budget
    return min(most, max(_FIRST, int(_FIRST_SHARE * default))), most


def most_gradients(request: Request) -> int:
    """Minibatch gradients of all rounds together, at most."""
    return round_budgets(request.default_budget, request.budget)[1]


class Sampled(Protocol):
    """What takes the steps of an engine's schedule that are not yet taken."""

    def __call__(self, engine: Engine, store: RunStore | None, *, start: Run, part: str) -> Run: ...


@dataclass(frozen=True)
class Rounds:
    """What decides after each round whether there is another, and how long.

    Args:
        request: as it was given. screen: of the call. engine, store: of the first round. identity: digest of what the
            estimate depends on.
        sampled: see ``Sampled``. read: (engine of a schedule, run) -> what the run reads so far.
    """

    request: Request
    screen: Screen
    engine: Engine
    store: RunStore | None
    identity: str
    sampled: Sampled
    read: Callable[[Engine, Run], LLCResult]

    def go_on(self, run: Run) -> LLCResult:
        """The result once it is precise enough, or budget or time are used up, or more steps would not help."""
        plan, number, earlier = self.engine.plan, 0, 0.0
        share = plan.num_warmup / plan.total_steps
        while True:
            whole = dataclasses.replace(plan, num_draws=draws_of(plan, run))
            result = _with_earlier(self.read(self.engine.replanned(_split_at(whole, share)), run), earlier)
            if run.interrupted:
                return result
            earlier = result.settings.spent.get("probe", 0.0)
            draws = self._kept(number, plan, result)
            if draws <= plan.num_draws:
                return self._noted(result)
            self.screen.say(self._standing(result))
            number, plan = number + 1, dataclasses.replace(plan, num_draws=draws)
            run = self._continued(self.engine.replanned(plan), run, number)

    def _continued(self, engine: Engine, run: Run, number: int) -> Run:
        store = None
        if self.request.folder is not None:
            identity = {"estimate": self.identity, "round": number, "num_draws": engine.plan.num_draws}
            store = RunStore(self.request.folder / f"round-{number}", identity, engine.problem.mesh)
        longer = self.sampled(engine, store, start=engine.lengthened(run), part=f"round {number + 1}: ")
        longer.notes = [*run.notes, *(note for note in longer.notes if note not in run.notes)]
        return longer

    def _kept(self, number: int, plan: Schedule, result: LLCResult) -> int:
        """Draws of a chain after the next round; as they were decided before, where the run was cut short in it."""
        name = f"round-{number + 1}"
        note = None if self.store is None else self.store.read_note(name, ["num_draws"])
        if note is not None:
            return int(note["num_draws"])
        draws = int(allgather(self._next_draws(plan, result), self.engine.problem.mesh)[0])
        if self.store is not None and draws > plan.num_draws:
            self.store.write_note(name, {"num_draws": draws})
        return draws

    def _next_draws(self, plan: Schedule, result: LLCResult) -> int:
        """Draws of a chain in all after another round; those of now for no more."""
        if self.reached(result) or any(flag in HOPELESS for flag in result.health.flags):
            return plan.num_draws
        least, most = _GROWTH
        steps = plan.total_steps * min(max(1.05 * times_needed(result, self._target), least), most)
        steps = min(steps, self._affordable(plan, result))
        if steps < _LEAST_GROWTH * plan.total_steps:
            return plan.num_draws
        return int(steps - plan.num_warmup) // plan.thinning

    def _affordable(self, plan: Schedule, result: LLCResult) -> float:
        """Steps of a chain that budget and minutes allow in all."""
        each = plan.step_gradients() / plan.total_steps  # gradients of a step of all chains
        each += plan.num_chains * self.request.observing / plan.thinning
        spent = sum(result.settings.spent.values())
        steps = plan.total_steps + (most_gradients(self.request) - spent) * (1 - _ENDS) / each
        if self.request.minutes is not None:
            speed = result.settings.cost.get("steps_per_s") or math.nan
            left = 60 * self.request.minutes - self.screen.clock.seconds
            in_time = plan.total_steps + max(0.0, left) * (1 - _ENDS) * speed / plan.num_chains
            steps = min(steps, in_time) if math.isfinite(in_time) else steps
        return steps

    @property
    def _target(self) -> float:
        assert self.request.target_error is not None
        return self.request.target_error

    def reached(self, result: LLCResult) -> bool:
        """Whether the error is as small as asked for, and no check asks for more steps."""
        error = relative_error(result)
        return error <= self._target and not any(flag in WANTS_MORE for flag in result.health.flags)

    def _standing(self, result: LLCResult) -> str:
        spent, needed = sum(result.settings.spent.values()), needed_budget(result, self._target)
        text = f"LLC {result.estimate_text('+/-')} after {spent:,.0f} gradients, {result.verdict}: the error is "
        text += f"{relative_error(result):.1%} of it, and {self._target:.1%} was asked for. "
        if not math.isfinite(needed):
            return text + "How much more is needed cannot be told yet."
        minutes = self._minutes(result, needed - spent)
        return text + f"About {needed:,.0f} gradients in all would do{minutes}."

    @staticmethod
    def _minutes(result: LLCResult, gradients: float) -> str:
        speed = result.settings.cost.get("steps_per_s")
        if not speed:
            return ""
        seconds = max(0.0, gradients) / speed / (2 if result.settings.control_variate else 1)
        return f", {seconds / 60:.1f} more minutes" if seconds >= 60 else f", {seconds:.0f} more seconds"

    def _noted(self, result: LLCResult) -> LLCResult:
        """With a note where it ended before it was as precise as asked for."""
        if self.reached(result):
            return result
        needed, asked = needed_budget(result, self._target), f"target_error = {self._target:g} was not reached"
        if any(flag in HOPELESS for flag in result.health.flags):
            note = f"{asked}: more steps would not help, by the verdict."
        else:
            used = f"minutes = {self.request.minutes:g}" if self.request.minutes else ""
            used = " or ".join(filter(None, [f"budget = {most_gradients(self.request):,}", used]))
            more = (
                f"About budget={round(needed, -2):_.0f} would do" if math.isfinite(needed) else "Give a larger budget"
            )
            note = f"{asked} within {used}: the error is {relative_error(result):.1%} of the LLC. {more}."
        return dataclasses.replace(result, notes=(*result.notes, note))


def relative_error(result: LLCResult) -> float:
    """Standard error over the estimate; infinite where either is unknown."""
    error = result.llc_stderr / abs(result.llc) if result.llc else math.inf
    return error if math.isfinite(error) else math.inf


def times_needed(result: LLCResult, target: float) -> float:
    """How many times as long the run has to be: for the error, and for directions that have not relaxed."""
    error, longer = relative_error(result), result.health.evidence.times_longer
    times = (error / target) ** 2 if math.isfinite(error) else math.inf
    if not any(flag in WANTS_MORE for flag in result.health.flags):
        return times
    return max(times, longer if math.isfinite(longer) else 2.0)


def needed_budget(result: LLCResult, target: float) -> float:
    """Gradients of all rounds, by the last of them; infinite where it cannot be told."""
    steps = result.settings.spent.get("steps", 0.0) + result.settings.spent.get("observe", 0.0)
    return sum(result.settings.spent.values()) + (times_needed(result, target) - 1) * steps


def _split_at(plan: Schedule, share: float) -> Schedule:
    """The same steps with this share of them as warm-up, and draws at the same steps as before."""
    moved = max(0, int(share * plan.total_steps) - plan.num_warmup) // plan.thinning
    return dataclasses.replace(
        plan, num_warmup=plan.num_warmup + moved * plan.thinning, num_draws=plan.num_draws - moved
    )


def _with_earlier(result: LLCResult, probes: float) -> LLCResult:
    """With the gradients of the measurements after earlier rounds."""
    gradients = {**result.settings.gradients, "probe": result.settings.spent.get("probe", 0.0) + probes}
    settings = dataclasses.replace(result.settings, gradients=gradients)
    return dataclasses.replace(result, settings=settings)
