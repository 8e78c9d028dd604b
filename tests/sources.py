"""Data sets that the host reads, for tests."""

import numpy as np

from slt_jax.posterior.data import HostData


class Rows(HostData):
    """Rows in memory, read by the host."""

    def __init__(self, rows):
        self.rows, self.num_data = np.asarray(rows), len(rows)

    def fetch(self, indices):
        return self.rows[indices]

    def fingerprint(self):
        return "rows"
