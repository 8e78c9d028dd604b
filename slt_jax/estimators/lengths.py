"""How many chains, steps and draws an estimate takes where the caller leaves them open."""

import math

from slt_jax.engine.plan import Lengths
from slt_jax.estimators.request import Request

CHAINS, DRAWS = 4, 500
WARMUP_SHARE = 0.4  # of the steps, where the budget sets the lengths
FEW_CHAINS = {500: 1, 4000: 2}  # so many for a smaller budget: short chains all underestimate the LLC alike
THIN_FROM, LEAST_THINNING, MOST_DRAWS = 400, 4, 20_000
HOT, HOT_WARMUP = 10.0, 200  # where the warm-up is at least that long


def lengths_of(request: Request, spent: float, control: bool) -> Lengths:
    """What is left after ``spent`` gradients went elsewhere. ``control``: with control variates, which cost a pass over
    the data, and two gradients a step. Observing takes at most half of the draws' part of a budget where ``thinning``
    is open.

    Raises ValueError where the budget leaves fewer than 4 draws a chain.
    """
    spent, cost = (spent + request.passes, 2) if control else (spent, 1)
    chains = CHAINS if request.num_chains is None else request.num_chains
    if request.budget is None and (not request.is_open or request.num_draws is not None):
        draws = DRAWS if request.num_draws is None else request.num_draws
        thinning = 1 if request.thinning is None else request.thinning
        warmup = draws if request.num_warmup is None else request.num_warmup
    else:
        total = request.default_budget if request.budget is None else request.budget
        if request.num_chains is None and request.may_have_few_chains:
            chains = next((few for most, few in FEW_CHAINS.items() if total < most), chains)
        steps = int((total - spent) / (chains * cost))
        thinning = request.thinning
        if thinning is None:
            left = steps - _warmup(request, steps)
            thinning = 1 if left < THIN_FROM else max(LEAST_THINNING, left // MOST_DRAWS)
            thinning = max(thinning, math.ceil(request.observing / cost))
        if request.observing:
            steps = _beside_observing(request, steps, thinning, request.observing / cost)
        warmup = _warmup(request, steps)
        draws = (steps - warmup) // thinning
        if draws < 4:
            raise ValueError(
                f"a budget of {total} gradients leaves {max(0, steps)} steps for each of {chains} chains, of which "
                f"{warmup} are warm-up: fewer than 4 draws. Raise the budget, or take fewer chains."
            )
    hot = request.hot
    if hot is None:
        sampler = request.sampler
        plain = sampler.step_size is None and not sampler.theory.full_batch and not sampler.metric
        plain = plain and request.posterior.nbeta > 0
        hot = HOT if plain and chains >= 2 and warmup >= HOT_WARMUP else 1.0
    return Lengths(int(chains), int(draws), int(warmup), int(thinning), float(hot))


def _warmup(request: Request, steps: int) -> int:
    return int(WARMUP_SHARE * steps) if request.num_warmup is None else request.num_warmup


def _beside_observing(request: Request, steps: int, thinning: int, each: float) -> int:
    """Steps of a chain that leave of ``steps`` what observing takes at the draws; ``each``: at one, in steps."""
    more = each / thinning  # of a step after the warm-up
    if request.num_warmup is None:
        return int(steps / (1 + (1 - WARMUP_SHARE) * more))
    return request.num_warmup + int(max(0, steps - request.num_warmup) / (1 + more))
