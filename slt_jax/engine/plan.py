"""How long a run is, how it is laid out, and the numbers that its chains are moved with."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from slt_jax.samplers.base import Metric


class Lengths(NamedTuple):
    """``hot``: every other chain starts at nbeta / hot and is cooled over half of the warm-up; 1 for none."""

    num_chains: int
    num_draws: int
    num_warmup: int
    thinning: int
    hot: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how they are laid out.

    ``baseline`` is ``"paired"`` or ``"full"``. With ``control_variate`` the gradient is
    g_m(w) - g_m(w*) + grad L_n(w*). ``hot``: see ``Lengths``.
    """

    num_chains: int
    num_draws: int
    num_warmup: int
    thinning: int
    batch_size: int
    micro_batches: int
    baseline: str
    chain_batch: int
    chunk_size: int
    control_variate: bool = False
    hot: float = 1.0

    @property
    def total_steps(self) -> int:
        return self.num_warmup + self.num_draws * self.thinning

    def step_gradients(self, num_chains: int | None = None) -> int:
        """Minibatch gradients of all steps of so many chains, by default of all."""
        chains = self.num_chains if num_chains is None else num_chains
        return chains * self.total_steps * (2 if self.control_variate else 1)


class Numbers(NamedTuple):
    """What chains are moved with, by the names of ``samplers.base.Hyper``: one number for all, or one for each cell."""

    nbeta: Any
    localization: Any
    step_size: Any
    friction: Any = 0.1
    limit: Any = math.inf
    metric: Metric = ()
