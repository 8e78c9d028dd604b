"""Language models on the command line: reading checkpoints and tokens, the plan of a run, tables of refined LLCs."""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Integer

from slt_jax.estimators.llc import estimate_llc
from slt_jax.models.decoder import Decoder
from slt_jax.models.hub import load_checkpoint
from slt_jax.models.restrict import restricted
from slt_jax.posterior.data import Source, as_source
from slt_jax.posterior.files import token_file
from slt_jax.posterior.flax import from_nnx
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.results.text import marked

NBETA, LOCALIZATION = 30.0, 300.0  # the values in published work on language models


@dataclass(frozen=True)
class Case:
    """A checkpoint, its data, and the posterior around it.

    ``length``: tokens in one example. ``given``: the settings of the posterior that the user gave, by name. ``also``:
    further data sets by name.
    """

    model: Decoder
    posterior: LocalPosterior
    data: Any
    length: int
    given: frozenset[str]
    also: dict[str, Any]


def model_losses(model: Decoder, batch: Integer[Array, "batch length"]) -> Float32[Array, " batch"]:
    return model.losses(batch)


def open_case(
    checkpoint: str | os.PathLike,
    *,
    tokens: Path | None = None,
    text: Path | None = None,
    dtype: str = "uint16",
    seq_len: int | None = None,
    nbeta: float | None = None,
    localization: float | None = None,
    bfloat16: bool = False,
    also: Mapping[str, Path] | None = None,
) -> Case:
    """Read checkpoint and data, so that what is wrong with them is reported before anything is sampled.

    Args:
        checkpoint: a folder or a repository's name, see ``load_checkpoint``.
        tokens: a one-dimensional ``.npy`` or raw ``.bin`` file of token ids; or
        text: a text file, which the ``tokenizer.json`` in the checkpoint's folder tokenizes.
        dtype: of a ``.bin`` file, uint16 or uint32.
        seq_len: tokens in one example; default the model's context length.
        nbeta, localization: default ``NBETA`` and ``LOCALIZATION``.
        bfloat16: run the model in bfloat16.
        also: further data sets: token files (.npy, .bin) or text.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load_checkpoint`` and ``token_file``; or tokens and text are
            both given, or neither.
    """
    if tokens is not None and text is not None:
        raise ValueError("give the data with either --tokens FILE or --text FILE, not both.")
    model, _ = load_checkpoint(checkpoint)
    length = model.config.context_length if seq_len is None else seq_len

    def read_text(file: Path) -> Source:
        return as_source(tokenized(Path(checkpoint), file, length))

    def read_tokens(file: Path) -> Source:
        return token_file(file, length, dtype=dtype, vocab_size=model.config.vocab_size)

    if tokens is not None:
        data = read_tokens(tokens)
    elif text is not None:
        data = read_text(text)
    else:
        raise ValueError("give the data with either --tokens FILE or --text FILE.")
    others = {
        name: read_tokens(file) if file.suffix in (".npy", ".bin") else read_text(file)
        for name, file in (also or {}).items()
    }
    params, loss_fn = from_nnx(model, model_losses)
    forward = jnp.bfloat16 if bfloat16 else None
    posterior = LocalPosterior(
        loss_fn, params, data.num_data, NBETA if nbeta is None else nbeta,
        LOCALIZATION if localization is None else localization, forward_dtype=forward,
    )  # fmt: skip
    given = {name for name, value in {"nbeta": nbeta, "localization": localization}.items() if value is not None}
    return Case(model, posterior, data, length, frozenset(given), others)


def open_course(checkpoints: Sequence[str], **options: Any) -> tuple[Case, dict[int, Callable[[], Any]]]:
    """(the case of the first checkpoint, training step -> function that loads the parameters).

    Args:
        checkpoints: folders of one model, whose names end in the training step.
        options: of ``open_case``.

    Raises:
        ValueError: no checkpoints, a name without a number, or two names with the same number.
        FileNotFoundError, ValueError, ImportError: as ``open_case``.
    """
    if not checkpoints:
        raise ValueError("a trajectory needs checkpoints: step-100 step-1000 step-10000.")
    paths: dict[int, str] = {}
    for checkpoint in checkpoints:
        number = re.search(r"(\d+)\D*$", Path(checkpoint).name)
        if number is None:
            raise ValueError(f"the name of {checkpoint} has no training step. Name it step-100.")
        if (step := int(number[1])) in paths:
            raise ValueError(f"{paths[step]} and {checkpoint} both say that they are of step {step}. Leave one out.")
        paths[step] = checkpoint
    case = open_case(paths[min(paths)], **options)
    return case, {step: functools.partial(_load_params, path) for step, path in paths.items()}


def _load_params(checkpoint: str) -> Any:
    return from_nnx(load_checkpoint(checkpoint)[0], model_losses)[0]


def tokenized(checkpoint: Path, text: Path, length: int) -> Int32[np.ndarray, "example {length}"]:
    """The tokens of a text file by the checkpoint's tokenizer, cut into examples; a shorter remainder is dropped.

    Raises:
        FileNotFoundError: the checkpoint has no tokenizer.json.
        ImportError: ``tokenizers`` is not installed.
        ValueError: the text has fewer than two examples.
    """
    tokenizer = checkpoint / "tokenizer.json"
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{checkpoint} has no tokenizer.json. Give token ids with --tokens FILE.")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("--text needs the package tokenizers: pip install 'slt-jax[hf]'.") from error
    ids = Tokenizer.from_file(str(tokenizer)).encode(text.read_text(), add_special_tokens=False).ids
    rows = len(ids) // length
    if rows < 2:
        raise ValueError(f"{text} has {len(ids)} tokens, fewer than two examples of {length}. Give more, or --seq-len.")
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def plan_of(case: Case, free: LocalPosterior, options: dict[str, Any]) -> list[str]:
    """Lines that describe the run before it starts: its size, its cost, and where each setting comes from.

    Args:
        free: the posterior that is sampled: that of the case, or its restriction to a part.
        options: of ``estimate_llc``.
    """
    weights = sum(x.size for x in jax.tree.leaves(case.posterior.center))
    chains, draws, batch_size = (options[name] for name in ("num_chains", "num_draws", "batch_size"))
    warmup = draws if options["num_warmup"] is None else options["num_warmup"]
    steps = warmup + draws * options["thinning"]
    step_size = options["sampler"].step_size
    source = {name: "given" if name in case.given else "as published" for name in ("nbeta", "localization")}
    return [
        f"model: {weights:,} weights, {free.num_free:,} of them free",
        f"data: {free.num_data:,} examples of {case.length} tokens, {batch_size} a step"
        + "".join(f"; also {name}: {other.num_data:,}" for name, other in case.also.items()),
        f"run: {chains} chains of {warmup} + {steps - warmup} steps, {chains * steps:,} gradients, "
        f"{chains * steps * batch_size * case.length:,} tokens",
        f"nbeta {free.nbeta:g} ({source['nbeta']}), localization {free.localization:g} ({source['localization']}), "
        f"step_size {'calibrated' if step_size is None else f'{step_size:g} (given)'}",
        f"one copy of the weights that move: {4 * free.num_free / 2**20:,.1f} MiB",
    ]


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
