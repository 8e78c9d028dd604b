"""Is what a call did right? An answer near the truth, a verdict that says it is not, or an error that says why."""

import math
import warnings

from tests.properties.cases import PLAN, STEP

NAMED = {  # words one of which an error about an argument must contain
    "loss": ("loss_fn", "loss at w*"), "center": ("center", "parameter", "loss_fn", "w*"),
    "data": ("data", "loss_fn", "w*"), "sampler": ("sampler", "step_size"), "mesh": ("mesh", "devices"),
    "also": ("also", "data leaf", "loss_fn", "'a'"), "chain_batch": ("chain_batch", "num_chains"),
    "num_chains": ("num_chains", "chain"), "budget": ("budget", "num_draws"), "num_draws": ("num_draws", "draws"),
    "localization": ("localization", "w*"), "nbeta": ("nbeta", "w*"), "batch_size": ("batch_size", "batch"),
}  # fmt: skip
WAYS_ON = (ValueError, TypeError, FloatingPointError, MemoryError, OSError)


def answer(case):
    """(truth, standard deviation of the mean of SGLD's draws), nats, where the loss is the quadratic's."""
    nbeta = case.more.get("nbeta")
    nbeta = case.num_data / math.log(case.num_data) if nbeta is None else float(nbeta)
    pull = float(case.more.get("localization") or 0.0)
    share = nbeta / (nbeta + pull) / 2
    memory = (1 - STEP * (nbeta + pull) / 2) ** 2
    plan = {**PLAN, **{k: int(case.given[k]) for k in ("num_chains", "num_draws") if case.given.get(k)}}
    wait = (1 + memory) / (1 - memory) if memory < 1 else math.inf
    return case.free * share, math.sqrt(2 * case.free * share**2 * wait / (plan["num_chains"] * plan["num_draws"]))


def judged(case):
    """What the call did, as a word: "right", "refused", "flagged". Raises AssertionError that describes the case."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = case.run()
        except KeyError as error:
            if "loss_fn raised this" not in str(error):
                raise AssertionError(f"obscure, {case.label}: {error!r}") from error
            return "refused"
        except WAYS_ON as error:
            return _judged_error(case, error)
        except Exception as error:
            raise AssertionError(f"obscure, {case.label}: {error!r}") from error
        return _judged_result(case, result, said)


def _judged_error(case, error):
    text, about = str(error), f"{case.label}: {error!r}"
    assert not case.right, f"a right use is refused, {about}"
    words = [word for name in case.changed for word in NAMED.get(name, (name,))]
    assert any(word in text for word in words), f"names none of {words}, {about}"
    assert len(text) < 900, f"too long, {about}"
    own = "loss_fn raised this" in text  # the caller's
    assert own or text.count("\n") < 3, f"too long, {about}"
    assert not isinstance(error, OSError) or "checkpoint_dir" in case.changed, about
    assert own or type(error) in WAYS_ON or isinstance(error, OSError), about
    return "refused"


def _judged_result(case, result, said):
    truth, deviation = answer(case)
    off = result.llc - truth
    about = f"{case.label}: {result.llc:.4g} +/- {result.llc_stderr:.2g} for {truth:.4g}, {result.verdict}"
    assert not any("failed" in note for note in result.notes), f"{about}; {result.notes}"
    if case.right:
        assert not said, f"{about}; {[str(x.message) for x in said]}"
        assert abs(off) < 6 * deviation, about
        return "right"
    if abs(off) < 6 * deviation or abs(off) < 0.1 * truth:
        return "right"
    assert result.verdict != "converged", f"silently wrong, {about}"
    assert result.health.reason, about
    return f"flagged: {result.verdict}"
