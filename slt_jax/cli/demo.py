"""The demo: a network whose LLC is known exactly, then the LLC of a small transformer along its training."""

import functools
import json
import math
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int32
from rich.console import Console
from rich.progress import track
from rich.table import Table

from slt_jax.estimators.llc import estimate_llc
from slt_jax.estimators.trajectory import trajectory
from slt_jax.models.decoder import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.hub import load_decoder, save_decoder
from slt_jax.posterior.flax import from_nnx
from slt_jax.posterior.local import LocalPosterior
from slt_jax.report.write import write_report
from slt_jax.results.llc import LLCResult
from slt_jax.results.text import MARKED, marked
from slt_jax.results.trajectory import Trajectory
from slt_jax.samplers.sgld import sgld


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is. ``FULL`` takes three to five minutes on two cores, ``SMOKE`` less than one."""

    config: DecoderConfig
    save_steps: tuple[int, ...]
    num_warmup: int
    num_draws: int
    num_chains: int = 4
    train_batch: int = 16
    sample_batch: int = 8
    num_files: int = 120
    truth_draws: int = 3000


FULL = DemoSize(DecoderConfig(256, 64, 128, 2, 4), (4, 9, 20, 33, 54, 88, 144, 234, 380, 610, 980), 50, 100)
SMOKE = DemoSize(DecoderConfig(256, 32, 32, 1, 2), (2, 8, 20), 20, 30, 2, 8, 8, 5, 300)
# Of picture and page. Without drift between boundaries: the LLC rises throughout this training.
PLOT_OPTIONS = {"unit": "nats per byte", "drift": 0.0}


def source_bytes(num_files: int, seq_len: int) -> Int32[np.ndarray, "example {seq_len}"]:
    """Bytes of the first ``num_files`` modules of Python's standard library, as examples of ``seq_len`` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:num_files]
    if not files:
        raise FileNotFoundError(f"no Python source in {sysconfig.get_path('stdlib')}; the demo trains on it.")
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    return text[: len(text) // seq_len * seq_len].reshape(-1, seq_len).astype(np.int32)


def known_truth(num_draws: int, show: bool) -> tuple[LLCResult, float]:
    """(estimate, exact value) for a full-rank deep linear network 4 -> 6 -> 3 at its teacher.

    The teacher has rank 3, so that the learning coefficient is 3 (4 + 3 - 3) / 2 = 6 with multiplicity 1 (Aoyagi,
    Neural Networks 172 (2024) 106132). The loss is 0.5 |error|^2. There is no label noise: w* is the exact minimum.
    """
    keys = jax.random.split(jax.random.key(7), 4)
    n = 20_000
    weights = {"first": jax.random.normal(keys[0], (4, 6)) / 2, "second": jax.random.normal(keys[1], (6, 3)) / 2}

    def output(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ p["first"] @ p["second"]

    x = jax.random.normal(keys[2], (n, 4))
    y = output(weights, x)

    def loss_fn(p: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return 0.5 * jnp.sum((output(p, batch[0]) - batch[1]) ** 2, axis=-1)

    posterior = LocalPosterior(loss_fn, weights, num_data=n, localization=1.0)
    result = estimate_llc(
        posterior, (x, y), sampler=sgld(2e-6), num_chains=4, num_draws=num_draws, num_warmup=4 * num_draws,
        thinning=32, batch_size=200, key=1, progress=show,
    )  # fmt: skip
    return result, 6.0


def train(size: DemoSize, data: np.ndarray, folder: Path, show: bool) -> list[Path]:
    """Train with Adam and save a checkpoint at each of ``size.save_steps``. Checkpoints already on disk are reused."""
    paths = [folder / f"step-{step:05d}" for step in size.save_steps]
    if all((p / "config.json").exists() for p in paths):
        return paths
    model = Decoder(size.config, rngs=nnx.Rngs(0))
    last = size.save_steps[-1]
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, min(50, last // 2), last, 3e-4)
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)
    tokens = jnp.asarray(data)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def update(model: Decoder, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        batch = tokens[jax.random.randint(key, (size.train_batch,), 0, len(tokens))]
        loss, grads = nnx.value_and_grad(lambda m: m.losses(batch).mean())(model)
        optimizer.update(model, grads)
        return loss

    console = Console(stderr=True)
    steps = range(1, last + 1)
    for step in track(steps, "training  ", console=console, disable=not (show and console.is_terminal), transient=True):
        update(model, optimizer, jax.random.fold_in(jax.random.key(0), step))
        if step in size.save_steps:
            target = folder / f"step-{step:05d}"
            if not (target / "config.json").exists():
                shutil.rmtree(target, ignore_errors=True)
                save_decoder(target, model, {"step": step})
    return paths


def run_demo(out: Path, *, smoke: bool = False, show: bool = True) -> list[dict]:
    """Run ``slt-jax demo`` and return the rows of its table."""
    size, console, began = SMOKE if smoke else FULL, Console(), time.monotonic()
    folder = out / "smoke" if smoke else out
    folder.mkdir(parents=True, exist_ok=True)
    result, truth = known_truth(size.truth_draws, show)
    console.print(
        f"Known truth: full-rank deep linear network 4-6-3: LLC "
        f"{marked(f'{result.llc:.2f} ± {result.llc_stderr:.2f}', result.verdict)}, exact "
        f"value {truth:g} ({result.verdict})",
        soft_wrap=True,
    )
    data = source_bytes(size.num_files, size.config.context_length)
    paths = train(size, data, folder / "checkpoints", show)
    opened = [load_decoder(path) for path in paths]
    pairs = {record["step"]: from_nnx(model, sequence_loss) for model, record in opened}
    centers = {step: params for step, (params, _) in pairs.items()}
    params, loss_fn = pairs[max(pairs)]
    posterior = LocalPosterior(loss_fn, params, num_data=len(data), nbeta=30.0, localization=300.0)
    console.print(
        f"[dim]A small transformer, at {len(centers)} steps of its training: {size.num_chains} chains each, with "
        f"{size.num_warmup} warm-up steps and {size.num_draws} draws[/dim]", soft_wrap=True,
    )  # fmt: skip
    course = trajectory(
        posterior, centers, data, sampler=sgld(5e-4), num_chains=size.num_chains, num_draws=size.num_draws,
        num_warmup=size.num_warmup, batch_size=size.sample_batch, progress=show,
    )  # fmt: skip
    saved = course.save(folder / "trajectory.zarr", overwrite=True)
    picture, page = folder / "llc-over-training.png", folder / "report.html"
    course.plot(picture, **PLOT_OPTIONS)
    write_report(saved, page, overwrite=True, **PLOT_OPTIONS)
    estimates = zip(course.steps, course.results["all"], strict=True)
    rows = [{"step": step, "loss": result.init_loss, **result.to_dict()} for step, result in estimates]
    (folder / "table.json").write_text(json.dumps(rows, indent=1))
    _print_table(console, rows)
    _print_stages(console, course)
    console.print(
        f"Picture: {picture}\nReport: {page}\n"
        f"Took {time.monotonic() - began:.0f} s.", soft_wrap=True,
    )  # fmt: skip
    return rows


def _print_stages(console: Console, course: Trajectory) -> None:
    """The boundaries drawn in the picture, with their intervals."""
    if (stages := course.stages_of("all", PLOT_OPTIONS["drift"])) is None:
        return
    for b in stages.boundaries:
        console.print(
            f"Stage boundary near step {b.step:.0f} ({stages.level:.0%}: {b.low:g} to {b.high:g}): the LLC moves by "
            f"{b.jump:+.3g} ± {b.jump_stderr:.2g}.", soft_wrap=True, highlight=False,
        )  # fmt: skip


def _print_table(console: Console, rows: list[dict]) -> None:
    table = Table(title="A byte-level transformer learning Python (nbeta 30, localization 300)")
    for name in ("step", "loss", "LLC ± standard error", "R-hat", "ESS", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right")
    number = lambda x, form: format(math.nan if x is None else x, form)  # noqa: E731
    for r in rows:
        llc = marked(f"{number(r['llc'], '.2f')} ± {number(r['llc_stderr'], '.2f')}", r["verdict"])
        table.add_row(
            str(r["step"]), f"{r['loss']:.3f}", llc, number(r["rhat"], ".3f"), number(r["ess"], ".0f"), r["verdict"]
        )
    table.caption = MARKED if any(r["verdict"] != "converged" for r in rows) else None
    console.print(table)
    sys.stdout.flush()
