"""What a calibration may cost: its share of the budget, and how it is spent."""

from typing import NamedTuple

_SHARE = 0.15  # of the gradients, for all of the calibration
_RICH = 15_000  # gradients for calibration, from which on a shorter step is affordable


class Effort(NamedTuple):
    """``allowed``: minibatch gradients. ``blocks``: minibatches in a measurement. ``rounds``: of a power iteration."""

    allowed: float
    blocks: int
    rounds: int

    @property
    def rich(self) -> bool:
        """Whether steps are plenty, so that shorter ones are affordable."""
        return self.allowed >= _RICH


def allowance(total: float) -> float:
    """Minibatch gradients that calibration may spend of ``total``."""
    return _SHARE * total


def effort_for(total: float) -> Effort:
    """For an estimate of so many minibatch gradients: less is measured where few are to be spent."""
    allowed = allowance(total)
    blocks, rounds = (4, 20) if allowed >= 800 else (2, 12) if allowed >= 200 else (1, 6)
    return Effort(allowed, blocks, rounds)


def default_budget(num_free: int) -> int:
    """Minibatch gradients for one estimate: more for few weights, where a draw carries less information and costs less.

    For a hundred to ten thousand weights that is the same time, some ten to thirty seconds of two cores.
    """
    return int(max(1e4, min(2e6, 4e6 / num_free), min(4e5, 1e8 / num_free)))
