"""Shapes of a weight array at which the update is tested, and those at which it is timed."""

TESTED = ((), (7,), (3, 5, 2), (1000, 1001))
TIMED = {"10M weights": (10_000_000,), "a matrix of GPT-2": (768, 3072)}
