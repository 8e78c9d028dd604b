"""``python -m slt_jax.cli``: the command ``slt-jax``."""

from slt_jax.cli.commands import run

run()
