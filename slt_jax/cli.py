"""The command line: ``slt-jax demo`` and ``slt-jax llc``.

Exit codes: 0 done; 2 input that cannot be used; 3 no chain stayed finite; 130 interrupted.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small transformer on Python's own source and estimate its LLC along training (a few minutes)."""

    out: Path = Path("demo-run")
    """Folder for checkpoints, traces, table and picture; trained checkpoints found there are reused."""
    smoke: bool = False
    """A much smaller run, to see that everything works."""
    quiet: bool = False
    """No progress bars."""


@dataclasses.dataclass(frozen=True)
class Llc:
    """Estimate the LLC of a checkpoint on a token file.

    The checkpoint: a folder that slt-jax wrote, or a GPT-2, GPT-NeoX (Pythia), Llama, Qwen2 or Qwen3 of Hugging Face.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The folder, e.g. demo-run/checkpoints/step-00980, or a repository on the Hugging Face Hub."""
    tokens: Path
    """Token ids: a one-dimensional .npy file, or raw little-endian .bin."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids in a .bin file."""
    seq_len: int | None = None
    """Tokens in one example; default the model's context length."""
    nbeta: float = 30.0
    """n times the inverse temperature. The default is what published work on language models uses."""
    localization: float = 300.0
    """gamma, the pull to the trained weights. The default is what published work on language models uses."""
    step_size: float = 1e-4
    """SGLD's epsilon. Halve it and compare: the estimate should stand still."""
    chains: int = 4
    """Independent chains, all started at the checkpoint."""
    draws: int = 200
    """Losses recorded in each chain."""
    warmup: int | None = None
    """Steps before the first draw; default as many as draws."""
    thinning: int = 1
    """Steps from one draw to the next."""
    batch_size: int = 32
    """Examples in a step's batch, drawn with replacement, other ones for each chain."""
    micro_batches: int = 1
    """Parts in which a batch goes through the model, to save memory."""
    only: str | None = None
    """Sample only parameters whose path holds this text, e.g. attention/q or embedding; the rest is frozen."""
    bfloat16: bool = False
    """Run the model in bfloat16; the chains keep float32 weights."""
    seed: int = 0
    """The same seed gives the same numbers."""
    out: Path | None = None
    """Write the traces here (zarr)."""
    plot: Path | None = None
    """Write the picture of the traces here (png, pdf, svg)."""
    checkpoint_dir: Path | None = None
    """Keep the run's state here; the same command resumes an interrupted run."""
    json: bool = False
    """Print the result as JSON on standard output."""
    quiet: bool = False
    """No progress bar."""


Command = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Llc, tyro.conf.subcommand("llc")]


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    command = tyro.cli(
        Command, args=argv, prog="slt-jax",
        description="Local learning coefficients of neural networks, with error bars.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    _use_all_cores()
    try:
        return _demo(command) if isinstance(command, Demo) else _llc(command)
    except KeyboardInterrupt:
        resume = " The same command resumes it." if getattr(command, "checkpoint_dir", None) else ""
        print(f"interrupted.{resume}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FloatingPointError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _use_all_cores() -> None:
    """On a CPU, one JAX device per core, so that chains run side by side."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", cores)
        except RuntimeError:
            pass  # JAX is already running in this process: its devices are what they are


def _demo(command: Demo) -> int:
    from slt_jax.demo import run_demo

    run_demo(command.out, smoke=command.smoke, show=not command.quiet)
    return 0


def _llc(command: Llc) -> int:
    import jax.numpy as jnp

    import slt_jax as slt
    from slt_jax.models.hub import load_checkpoint

    for path in (command.out, command.plot):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists. Remove it, or give another path.")
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise PermissionError(f"{path.absolute().parent} is not a folder that can be written to.")
    model, _ = load_checkpoint(command.checkpoint)
    length = model.config.context_length if command.seq_len is None else command.seq_len
    data = slt.token_file(command.tokens, length, dtype=command.dtype, vocab_size=model.config.vocab_size)
    params, loss_fn = slt.from_nnx(model, lambda m, batch: m.losses(batch))
    posterior = slt.LocalPosterior(
        loss_fn, params, num_data=data.num_data, nbeta=command.nbeta, localization=command.localization,
        mask=None if (only := command.only) is None else lambda path: only in "/".join(path),
        forward_dtype=jnp.bfloat16 if command.bfloat16 else None,
    )  # fmt: skip
    print(
        f"{posterior.num_free:,} weights free, {data.num_data:,} examples of {length} tokens, {command.chains} chains",
        file=sys.stderr,
    )
    result = slt.estimate_llc(
        posterior, data, sampler=slt.sgld(command.step_size), num_chains=command.chains, num_draws=command.draws,
        num_warmup=command.warmup, thinning=command.thinning, batch_size=command.batch_size,
        micro_batches=command.micro_batches, key=command.seed, checkpoint_dir=command.checkpoint_dir,
        progress=not command.quiet,
    )  # fmt: skip
    print(json.dumps(result.to_dict(), indent=1) if command.json else result)
    if command.out is not None:
        result.save(command.out)
    if command.plot is not None:
        result.plot(command.plot)
    return 3 if result.verdict == "diverged" and not len(result.kept_chains) else 0


if __name__ == "__main__":
    sys.exit(main())
