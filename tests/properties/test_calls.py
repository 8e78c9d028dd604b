"""Any call is accepted with a right answer on a known quadratic, or refused with an error that names the argument."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import slt_jax as slt
from tests.properties.cases import COUNTS, NUMBERS, OBJECTS, ROWS, TRAINED, X, cases, per_example
from tests.properties.judge import judged

pytestmark = pytest.mark.usefixtures("wrong_types")
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def searched(examples):
    """Settings of a search: bounded, the same each time, without files."""
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                    suppress_health_check=CHECKS)  # fmt: skip


@searched(50)
@given(cases())
def test_calls(case):
    judged(case)


@pytest.mark.slow
def test_two_thousand_calls():
    """The same, more of them. Prints what became of them."""
    found = {}

    @seed(2031)
    @settings(searched(2000), derandomize=False)
    @given(cases())
    def search(case):
        word = judged(case)
        found[word] = found.get(word, 0) + 1
        if sum(found.values()) % 100 == 0:
            jax.clear_caches()  # of programs, whose number is limited

    search()
    print(found)
    assert found["right"] > 400
    assert found["refused"] > 400


AXES = ["nbeta", "localization", "step_size"]


@searched(60)
@given(st.sampled_from(AXES), st.lists(st.sampled_from(NUMBERS), max_size=3) | st.sampled_from(OBJECTS))
def test_axes_of_a_sweep(name, values):
    """Each value of an axis is a positive number, or the axis is refused by its name."""
    posterior = slt.LocalPosterior(per_example, {"w": TRAINED}, ROWS, localization=1.0)
    try:
        result = slt.sweep(posterior, (X, X @ TRAINED), sampler=slt.sgld(0.01), num_draws=4, **{name: values})
    except (TypeError, ValueError) as error:
        assert name in str(error), repr(error)  # noqa: PT017
        assert len(str(error)) < 400, error  # noqa: PT017
    else:
        given = [] if values is None else [float(v) for v in np.atleast_1d(values)]
        assert values is None or result.dataset[name].values.tolist() == sorted(given)


@searched(60)
@given(st.sampled_from(["num_chains", "num_draws", "num_warmup", "thinning", "batch_size", "key"]),
       st.sampled_from([x for x in COUNTS + OBJECTS if type(x) is not int or x > 10 or x < 1]))  # fmt: skip
def test_counts_of_a_trajectory(name, value):
    posterior = slt.LocalPosterior(per_example, {"w": TRAINED}, ROWS, localization=1.0)
    given = {"num_draws": 4, "num_chains": 2, name: value}
    try:
        course = slt.trajectory(posterior, {1: {"w": TRAINED}}, (X, X @ TRAINED), sampler=slt.sgld(0.01), **given)
    except (TypeError, ValueError) as error:
        assert name in str(error) or "draws" in str(error), repr(error)  # noqa: PT017
        assert len(str(error)) < 400, error  # noqa: PT017
    else:
        assert course.dataset.sizes["training_step"] == 1
