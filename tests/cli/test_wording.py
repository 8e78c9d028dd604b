"""What the library says, in the words of the command line."""

import pytest

from slt_jax.cli.wording import in_options, result_in_options


@pytest.mark.quick
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Run on: budget=6_500 (or num_draws=800).", "Run on: --budget 6500 (or --draws 800)."),
        ("micro_batches = 3 does not divide batch_size = 32.", "--micro-batches 3 does not divide --batch-size 32."),
        ("target_error = 0.03 within minutes = 3.", "--precision 0.03 within --minutes 3."),
        ("num_draws must be at least 1, got 0.", "--draws must be at least 1, got 0."),
        ("halve step_size, or raise localization", "halve --step-size, or raise localization"),
        ("no file runs/step_size.npy; control_variate=True", "no file runs/step_size.npy; control_variate=True"),
        ("--batch-size must be an integer", "--batch-size must be an integer"),
        ("depends on nbeta or localization", "depends on nbeta or localization"),
    ],
)  # fmt: skip
def test_arguments_become_options(said, shown):
    assert in_options(said) == shown


def test_of_a_result_only_what_is_to_be_done():
    text = "Verdict: still rising: Run twice as long: budget=3_300.\nunderdamped with step_size 0.1\nNote: num_draws=9."
    expected = (
        "Verdict: still rising: Run twice as long: --budget 3300.\nunderdamped with step_size 0.1\nNote: --draws 9."
    )
    assert result_in_options(text) == expected
