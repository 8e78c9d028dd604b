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
    """Folder for checkpoints, traces, table and picture. Checkpoints that are already there are reused."""
    smoke: bool = False
    """A much smaller run, to test the installation."""
    quiet: bool = False
    """No progress bars."""


@_option
class Sampling:
    """Options of all commands that sample a language model."""

    tokens: Path | None = None
    """Token ids: a .npy file, whose rows are sequences of their own if it has two dimensions, or raw little-endian
    .bin."""
    text: tuple[Path, ...] = ()
    """Or text files, which the checkpoint's tokenizer.json tokenizes; several are documents."""
    dataset: str | None = None
    """Or a Hugging Face data set: the folder of save_to_disk, or a name on the Hub."""
    column: str | None = None
    """Its column of text or of token ids; default input_ids, tokens, text, or the only one."""
    split: str = "train"
    """Its split."""
    documents: Literal["pack", "split", "pad"] | None = None
    """How documents become examples: pack puts them one after the other; split cuts each for itself and drops what is
    left; pad fills up what is left, and leaves the padding out of the loss. Default: rows of one length as they are,
    others packed."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Type of the ids in a .bin file; default uint16, unless the file may be of another."""
    seq_len: int | None = None
    """Tokens in one example; default the model's context length, or what the data have if that is less."""
    backend: Literal["jax", "torch"] = "jax"
    """jax: the reader of this library. torch: any causal language model of transformers, through torch (extra torch);
    its parts are named by its modules."""
    sampler: Literal["sgld", "preconditioned", "underdamped"] | None = None
    """The sampler. Default: underdamped, which needs the fewest steps; sgld, that of published work on language models,
    for sweep, trajectory and --heads."""
    chains: int = 4
    """Independent chains of each estimate, started at the checkpoint."""
    draws: int | None = None
    """Losses recorded in each chain; default 200, or for llc as many as --precision takes."""
    warmup: int | None = None
    """Steps before the first draw; default as many as draws."""
    thinning: int | None = None
    """Steps from one draw to the next; default 1, or 4 with --precision and where losses are observed."""
    batch_size: int = 32
    """Examples in the batch of a step, drawn with replacement, independently for each chain."""
    micro_batches: int = 1
    """Number of parts into which a batch is split in the forward and backward pass, to save memory."""
    bfloat16: bool = False
    """Run the model in bfloat16. The chains keep float32 weights."""
    seed: int = 0
    """The same seed gives the same numbers."""
    checkpoint_dir: Path | None = None
    """Save the state of the run in this folder. The same command resumes an interrupted run."""
    json: bool = False
    """Print the result as JSON on standard output."""
    quiet: bool = False
    """Print neither the plan nor a progress bar."""


@_option
class Llc(Sampling):
    """Estimate the LLC of a language model's checkpoint: GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2, Qwen3, Gemma,
    OLMo, Phi, Granite, SmolLM3, StableLM, Falcon, OPT and others; any of transformers with --backend torch."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with config.json and safetensors, a repository on the Hugging Face Hub (org/name, org/name@revision), or
    a checkpoint of the demo."""
    revision: str | None = None
    """Branch, tag or commit of the repository, such as step1000."""
    also: tuple[str, ...] = ()
    """Further data sets, NAME=FILE, whose losses are evaluated at the same draws (data-refined LLCs). Token files
    (.npy, .bin) or text."""
    only: str | None = None
    """Sample one part, with all other weights frozen: 'layer 3', 'layer 3 head 5', attention, mlp, embedding,
    unembedding, norms, 'layer 3 mlp', or several of them with commas."""
    heads: bool = False
    """Print a table of the refined LLCs of all heads: each head is sampled with all other weights frozen."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30, as in published work on language models."""
    localization: float | None = None
    """gamma, the strength of the pull to the trained weights; default 300, as in published work on language models."""
    step_size: float | None = None
    """The step size epsilon of the sampler; default calibrated."""
    precision: float | None = None
    """Go on until the standard error is this share of the LLC and no check asks for more steps. Default 0.03; none if
    --draws or another sampler than underdamped is given."""
    budget: int | None = None
    """With --precision, the most minibatch gradients in total; default ten times the budget of the library."""
    minutes: float | None = None
    """With --precision, the time after which no further steps are begun."""
    out: Path | None = None
    """Write the traces to this file (zarr); with --heads, one file for each head to this folder."""
    plot: Path | None = None
    """Write a picture to this file (png, pdf, svg): the traces, or with --heads a map of layers and heads."""


@_option
class SweepGrid(Sampling):
    """Estimate the LLC of a checkpoint over a grid of nbeta, localization and step size, and recommend a setting."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """As for llc."""
    revision: str | None = None
    """As for llc."""
    only: str | None = None
    """Sample one part, as for llc."""
    nbeta: tuple[float, ...] = ()
    """Values of n times the inverse temperature; default 30."""
    localization: tuple[float, ...] = ()
    """Values of gamma; default 300."""
    step_size: tuple[float, ...] = ()
    """Values of the step size epsilon of the sampler; default a calibrated one."""
    memory_gib: float | None = None
    """Memory limit in GiB of the process (on a CPU) or of each device; default all that is free."""
    out: Path | None = None
    """Write the sweep to this file (zarr)."""
    plot: Path | None = None
    """Write the heat maps to this file (png, pdf, svg)."""


@_option
class Course(Sampling):
    """Estimate the LLC at many checkpoints of one training run with one setting, and find the stages of training."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folders, as for llc, whose names end in the training step: step-100, checkpoint-2000. Or one repository."""
    revisions: tuple[str, ...] = ()
    """Revisions of the repository: step1000 step2000."""
    steps: tuple[int, ...] = ()
    """The training step of each checkpoint; default the number at the end of its name."""
    parts: tuple[str, ...] = ()
    """Parts whose refined LLCs are estimated as well: 'layer 0', 'layer 3 head 5', attention, ..."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30."""
    localization: float | None = None
    """gamma, the strength of the pull to each checkpoint's weights; default 300."""
    step_size: float | None = None
    """The step size epsilon of the sampler; default calibrated at the checkpoint with the largest curvature."""
    cold: bool = False
    """Start all chains at their checkpoint. By default they start at the displacement that the chains of the previous
    checkpoint ended with."""
    out: Path | None = None
    """Write the trajectory to this file (zarr)."""
    plot: Path | None = None
    """Write a picture of LLC and loss over training to this file (png, pdf, svg)."""


@_option
class Probing(Sampling):
    """Options of the commands that observe the losses of fixed examples."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """As for llc."""
    revision: str | None = None
    """As for llc."""
    probe: tuple[str, ...] = ()
    """Data sets whose losses are observed, NAME=FILE: token files (.npy, .bin) or text. Default: the data that are
    sampled with."""
    examples: int = 32
    """Examples taken from each of them, evenly spaced over the file."""
    nbeta: float | None = None
    """n times the inverse temperature; default 30. 0 is a control, whose draws do not know the data."""
    localization: float | None = None
    """gamma, the strength of the pull to the trained weights; default 300."""
    step_size: float | None = None
    """The step size epsilon of the sampler; default calibrated."""
    out: Path | None = None
    """Write the result to this file (zarr)."""
    plot: Path | None = None
    """Write the picture to this file (png, pdf, svg)."""
    page: Path | None = None
    """Write a page with tables, pictures and coloured texts to this file (html)."""


@_option
class Respond(Probing):
    """Estimate the susceptibility of each component of a language model to each token or example of a probe."""

    level: Literal["token", "example"] = "token"
    """Observe the loss of each predicted token, or of whole examples."""
    components: tuple[str, ...] = ("all",)
    """heads, layers, all (embedding, heads, MLPs), or parts by name as for llc --only: 'layer 3 head 5'."""
    estimator: Literal["two-chain", "one-chain"] = "two-chain"
    """two-chain, as published, also samples all weights; one-chain is the covariance within the component's draws."""
    show: str | None = None
    """The component whose strongest responses are on the page; default the most reliable one."""


@_option
class Influence(Probing):
    """Find which examples or tokens influence which others, by the covariance of their losses over the draws."""

    on: tuple[str, ...] = ()
    """Data sets whose losses are influenced, NAME=FILE; default the probe itself."""
    target: str = "0"
    """Whose strongest influences are shown: an example of --on (3), by the losses of whole examples, or one of its
    predicted tokens (3:17), by the losses of tokens. Both are numbered from 0."""
    only: str | None = None
    """Sample one part of the model, as for llc."""
    top: int = 10
    """How many that help, and that harm, are shown."""


@_option
class Planned:
    """Compile a run for TPUs or GPUs that are not at hand, and report what it would take: memory, chains that fit,
    exchange between devices, time. Nothing is sampled, and of the checkpoint only config.json is read."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """As for llc."""
    device: str
    """v5e:2x2, v5p:2x2x1, v6e:4x4 (TPUs by their topology), h100, h100x8, h200 (GPUs by their number). The compilers
    are the extras tpu-compiler and gpu-compiler, and run on any Linux machine."""
    revision: str | None = None
    """As for llc."""
    only: str | None = None
    """Sample one part, as for llc."""
    sampler: Literal["sgld", "preconditioned", "underdamped"] | None = None
    """As for llc."""
    chains: int | None = None
    """Independent chains, a multiple of the devices; default 4, or one on each device if those are more."""
    model: int = 1
    """Devices that share the weights of a chain."""
    draws: int | None = None
    """As for llc."""
    warmup: int | None = None
    """As for llc."""
    thinning: int | None = None
    """As for llc."""
    precision: float | None = None
    """As for llc."""
    budget: int | None = None
    """As for llc."""
    seq_len: int | None = None
    """Tokens in one example; default the model's context length."""
    examples: int = 100_000
    """Examples in the data set."""
    batch_size: int = 32
    """Examples in the batch of a step."""
    micro_batches: int = 1
    """Number of parts into which a batch is split, to save memory."""
    bfloat16: bool = False
    """Run the model in bfloat16. The chains keep float32 weights."""
    utilization: float = 0.4
    """Share of the device's peak arithmetic that is assumed for the time of a step."""
    json: bool = False
    """Print the plan as JSON."""
    quiet: bool = False
    """Print the plan alone."""


@_option
class Report:
    """Write one self-contained HTML page about a saved result, sweep, trajectory or susceptibilities."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.zarr")]
    """A file that llc, sweep, trajectory or susceptibilities wrote with --out."""
    out: Path | None = None
    """The HTML file; default the name of the run with .html."""
    overwrite: bool = False
    """Replace an existing page."""
    drift: float | None = None
    """For a trajectory: standard deviation of the LLC's change from one checkpoint to the next within a stage; default
    estimated. With 0 the LLC is constant within a stage."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Llc, tyro.conf.subcommand("llc")]
    | Annotated[SweepGrid, tyro.conf.subcommand("sweep")]
    | Annotated[Course, tyro.conf.subcommand("trajectory")]
    | Annotated[Respond, tyro.conf.subcommand("susceptibilities")]
    | Annotated[Influence, tyro.conf.subcommand("influence")]
    | Annotated[Planned, tyro.conf.subcommand("plan")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
