"""What a calibration may cost and how it is spent; the default batch and budget."""

from typing import NamedTuple

_SHARE = 0.15  # of the gradients, for all of the calibration
_RICH = 15_000  # gradients for calibration, from which on a shorter step is affordable
_BATCH = 256  # examples of a minibatch
_SMALL = 10_000  # weights of a model, and
_SMALL_DATA = 2**24  # bytes of a data set, up to which half of a step's time does not depend on its number of examples
_MOST_PRICE = 4.0  # of a gradient over all examples, in minibatch gradients: twice a step with control variates


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


def default_batch(num_data: int, num_weights: int, num_bytes: float) -> tuple[int, float]:
    """(batch size, price of its gradient in gradients over ``min(256, num_data)`` examples).

    All examples, without minibatch noise, where such a step costs at most twice a step with control variates, which
    takes two gradients. For small models and data half of a step's time does not depend on the number of examples: the
    price is estimated as num_data / 512. (On two cores 1,797 images instead of 256 take 3.9 times as long in an MLP
    with 1,210 weights, and 8 times in a CNN.)

    Args:
        num_weights: of the model, free or not. num_bytes: of the data; infinite where they are not in memory.
    """
    price = num_data / (2 * _BATCH)
    if num_data > _BATCH and num_weights <= _SMALL and num_bytes <= _SMALL_DATA and price <= _MOST_PRICE:
        return num_data, max(1.0, price)
    return min(_BATCH, num_data), 1.0


def default_budget(num_free: int, price: float = 1.0) -> int:
    """Gradients for one estimate: more for few weights, where a draw carries less information and costs less.

    For a hundred to ten thousand weights that is the same time, some ten to thirty seconds of two cores. ``price``: of
    a gradient, see ``default_batch``.
    """
    return int(max(1e4, min(2e6, 4e6 / num_free), min(4e5, 1e8 / num_free)) / price)
