"""Texts of the library, which name its arguments, with the options of the command line in their place."""

import re

_OPTIONS = {
    "num_chains": "chains", "num_draws": "draws", "num_warmup": "warmup", "target_error": "precision", "key": "seed",
    "only": "only", "nbeta": "nbeta", "localization": "localization", "step_size": "step-size", "budget": "budget",
    "minutes": "minutes", "thinning": "thinning", "batch_size": "batch-size", "micro_batches": "micro-batches",
    "checkpoint_dir": "checkpoint-dir", "seq_len": "seq-len", "dtype": "dtype", "memory_gib": "memory-gib",
}  # fmt: skip
_VALUE = re.compile(rf"\b({'|'.join(_OPTIONS)})( = |=)(?=[\w.'+-])")
_NAME = re.compile(rf"(?<![-/\w.])({'|'.join(name for name in _OPTIONS if '_' in name)})\b(?!\s*\()")
_GROUPED = re.compile(r"(?<= )(\d{1,3}(?:_\d{3})+)\b")


def in_options(text: str) -> str:
    """``budget=80_000 (or num_draws=800)`` as ``--budget 80000 (or --draws 800)``: what can be typed.

    Names that are also words, such as nbeta and budget, are left alone unless a value follows.
    """
    typed = _VALUE.sub(lambda match: f"--{_OPTIONS[match[1]]} ", text)
    typed = _NAME.sub(lambda match: f"--{_OPTIONS[match[1]]}", typed)
    return _GROUPED.sub(lambda match: match[1].replace("_", ""), typed)


def result_in_options(text: str) -> str:
    """The text of a result, whose remedies stand in its verdict and its notes."""
    lines = text.split("\n")
    return "\n".join(in_options(line) if line.startswith(("Verdict: ", "Note: ")) else line for line in lines)
