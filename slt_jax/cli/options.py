"""The commands of ``slt-jax`` and their options, as ``--help`` shows them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

_option = dataclasses.dataclass(frozen=True, kw_only=True)


@_option
class Demo:
    """Train a small transformer on Python's own source and estimate its LLC along training (a few minutes)."""

    out: Path = Path("demo-run")
    """Folder for checkpoints, traces, table and picture; trained checkpoints found there are reused."""
    smoke: bool = False
    """A much smaller run, to see that everything works."""
    quiet: bool = False
    """No progress bars."""


@_option
class Sampling:
    """What all commands that sample a language model take."""

    tokens: Path | None = None
    """Token ids: a one-dimensional .npy file, or raw little-endian .bin."""
    text: Path | None = None
    """Or a text file, for the checkpoint's tokenizer.json."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids in a .bin file."""
    seq_len: int | None = None
    """Tokens in one example; default the model's context length."""
    sampler: Literal["sgld", "preconditioned", "underdamped"] = "sgld"
    """How a step moves. The default is what published work on language models uses."""
    chains: int = 4
    """Independent chains of each estimate, started at the checkpoint."""
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
    checkpoint_dir: Path | None = None
    """Keep the run's state here; the same command resumes an interrupted run."""
    json: bool = False
    """Print the result as JSON on standard output."""
    quiet: bool = False
    """No plan and no progress bar."""


@_option
class Llc(Sampling):
    """Estimate the LLC of a language model's checkpoint: GPT-2, GPT-NeoX (Pythia), Llama, Qwen2, Qwen3."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with config.json and safetensors, a repository on the Hugging Face Hub, or a checkpoint of the demo."""
    also: tuple[str, ...] = ()
    """Further data sets, NAME=FILE: their losses are read at the same draws (data-refined LLCs). Token files (.npy,
    .bin) or text."""
    only: str | None = None
    """Sample only a part: 'layer 3', 'layer 3 head 5', attention, mlp, embedding, unembedding, norms, 'layer 3 mlp', or
    several with commas."""
    heads: bool = False
    """A table of the refined LLCs of all heads, each with the rest held fast."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30, what published work on language models uses."""
    localization: float | None = None
    """gamma, the pull to the trained weights; default 300, what published work on language models uses."""
    step_size: float | None = None
    """The sampler's epsilon; default calibrated."""
    out: Path | None = None
    """Write the traces here (zarr); with --heads a folder with one for each."""
    plot: Path | None = None
    """Write a picture here (png, pdf, svg): of the traces, or with --heads a map of layers and heads."""


@_option
class SweepGrid(Sampling):
    """Estimate the LLC of a checkpoint over a grid of nbeta, localization and step size, and say which to take."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """As for llc."""
    only: str | None = None
    """Sample only a part, as for llc."""
    nbeta: tuple[float, ...] = ()
    """Values of n times the inverse temperature; default 30 alone."""
    localization: tuple[float, ...] = ()
    """Values of gamma; default 300 alone."""
    step_size: tuple[float, ...] = ()
    """Values of the sampler's epsilon; default one, calibrated."""
    memory_gib: float | None = None
    """GiB that the process (on a CPU) or each device may take; default all there is."""
    out: Path | None = None
    """Write everything here (zarr)."""
    plot: Path | None = None
    """Write the heat maps here (png, pdf, svg)."""


@_option
class Course(Sampling):
    """Estimate the LLC at many checkpoints of one training run with one setting, and find the stages of training."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folders, as for llc, whose names end in the training step: step-100, checkpoint-2000."""
    parts: tuple[str, ...] = ()
    """Parts whose refined LLCs are estimated too: 'layer 0', 'layer 3 head 5', attention, ..."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30."""
    localization: float | None = None
    """gamma; default 300."""
    step_size: float | None = None
    """The sampler's epsilon; default calibrated at the checkpoint whose loss is curved most."""
    cold: bool = False
    """Start all chains at their checkpoint, not as far from it as those of the checkpoint before ended."""
    out: Path | None = None
    """Write everything here (zarr)."""
    plot: Path | None = None
    """Write LLC and loss over training here (png, pdf, svg)."""


@_option
class Report:
    """Write one self-contained HTML page about a saved result, sweep or trajectory."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.zarr")]
    """What llc, sweep or trajectory wrote with --out."""
    out: Path | None = None
    """The page; default the run's name with .html."""
    overwrite: bool = False
    """Replace a page that exists."""
    drift: float | None = None
    """Of a trajectory: how far its level may drift within a stage, per checkpoint; default found. 0: in steps alone."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Llc, tyro.conf.subcommand("llc")]
    | Annotated[SweepGrid, tyro.conf.subcommand("sweep")]
    | Annotated[Course, tyro.conf.subcommand("trajectory")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
