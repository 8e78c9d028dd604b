"""Shapes (rows, width, vocabulary) at which the operation is tested, and those at which it is timed."""

TESTED = ((1, 3, 5), (7, 4, 11), (128, 16, 301), (300, 8, 97))
TIMED = {"gpt2, 1024 tokens": (1024, 768, 50257), "a small model": (1024, 256, 4096)}
