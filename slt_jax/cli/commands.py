"""The command line: ``slt-jax demo | llc | sweep | trajectory | report``.

Exit codes: 0 done; 2 input that cannot be used; 3 no chain stayed finite; 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from slt_jax.cli.options import Command, Course, Demo, Llc, Report, Sampling, SweepGrid
from slt_jax.cli.program_cache import keep_programs

_INTERRUPTED = 130


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
    keep_programs()
    try:
        return _DOES[type(command)](command)
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
    from slt_jax.cli.demo import run_demo

    run_demo(command.out, smoke=command.smoke, show=not command.quiet)
    return 0


def _llc(command: Llc) -> int:
    import slt_jax as slt
    from slt_jax.cli import language
    from slt_jax.models.restrict import restricted

    _check_outputs(command)
    _check_together(command)
    case = language.open_case(
        command.checkpoint, **_reading(command), nbeta=command.nbeta, localization=command.localization,
        also=_named(command.also),
    )  # fmt: skip
    options = {**_options(command, command.step_size), "also": case.also}
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    if not command.quiet:
        print(*language.plan_of(case, posterior, options), sep="\n", file=sys.stderr)
    if command.heads:
        return _heads(command, case, options)
    result = slt.estimate_llc(
        posterior, case.data, checkpoint_dir=command.checkpoint_dir, progress=not command.quiet, **options
    )
    _deliver(command, result)
    return 3 if result.verdict == "diverged" and not len(result.kept_chains) else 0


def _named(also: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in also:
        name, sign, file = text.partition("=")
        if not (name and sign and file) or name in found:
            raise ValueError(f"--also takes NAME=FILE, each name once, got {text!r}. Write --also code=code.npy.")
        found[name] = Path(file)
    return found


def _check_outputs(command: Any) -> None:
    """Raise OSError where a file that is to be written cannot be: before anything is sampled."""
    for path in (command.out, command.plot):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists. Remove it, or give another path.")
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise PermissionError(f"{path.absolute().parent} is not a folder that can be written to.")


def _options(command: Sampling, step_size: float | None) -> dict[str, Any]:
    """What all estimates take."""
    import slt_jax as slt

    samplers = {"sgld": slt.sgld, "preconditioned": slt.preconditioned_sgld, "underdamped": slt.underdamped}
    return {
        "sampler": samplers[command.sampler](step_size), "num_chains": command.chains, "num_draws": command.draws,
        "num_warmup": command.warmup, "thinning": command.thinning, "batch_size": command.batch_size,
        "micro_batches": command.micro_batches, "key": command.seed,
    }  # fmt: skip


def _deliver(command: Any, found: Any) -> None:
    """Print, save and draw what was found."""
    print(json.dumps(found.to_dict(), indent=1) if command.json else found)
    if command.out is not None:
        found.save(command.out)
    if command.plot is not None:
        found.plot(command.plot)


def _sweep(command: SweepGrid) -> int:
    import slt_jax as slt
    from slt_jax.cli import language
    from slt_jax.models.restrict import restricted
    from slt_jax.results.sweep import table_of

    _check_outputs(command)
    case = language.open_case(command.checkpoint, **_reading(command))
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    options = _options(command, None)
    axes = {name: getattr(command, name) or None for name in ("nbeta", "localization", "step_size")}
    if not command.quiet:
        print(*language.plan_of(case, posterior, options)[:2], sep="\n", file=sys.stderr)
    found = slt.sweep(
        posterior, case.data, **axes, **options, memory_gib=command.memory_gib, progress=not command.quiet,
        checkpoint_dir=command.checkpoint_dir,
    )  # fmt: skip
    if not command.json:
        print(*table_of(found), "", sep="\n")
    _deliver(command, found)
    return 3 if found.dataset.diverged.values.all() else 0


def _trajectory(command: Course) -> int:
    import slt_jax as slt
    from slt_jax.cli import language

    _check_outputs(command)
    case, centers = language.open_course(
        command.checkpoints, **_reading(command), nbeta=command.nbeta, localization=command.localization
    )
    options = _options(command, command.step_size)
    if not command.quiet:
        print(*language.plan_of(case, case.posterior, options)[:2], sep="\n", file=sys.stderr)
    found = slt.trajectory(
        case.posterior, centers, case.data, parts=command.parts, warm_start=not command.cold, **options,
        progress=not command.quiet, checkpoint_dir=command.checkpoint_dir,
    )  # fmt: skip
    _deliver(command, found)
    return 3 if all(not len(r.kept_chains) for r in found.results["all"]) else 0


def _reading(command: Sampling) -> dict[str, Any]:
    """What says how data and model are read."""
    return {name: getattr(command, name) for name in ("tokens", "text", "dtype", "seq_len", "bfloat16")}


def _report(command: Report) -> int:
    from slt_jax.report.write import write_report

    out = command.out or command.run.with_suffix(".html")
    shown = {} if command.drift is None else {"drift": command.drift}
    print(write_report(command.run, out, overwrite=command.overwrite, **shown))
    return 0


def _check_together(command: Llc) -> None:
    alone = {"--only": command.only, "--checkpoint-dir": command.checkpoint_dir}
    if command.heads and (given := [name for name, value in alone.items() if value is not None]):
        raise ValueError(f"--heads makes a table of many results and takes no {', '.join(given)}. Leave it out.")


def _heads(command: Llc, case: Any, options: dict[str, Any]) -> int:
    from slt_jax.cli import language
    from slt_jax.models.restrict import head_names
    from slt_jax.report.heatmaps import plot_heads

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
    if command.plot is not None:
        plot_heads(found, command.plot)
    return 0


_DOES: dict[type, Callable[[Any], int]] = {
    Demo: _demo, Llc: _llc, SweepGrid: _sweep, Course: _trajectory, Report: _report,
}  # fmt: skip
