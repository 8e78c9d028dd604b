"""Language models on the command line: a checkpoint with its data, the plan of a run, tables of refined LLCs."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from slt_jax.calibration.effort import default_budget
from slt_jax.cli.documents import Documents
from slt_jax.cli.inputs import Read, Reader
from slt_jax.estimators.llc import estimate_llc
from slt_jax.estimators.precision import round_budgets
from slt_jax.models.decoder import sequence_loss
from slt_jax.models.hub import folder_of, load_checkpoint
from slt_jax.models.restrict import restricted
from slt_jax.models.torch_checkpoint import load_torch_checkpoint
from slt_jax.posterior.flax import from_nnx
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.results.text import marked
from slt_jax.results.trajectory import Trajectory

NBETA, LOCALIZATION = 30.0, 300.0  # the values in published work on language models


Backend = Literal["jax", "torch"]


class Model(NamedTuple):
    """Weights and loss of a language model, and the limits of its data."""

    params: PyTree
    loss_fn: Callable[[PyTree, PyTree], Array]
    vocab_size: int | None
    context_length: int | None


@dataclass(frozen=True)
class Case:
    """A checkpoint, its data, and the posterior around it.

    ``length``: tokens in one example. ``given``: the settings of the posterior that the user gave, by name. ``also``:
    further data sets by name. ``vocab_size``: None if it is not known.
    """

    posterior: LocalPosterior
    data: Any
    length: int
    given: frozenset[str]
    also: dict[str, Any]
    vocab_size: int | None = None


def load_model(checkpoint: str | os.PathLike, backend: Backend = "jax", revision: str | None = None) -> Model:
    """A checkpoint by the reader of this library, or by transformers and torch.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load_checkpoint`` and ``load_torch_checkpoint``.
    """
    if backend == "torch":
        return Model(*load_torch_checkpoint(checkpoint, revision=revision))
    model, _ = load_checkpoint(checkpoint, revision=revision)
    return Model(*from_nnx(model, sequence_loss), model.config.vocab_size, model.config.context_length)


def open_case(
    checkpoint: str | os.PathLike,
    *,
    tokens: Path | None = None,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    column: str | None = None,
    split: str = "train",
    documents: Documents | None = None,
    dtype: str | None = None,
    seq_len: int | None = None,
    nbeta: float | None = None,
    localization: float | None = None,
    bfloat16: bool = False,
    also: Mapping[str, Path] | None = None,
    backend: Backend = "jax",
    revision: str | None = None,
) -> Case:
    """Read checkpoint and data, so that what is wrong with them is reported before anything is sampled.

    Args:
        checkpoint: a folder or a repository's name, see ``load_checkpoint``.
        tokens: a ``.npy`` or raw ``.bin`` file of token ids; or
        text: text files, which the ``tokenizer.json`` of the checkpoint tokenizes; or
        dataset: a folder or the name of a Hugging Face data set, of which a ``column`` of a ``split`` is used.
        documents: how documents become examples, see ``documents.arranged``. Default: rows of one length as they are,
            others packed.
        dtype: of a ``.bin`` file.
        seq_len: tokens in one example; default the model's context length, or what the data have if that is less.
        nbeta, localization: default ``NBETA`` and ``LOCALIZATION``.
        bfloat16: run the model in bfloat16.
        also: further data sets: token files (.npy, .bin) or text.
        backend, revision: as for ``load_model``.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load_model`` and ``Reader``; or not one kind of data is given.
    """
    given_data = [name for name, value in {"--tokens": tokens, "--text": text, "--dataset": dataset}.items() if value]
    if len(given_data) != 1:
        also_given = f", not with {' and '.join(given_data)} together" if given_data else ""
        raise ValueError(f"give the data with either --tokens FILE or --text FILE or --dataset NAME{also_given}.")
    model = load_model(checkpoint, backend, revision)

    def folder() -> Path:
        return folder_of(checkpoint, revision)

    reader = Reader(folder, seq_len, model.context_length, model.vocab_size, dtype, documents, column, split)
    data, length = _read(reader, tokens, text, dataset)
    others = {name: reader.any_file(file)[0] for name, file in (also or {}).items()}
    posterior = LocalPosterior(
        model.loss_fn, model.params, data.num_data, NBETA if nbeta is None else nbeta,
        LOCALIZATION if localization is None else localization, forward_dtype=jnp.bfloat16 if bfloat16 else None,
        chance_loss=math.log(model.vocab_size) if model.vocab_size and model.vocab_size > 1 else None,
    )  # fmt: skip
    given = {name for name, value in {"nbeta": nbeta, "localization": localization}.items() if value is not None}
    return Case(posterior, data, length, frozenset(given), others, model.vocab_size)


def folder_of_tokenizer(checkpoint: str | os.PathLike, revision: str | None) -> Path | None:
    """The folder of a checkpoint, which was read before; None where it has none."""
    try:
        return folder_of(checkpoint, revision)
    except (OSError, ValueError, ImportError):
        return None


def _read(reader: Reader, tokens: Path | None, text: Sequence[Path], dataset: str | None) -> Read:
    if tokens is not None:
        return reader.tokens(tokens)
    return reader.text(text) if dataset is None else reader.dataset(dataset)


def plan_of(case: Case, free: LocalPosterior, options: dict[str, Any]) -> list[str]:
    """Lines that describe the run before it starts: its size, its cost, and where each setting comes from.

    Args:
        free: the posterior that is sampled: that of the case, or its restriction to a part.
        options: of ``estimate_llc``.
    """
    weights = sum(x.size for x in jax.tree.leaves(case.posterior.center))
    batch_size = options["batch_size"]
    step_size = options["sampler"].step_size
    source = {name: "given" if name in case.given else "as published" for name in ("nbeta", "localization")}
    return [
        f"model: {weights:,} weights, {free.num_free:,} of them free",
        f"data: {free.num_data:,} examples of {case.length} tokens, {batch_size} a step"
        + "".join(f"; also {name}: {other.num_data:,}" for name, other in case.also.items()),
        _length_of(case, free, options),
        f"nbeta {free.nbeta:g} ({source['nbeta']}), localization {free.localization:g} ({source['localization']}), "
        f"step_size {'calibrated' if step_size is None else f'{step_size:g} (given)'}",
        f"one copy of the weights that move: {4 * free.num_free / 2**20:,.1f} MiB",
    ]


def _length_of(case: Case, free: LocalPosterior, options: dict[str, Any]) -> str:
    chains, draws = options["num_chains"], options["num_draws"]
    tokens = options["batch_size"] * case.length
    if (target := options.get("target_error")) is not None:
        first, most = round_budgets(default_budget(free.num_free), options["budget"])
        text = f"run: {chains} chains, until the error is {target:.1%} of the LLC: {first:,} gradients first, at most "
        text += f"{most:,}, of {tokens:,} tokens each"
        return text if options["minutes"] is None else f"{text}; {options['minutes']:g} minutes"
    warmup = draws if options["num_warmup"] is None else options["num_warmup"]
    steps = warmup + draws * options["thinning"]
    gradients = chains * steps
    return (
        f"run: {chains} chains of {warmup} + {steps - warmup} steps, {gradients:,} gradients, {gradients * tokens:,} "
        "tokens"
    )


def refined(
    posterior: LocalPosterior,
    data: Any,
    names: list[str],
    *,
    on_result: Callable[[str, LLCResult], None] | None = None,
    **options: Any,
) -> dict[str, LLCResult]:
    """The LLC of each named part with all other weights frozen (weight-refined LLCs).

    All parts of one shape share one compiled program.

    Args:
        posterior: over the complete decoder.
        names: of the parts, see ``slt_jax.models.restrict``.
        on_result: called with each name and result as soon as it is there.
        options: of ``estimate_llc``.
    """
    results = {}
    for name in names:
        results[name] = estimate_llc(restricted(posterior, name), data, **options)
        if on_result is not None:
            on_result(name, results[name])
    return results


def table(results: dict[str, LLCResult]) -> Iterator[str]:
    """Lines of Markdown: a row for each part, with a column for each further data set."""
    names = list(next(iter(results.values())).also) if results else []
    others = (f"on {name}, raw" for name in names)
    yield f"| {' | '.join(['part', 'weights', 'LLC ± standard error', *others, 'R-hat', 'verdict'])} |"
    yield "|---" * (5 + len(names)) + "|"
    for part, result in results.items():
        values = [f"{x.llc:.3g} ± {x.llc_stderr:.2g}" for x in (result, *result.also.values())]
        values[0] = marked(values[0], result.verdict)
        numbers = f"{result.settings.num_free:,} | {' | '.join(values)} | {result.health.rhat:.3f}"
        yield f"| {part} | {numbers} | {result.verdict} |"


def course_table(course: Trajectory) -> Iterator[str]:
    """Lines of Markdown: a row for each checkpoint and part."""
    yield "| step | part | LLC ± standard error | loss at w* | R-hat | verdict |"
    yield "|---" * 6 + "|"
    for index, step in enumerate(course.steps):
        for part, results in course.results.items():
            result = results[index]
            numbers = f"{result.llc:.4g} ± {result.llc_stderr:.2g} | {result.init_loss:.4g}"
            yield f"| {step} | {part} | {numbers} | {result.health.rhat:.3f} | {result.verdict} |"
