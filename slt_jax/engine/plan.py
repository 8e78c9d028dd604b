"""How long a run is, and how it is laid out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how they are laid out.

    ``baseline`` is ``"paired"`` or ``"full"``. With ``control_variate`` the gradient is
    g_m(w) - g_m(w*) + grad L_n(w*). ``hot``: every other chain starts at nbeta / hot, and is cooled over the first half
    of the warm-up; 1 for none.
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
