"""Data whose rows do not fit ``num_data`` gave a wrong number in silence: they are refused, or noted in the result."""

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.small import DATA, PLAN, estimate, posterior, refuses, square
from tests.sources import Rows

TOKENS = [np.arange(300, dtype=np.int32) + i for i in range(64)]
LAYOUTS = {
    "a list of sequences": (TOKENS, 64, ("64 arrays", "(300,)", "at most 32 arrays", "np.stack(list)")),
    "a dict of sequences": ({str(i): x for i, x in enumerate(TOKENS)}, 64, ("64 arrays", "np.stack")),
    "a short list": (list(DATA[:20]), 20, ("a list of 20 equal elements", "3 rows of each", "np.stack(data)")),
    "as many as rows": (list(np.ones((20, 20), np.float32)), 20, ("one element for each example", "np.stack(data)")),
    "a part of a list": (list(DATA[:12]), 4000, ("a list of 12 equal elements", "np.stack(data)")),
    "a list of pairs": ([(x, x) for x in DATA[:12]], 12, ("12 equal", "jax.tree.map(lambda *x: np.stack(x), *data)")),
    "a list of batches": ([DATA[:10]] * 4, 40, ("4 batches of 10 rows", "np.concatenate(data)")),
    "a last batch": ([DATA[:10]] * 3 + [DATA[:8]], 38, ("'3': 8", "join a list of batches with np.concatenate")),
    "batches": (DATA.reshape(10, 4, 3), 40, ("10 rows", "10 batches of 4", "x.reshape(-1, *x.shape[2:])")),
    "transposed": (DATA.T, 40, ("3 rows", "the length of their second axis", "transpose the data")),
    "fewer examples than rows": (DATA, 10, ("num_data = 10", "40 rows", "not of a batch", "num_data=40")),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_were_meant_otherwise(case):
    data, num_data, words = LAYOUTS[case]
    refuses(ValueError, lambda: estimate(posterior(num_data=num_data), data), *words)


def test_a_ragged_list_is_told_in_three_lines():
    with pytest.raises(ValueError, match="unequal length") as error:
        estimate(data=[DATA[: i + 3] for i in range(30)])
    assert len(str(error.value)) < 3 * 120


def pairs(w, batch):
    return square(w, batch[0] - batch[1])


def test_arrays_that_belong_together_are_no_list_of_examples():
    """Kills: (X, Y) of one shape refused, also where a coincidence makes their number that of the data."""
    assert estimate(posterior(pairs), (DATA, 2 * DATA)).notes == ()
    assert estimate(posterior(pairs), [DATA, 2 * DATA]).notes == ()
    assert estimate(posterior(pairs, num_data=2), (DATA[:2], DATA[:2]), batch_size=2).notes == ()


@pytest.mark.parametrize("host", [False, True])
def test_a_subsample_is_noted(host):
    data = Rows(DATA) if host else DATA
    (note,) = estimate(posterior(num_data=60), data).notes
    for words in ("num_data = 60", "40 rows", "sets nbeta = 14.65 and nothing else", "pass num_data=40"):
        assert words in note
    result = estimate(posterior(num_data=10**6, nbeta=3.0), data)
    for words in ("1,000,000", "sets nothing in the estimate, since nbeta = 3 was given", "25,000 times the rows"):
        assert words in result.notes[0]
    assert f"Note: {result.notes[0]}" in str(result)
    refuses(ValueError, lambda: estimate(posterior(num_data=10), data), "num_data = 10", "40 rows")


def test_a_subsample_is_noted_in_sweeps_and_trajectories():
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    target = posterior(num_data=60)
    for cell in slt.sweep(target, DATA, nbeta=[1.0, 2.0], **given).results:
        assert "40 rows" in cell.notes[0]
    rows = slt.trajectory(target, {1: jnp.zeros(3)}, DATA, **given).results
    assert "40 rows" in next(iter(rows.values()))[0].notes[0]


def test_further_data_of_another_structure():
    both = ("also['a'] has the structure ((*, *)), the data have (*)", "the same structure")
    refuses(ValueError, lambda: estimate(also={"a": (DATA, DATA)}), *both)
    words = ("{'x': *}", "{'y': *}")
    named = posterior(lambda w, b: square(w, b["x"]))
    refuses(ValueError, lambda: estimate(named, {"x": DATA}, also={"a": {"y": DATA}}), *words)
    refuses(ValueError, lambda: estimate(data=Rows(DATA), also={"a": {"y": DATA}}), "also['a']")
    assert set(estimate(posterior(pairs), (DATA, DATA), also={"a": [DATA, DATA]}).also) == {"a"}
