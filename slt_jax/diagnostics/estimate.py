"""A number with its standard error."""

import math
from typing import NamedTuple


class Estimate(NamedTuple):
    """A number and its standard error; NaN where the error is not known."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.4g} " + ("(no error bar)" if math.isnan(self.stderr) else f"+/- {self.stderr:.2g}")
