"""The checks of the verdict: each fails where its flag is raised, and nowhere else."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from slt_jax.diagnostics import limits
from slt_jax.diagnostics.bias import Bias
from slt_jax.diagnostics.checks import Check, Fault
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.sensitivity import Slope
from slt_jax.diagnostics.series import Rise
from slt_jax.diagnostics.verdict import CHECKS, DECISIVE, PRECEDENCE, assess
from tests.small import gamma_draws

RNG = np.random.default_rng(2)
STILL = 30 + RNG.normal(scale=5.0, size=(4, 1000))
RAMP = np.linspace(-1.5, 1.5, 1000)
SPIKED = np.where(np.random.default_rng(5).random((4, 1000)) < 0.01, 40 * STILL, STILL)
HOT = np.array([False, True, False, True])
NO_BIAS = Bias(0.0, 0.0, 0.1, 0.0, "")
FEW = 30 + RNG.normal(scale=5.0, size=(4, 5))

# draws, evidence, the checks that fail, the flags
CASES = {
    "nothing": (STILL, {}, (), ()),
    "a chain that diverged": (STILL, {"num_stopped": 1}, ("Chains that stayed finite",), ("diverged",)),
    "no chain": (STILL[:0], {"num_stopped": 4}, ("Chains that stayed finite",), ("diverged",)),
    "three draws": (STILL[:, :3], {}, ("Draws of a chain",), ("too few draws",)),
    "draws that are all the same": (0 * STILL + 2, {}, ("Draws of a chain",), ("too few draws",)),
    "a rise of the draws": (STILL + RAMP, {}, ("Trend",), ("still rising",)),
    "a fall of the draws": (STILL - RAMP, {}, ("Trend",), ("still falling",)),
    "a rise since the start": (
        STILL, {"rise": Rise(3.0, 3.0, 0.5)}, ("Rise in one more doubling of the run",), ("still rising",),
    ),
    "slow directions": (
        STILL, {"unrelaxed_bias": 3.0, "times_longer": 4.0}, ("Bias of unrelaxed directions",), ("still rising",),
    ),
    "a fall from elsewhere": (STILL - RAMP, {"unrelaxed_bias": 3.0}, ("Trend",), ("still falling",)),
    "few directions": (STILL, {"virial": 0.1}, ("Virial ratio",), ("still rising",)),
    "hot chains above": (
        STILL + 4 * HOT[:, None], {"hot": HOT}, ("R-hat", "From w*, from hot starts"), ("chains disagree",),
    ),
    "one chain above": (STILL + 4 * np.eye(4)[:, :1], {}, ("R-hat",), ("chains disagree",)),
    "few draws": (FEW, {}, ("Effective draws (ESS)",), ("too few draws",)),
    "a large error": (gamma_draws(0.05, 4, 300), {}, ("Error of the mean",), ("too few draws",)),
    "a lower loss": (STILL - 40, {}, ("Loss above that of w*",), ("not a minimum",)),
    "a lower loss for a while": (
        STILL - 24 - 40 * (np.arange(1000) // 125 == 2), {}, ("Loss above that of w*", "Error of the mean"),
        ("not a minimum", "too few draws"),
    ),
    "a slope": (STILL, {"tilt": Slope(-5.0, 0.1)}, ("Slope at w*",), ("not a minimum",)),
    "heat": (STILL, {"kinetic": 1.4, "bias": NO_BIAS}, ("Kinetic temperature",), ("biased by the step size",)),
    "heat in a metric": (
        STILL, {"metric": True, "heat": Slope(6.0, 0.5), "bias": NO_BIAS}, ("Heat in a metric",),
        ("biased by the step size",),
    ),
    "a long step": (
        STILL, {"bias": Bias(6.0, 0.0, 0.1, 0.0, "")}, ("Bias of the step size",), ("biased by the step size",),
    ),
    "a long step and noisy batches": (
        STILL, {"bias": Bias(4.4, 4.4, 0.1, 0.0, "")}, ("Bias of the step size",), ("biased by the step size",),
    ),
    "noisy batches": (
        STILL, {"bias": Bias(0.0, 6.0, 0.1, 0.0, "")}, ("Bias of minibatch noise",), ("heated by minibatch noise",),
    ),
    "spikes": (
        SPIKED, {"nbeta_slope": Slope(-500.0, 50.0)}, ("Variance of nbeta L over its mean",),
        ("biased by the step size",),
    ),
    "a broad spread": (
        60 + 30 * (STILL - 30) / 5, {"nbeta_slope": Slope(-840.0, 30.0)}, ("Variance of nbeta L over its mean",),
        ("depends on nbeta or localization",),
    ),
    "rounding": (
        STILL, {"spacing": 9.0, "example_spread": 60.0}, ("Resolution of float32",), ("not resolved in float32",),
    ),
    "draws at chance": (STILL, {"loss": 3.77, "chance_loss": 3.5}, ("Loss below chance",), ("no better than chance",)),
    "slopes": (
        STILL, {"nbeta_slope": Slope(3.0, 0.2), "localization_slope": Slope(-3.0, 0.2)},
        ("Slope in log nbeta", "Slope in log localization"), ("depends on nbeta or localization",),
    ),
    "hidden directions": (
        STILL, {"hidden": 4, "hides": 9.0}, ("Directions below the localization",),
        ("depends on nbeta or localization",),
    ),
    "a drift below the loss at w*": (
        STILL - 40 + 60 * RAMP * np.array([[1.0], [0.1], [0.5], [2.0]]), {"scatter_error": 0.2},
        ("Loss above that of w*", "R-hat", "Effective draws (ESS)", "Error of the mean"),
        ("not a minimum", "chains disagree", "too few draws"),
    ),
    "a steep loss": (
        STILL, {"degree": Slope(8.0, 0.1)}, ("Degree of the loss",), ("depends on nbeta or localization",),
    ),
    "a localized steep loss": (
        STILL, {"degree": Slope(5.0, 0.1), "localized_share": 0.8}, ("Degree of the loss",),
        ("depends on nbeta or localization",),
    ),
}  # fmt: skip


def failed(health):
    return [check for check in health.checks if check.ok is False]


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_a_check_fails_with_its_flag(case):
    draws, evidence, names, flags = CASES[case]
    health = assess(draws, Evidence(num_free=100, **evidence))
    assert health.flags == flags
    assert {check.fault.verdict for check in failed(health)} == set(flags)
    assert {check.name for check in failed(health)} == set(names)
    assert health.verdict == (flags[0] if flags else "converged")
    if failed(health):
        assert any(health.reason.startswith(check.fault.reason) for check in failed(health))


@pytest.mark.quick
def test_every_check_fails_in_some_case():
    names = {check.name for check in assess(STILL, Evidence()).checks}
    assert names - {name for case in CASES.values() for name in case[2]} == {"Acceptance of a step"}


@pytest.mark.quick
def test_every_check_has_its_place():
    """Kills: a check that is shown and never speaks; one that speaks and is not shown."""
    named = [*DECISIVE, *itertools.chain(*PRECEDENCE)]
    assert len(set(named)) == len(named)
    unlimited = [rule for rule, check in zip(CHECKS, assess(STILL, Evidence()).checks, strict=True)
                 if not check.limit_text]  # fmt: skip
    assert {*named, *unlimited} == set(CHECKS)


@pytest.mark.parametrize("first", CASES)
def test_two_faults_are_both_flagged(first):
    """Unless one of them ends the assessment, or both answer one question: then the first of the group speaks."""
    for second in CASES:
        evidence = Evidence(num_free=100, **{**CASES[first][1], **CASES[second][1]})
        if CASES[first][0].shape[0] != 4:
            evidence = Evidence(num_stopped=4)
        health = assess(CASES[first][0], evidence)
        faults = {rule: check.fault for rule, check in zip(CHECKS, health.checks, strict=True) if check.ok is False}
        ends = [rule for rule in DECISIVE if rule in faults]
        assert set(health.flags) <= {fault.verdict for fault in faults.values()}
        for rule, fault in faults.items():
            same_question = next((group for group in (*PRECEDENCE, DECISIVE) if rule in group), ())
            spoken = {faults[other].verdict for other in same_question[: same_question.index(rule)] if other in faults}
            assert fault.verdict in health.flags or spoken & set(health.flags) or ends


@pytest.mark.quick
def test_a_number_that_is_unknown_is_neither_good_nor_bad():
    health = assess(STILL[:0], Evidence(num_stopped=4))
    assert [check.name for check in health.checks if check.ok is not None] == ["Chains that stayed finite"]
    for check in assess(STILL, Evidence()).checks:
        assert (check.ok is None) == (check.name not in MEASURED_ON_DRAWS)
        assert check.ok is not True or math.isfinite(check.value)


MEASURED_ON_DRAWS = {
    "Chains that stayed finite", "Draws of a chain", "R-hat", "Effective draws (ESS)", "Error of the mean", "Trend",
    "Loss above that of w*",
}  # fmt: skip


@pytest.mark.quick
def test_a_fault_and_a_failed_check_are_the_same_thing():
    given = {"name": "x", "value": 1.0, "limit": 2.0, "meaning": "", "value_text": "1", "limit_text": "2"}
    with pytest.raises(ValueError, match="needs a fault exactly where it fails"):
        Check(ok=False, **given)
    with pytest.raises(ValueError, match="needs a fault exactly where it fails"):
        Check(ok=None, fault=Fault("diverged", "why"), **given)


@pytest.mark.quick
def test_every_limit_has_a_reason():
    """Kills: a limit without a sentence above it, or one that shares another's."""
    lines = Path(limits.__file__).read_text(encoding="utf-8").splitlines()
    names = [name for name in vars(limits) if name.isupper()]
    assert len(names) > 25
    for name in names:
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        above = next(line for line in reversed(lines[:place]) if " = " not in line or line.startswith("#"))
        assert above.startswith("# ")


def test_two_small_biases_are_left_out_only_where_they_are_subtracted():
    """Kills: 14 % and 14 %, each under the limit, too much together to be subtracted, and called converged."""
    together = assess(STILL, Evidence(bias=Bias(4.4, 4.4, 0.1, 0.0, "")))
    assert together.verdict == "biased by the step size"
    assert together.reason.startswith("step size and minibatch noise together add about 8.8 to ")
    assert assess(STILL, Evidence(bias=Bias(2.4, 2.4, 0.1, 4.8, ""))).verdict == "converged"


@pytest.mark.quick
def test_slopes_are_told_in_words():
    """Kills: one slope told for the other, one that is left out, a number for one that is not known."""
    up, down, wild = Slope(3.0, 0.2), Slope(-2.0, 0.1), Slope(9.0, 400.0)

    def told(nbeta_slope, localization_slope):
        evidence = Evidence(num_free=100, nbeta_slope=nbeta_slope, localization_slope=localization_slope)
        return assess(STILL, evidence).reason

    both = "a factor e in nbeta changes the estimate by +3 +/- 0.2, one in localization by -2 +/- 0.1: it describes"
    assert told(up, down).startswith(both)
    assert told(up, wild).startswith("a factor e in nbeta changes the estimate by +3 +/- 0.2: it describes")
