"""The command line: ``slt-jax demo`` and ``slt-jax llc``.

Exit codes: 0 done; 2 input that cannot be used; 3 no chain stayed finite; 130 interrupted.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

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
    """Estimate the LLC of a language model's checkpoint: GPT-2, GPT-NeoX (Pythia), Llama, Qwen2, Qwen3."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with config.json and safetensors, a repository on the Hugging Face Hub, or a checkpoint of the demo."""
    tokens: Path | None = None
    """Token ids: a one-dimensional .npy file, or raw little-endian .bin."""
    text: Path | None = None
    """Or a text file, for the checkpoint's tokenizer.json."""
    also: tuple[str, ...] = ()
    """Further data sets, NAME=FILE: their losses are read at the same draws (data-refined LLCs). Token files (.npy,
    .bin) or text."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids in a .bin file."""
    seq_len: int | None = None
    """Tokens in one example; default the model's context length."""
    only: str | None = None
    """Sample only a part: 'layer 3', 'layer 3 head 5', attention, mlp, embedding, unembedding, norms, 'layer 3 mlp', or
    several with commas."""
    heads: bool = False
    """A table of the refined LLCs of all heads, each with the rest held fast."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30, what published work on language models uses."""
    localization: float | None = None
    """gamma, the pull to the trained weights; default 300, what published work on language models uses."""
    sampler: Literal["sgld", "preconditioned", "underdamped"] = "sgld"
    """How a step moves. The default is what published work on language models uses."""
    step_size: float | None = None
    """The sampler's epsilon; default calibrated."""
    chains: int = 4
    """Independent chains, started at the checkpoint; every other one hot, where a calibrated run is long enough."""
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
    bfloat16: bool = False
    """Run the model in bfloat16; the chains keep float32 weights."""
    seed: int = 0
    """The same seed gives the same numbers."""
    out: Path | None = None
    """Write the traces here (zarr); with --heads a folder with one for each."""
    plot: Path | None = None
    """Write the picture of the traces here (png, pdf, svg)."""
    checkpoint_dir: Path | None = None
    """Keep the run's state here; the same command resumes an interrupted run."""
    json: bool = False
    """Print the result as JSON on standard output."""
    quiet: bool = False
    """No plan and no progress bar."""


_INTERRUPTED = 130

Command = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Llc, tyro.conf.subcommand("llc")]


def run() -> None:
    """The command ``slt-jax``."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == _INTERRUPTED:  # a program that the device has in hand can crash Python on its way out
        os._exit(code)
    sys.exit(code)


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
        return _INTERRUPTED
    except (ValueError, TypeError, FloatingPointError, ImportError, OSError, MemoryError) as error:
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
    import slt_jax as slt
    from slt_jax import language
    from slt_jax.models.restrict import restricted

    for path in (command.out, command.plot):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists. Remove it, or give another path.")
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise PermissionError(f"{path.absolute().parent} is not a folder that can be written to.")
    _check_together(command)
    case = language.open_case(
        command.checkpoint, tokens=command.tokens, text=command.text, dtype=command.dtype, seq_len=command.seq_len,
        nbeta=command.nbeta, localization=command.localization, bfloat16=command.bfloat16, also=_named(command.also),
    )  # fmt: skip
    samplers = {"sgld": slt.sgld, "preconditioned": slt.preconditioned_sgld, "underdamped": slt.underdamped}
    options = {
        "sampler": samplers[command.sampler](command.step_size), "num_chains": command.chains,
        "num_draws": command.draws, "num_warmup": command.warmup, "thinning": command.thinning,
        "batch_size": command.batch_size, "micro_batches": command.micro_batches, "key": command.seed,
        "also": case.also,
    }  # fmt: skip
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    if not command.quiet:
        print(*language.plan_of(case, posterior, options), sep="\n", file=sys.stderr)
    if command.heads:
        return _heads(command, case, options)
    result = slt.estimate_llc(
        posterior, case.data, checkpoint_dir=command.checkpoint_dir, progress=not command.quiet, **options
    )
    print(json.dumps(result.to_dict(), indent=1) if command.json else result)
    if command.out is not None:
        result.save(command.out)
    if command.plot is not None:
        result.plot(command.plot)
    return 3 if result.verdict == "diverged" and not len(result.kept_chains) else 0


def _named(also: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in also:
        name, sign, file = text.partition("=")
        if not (name and sign and file) or name in found:
            raise ValueError(f"--also takes NAME=FILE, each name once, got {text!r}. Write --also code=code.npy.")
        found[name] = Path(file)
    return found


def _check_together(command: Llc) -> None:
    alone = {"--only": command.only, "--plot": command.plot, "--checkpoint-dir": command.checkpoint_dir}
    if command.heads and (given := [name for name, value in alone.items() if value is not None]):
        raise ValueError(f"--heads makes a table of many results and takes no {', '.join(given)}. Leave it out.")


def _heads(command: Llc, case: Any, options: dict[str, Any]) -> int:
    from slt_jax import language
    from slt_jax.models.restrict import head_names

    def told(name: str, result: Any) -> None:
        if not command.quiet:
            print(f"{name}: {result.llc:.4g}, {result.verdict}", file=sys.stderr)
        if command.out is not None:
            result.save(command.out / f"{name.replace(' ', '-')}.zarr")

    if command.out is not None:
        command.out.mkdir()
    found = language.refined(case.posterior, case.data, head_names(case.posterior.center), told=told, **options)
    if command.json:
        print(json.dumps({name: result.to_dict() for name, result in found.items()}, indent=1))
    else:
        print(*language.table(found), sep="\n")
    return 0


if __name__ == "__main__":
    run()
