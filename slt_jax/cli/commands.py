"""The command line: ``slt-jax demo | llc | sweep | trajectory | susceptibilities | influence | plan | report``, and
--version.

Exit codes: 0 success; 2 unusable input; 3 no chain stayed finite; 130 interrupted (with the result so far, if any).
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from slt_jax._checks import check_count, check_positive
from slt_jax.cli.keyboard import keep_interrupts
from slt_jax.cli.options import (
    Command,
    Course,
    Demo,
    Influence,
    Llc,
    Planned,
    Probing,
    Report,
    Respond,
    Sampling,
    SweepGrid,
)
from slt_jax.cli.program_cache import keep_programs
from slt_jax.cli.wording import in_options, result_in_options
from slt_jax.machine import versions

_INTERRUPTED = 130
_DRAWS, _PRECISION = 200, 0.03  # by default


def run() -> None:
    """The command ``slt-jax``."""
    keep_interrupts()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == _INTERRUPTED:  # a program that still runs on the device can crash Python while it shuts down
        os._exit(code)
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    if (sys.argv[1:] if argv is None else argv)[:1] == ["--version"]:
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    command = tyro.cli(
        Command, args=argv, prog="slt-jax",
        description="Local learning coefficients of neural networks, with error bars. --version prints the version.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    _use_all_cores()
    if not isinstance(command, Planned):  # which says how long compiling takes
        keep_programs()
    try:
        return _COMMANDS[type(command)](command)
    except KeyboardInterrupt:
        return _interrupted(command)
    except (ValueError, TypeError, FloatingPointError, ImportError, OSError, MemoryError) as error:
        print(f"error: {in_options(str(error))}", file=sys.stderr)
        return 2


def _interrupted(command: Any) -> int:
    resume = " The same command resumes it." if getattr(command, "checkpoint_dir", None) else ""
    print(f"interrupted.{resume}", file=sys.stderr)
    return _INTERRUPTED


def _use_all_cores() -> None:
    """On a CPU, one JAX device per core, so that chains run side by side."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", cores)
        except RuntimeError:
            pass  # JAX has already been used in this process: the number of its devices cannot change


def _demo(command: Demo) -> int:
    from slt_jax.cli.demo import run_demo

    run_demo(command.out, smoke=command.smoke, show=not command.quiet)
    return 0


def _llc(command: Llc) -> int:
    import slt_jax as slt
    from slt_jax.cli import language
    from slt_jax.estimators.request import Request
    from slt_jax.models.restrict import head_names, restricted

    _check_outputs(command)
    _check_numbers(command)
    _check_heads(command)
    case = language.open_case(
        command.checkpoint, **_input_options(command), nbeta=command.nbeta, localization=command.localization,
        also=_files_by_name(command.also),
    )  # fmt: skip
    heads = head_names(case.posterior.center) if command.heads else []
    options = {**_estimator_options(command, command.step_size), **_precision(command), "also": case.also}
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    Request.checked(posterior, case.data, **options)
    if not command.quiet:
        print(*language.plan_of(case, posterior, options), sep="\n", file=sys.stderr)
    if command.heads:
        return _heads(command, case, heads, options)
    result = slt.estimate_llc(
        posterior, case.data, checkpoint_dir=command.checkpoint_dir, progress=not command.quiet, **options
    )
    _output(command, result, interrupted=result.interrupted)
    if result.interrupted:
        return _interrupted(command)
    return 3 if result.verdict == "diverged" and not len(result.kept_chains) else 0


def _files_by_name(also: tuple[str, ...], option: str = "--also") -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in also:
        name, sign, file = text.partition("=")
        if not (name and sign and file) or name in files:
            raise ValueError(f"{option} takes NAME=FILE, each name once, got {text!r}. Write {option} code=code.npy.")
        files[name] = Path(file)
    return files


def _check_outputs(command: Any) -> None:
    """Raise OSError if an output file exists or cannot be written. Called before anything is sampled."""
    for path in (command.out, command.plot, getattr(command, "page", None)):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists. Remove it, or give another path.")
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise PermissionError(f"{path.absolute().parent} is not a folder that can be written to.")


def _check_numbers(command: Sampling | Planned) -> None:
    """Raise TypeError or ValueError for a number that no run can have. Called before a checkpoint is read."""
    least = {"chains": 1, "draws": 1, "warmup": 0, "thinning": 1, "batch_size": 1, "micro_batches": 1, "seq_len": 2,
             "budget": 1, "examples": 1, "top": 1}  # fmt: skip
    for name, smallest in least.items():
        if (value := getattr(command, name, None)) is not None:
            check_count(f"--{name.replace('_', '-')}", value, smallest)
    for name in ("nbeta", "localization", "step_size", "precision", "minutes"):
        given = getattr(command, name, None)
        for value in given if isinstance(given, tuple) else () if given is None else (given,):
            control = name == "nbeta" and isinstance(command, Probing)
            check_positive(f"--{name.replace('_', '-')}", value, "Leave it out for the default.", zero=control)


def _estimator_options(command: Sampling, step_size: float | None, default: str = "sgld") -> dict[str, Any]:
    """The arguments that all estimators share. ``default``: the sampler."""
    import slt_jax as slt

    samplers = {"sgld": slt.sgld, "preconditioned": slt.preconditioned_sgld, "underdamped": slt.underdamped}
    return {
        "sampler": samplers[command.sampler or default](step_size), "num_chains": command.chains,
        "num_draws": _DRAWS if command.draws is None else command.draws, "num_warmup": command.warmup,
        "thinning": 1 if command.thinning is None else command.thinning, "batch_size": command.batch_size,
        "micro_batches": command.micro_batches, "key": command.seed,
    }  # fmt: skip


def _precision(command: Llc) -> dict[str, Any]:
    """The sampler and the arguments of a run that goes on until it is precise, where they are not given otherwise."""
    import slt_jax as slt

    limits = {"budget": command.budget, "minutes": command.minutes}
    default = command.sampler in (None, "underdamped") and not command.heads
    sampler = {"sampler": slt.underdamped(command.step_size)} if default else {}
    if command.draws is None and (default or command.precision is not None):
        target = _PRECISION if command.precision is None else command.precision
        return {**sampler, "num_draws": None, "thinning": command.thinning, "target_error": target, **limits}
    for name, value in {"precision": command.precision, **limits}.items():
        if value is not None:
            raise ValueError(
                f"--{name} is for a run of no fixed length. Give --precision with it, and leave --draws out."
            )
    return sampler


def _output(command: Any, result: Any, *, interrupted: bool) -> None:
    """Print a result, a sweep or a trajectory; save and plot it if asked to.

    One that was interrupted, and can be resumed, is not written: the same command will write all of it.
    """
    print(json.dumps(result.to_dict(), indent=1) if command.json else result_in_options(str(result)))
    if interrupted and command.checkpoint_dir is not None:
        return
    if command.out is not None:
        result.save(command.out)
    if command.plot is not None:
        result.plot(command.plot)


def _sweep(command: SweepGrid) -> int:
    import slt_jax as slt
    from slt_jax.cli import language
    from slt_jax.estimators.request import Request
    from slt_jax.models.restrict import restricted

    _check_outputs(command)
    _check_numbers(command)
    case = language.open_case(command.checkpoint, **_input_options(command))
    posterior = case.posterior if command.only is None else restricted(case.posterior, command.only)
    options = _estimator_options(command, None)
    axes = {name: getattr(command, name) or None for name in ("nbeta", "localization", "step_size")}
    Request.checked(posterior, case.data, **options)
    if not command.quiet:
        print(*language.plan_of(case, posterior, options)[:2], sep="\n", file=sys.stderr)
    result = slt.sweep(
        posterior, case.data, **axes, **options, memory_gib=command.memory_gib, progress=not command.quiet,
        checkpoint_dir=command.checkpoint_dir,
    )  # fmt: skip
    interrupted = any(cell.interrupted for cell in result.results)
    _output(command, result, interrupted=interrupted)
    if interrupted:
        return _interrupted(command)
    return 3 if result.dataset.diverged.values.all() else 0


def _trajectory(command: Course) -> int:
    import slt_jax as slt
    from slt_jax.cli import language
    from slt_jax.cli.course import open_course
    from slt_jax.estimators.request import Request

    _check_outputs(command)
    _check_numbers(command)
    case, centers = open_course(
        command.checkpoints, revisions=command.revisions, steps=command.steps, **_input_options(command),
        nbeta=command.nbeta, localization=command.localization,
    )  # fmt: skip
    options = _estimator_options(command, command.step_size)
    Request.checked(case.posterior, case.data, **options)
    if not command.quiet:
        print(*language.plan_of(case, case.posterior, options)[:2], sep="\n", file=sys.stderr)
    result = slt.trajectory(
        case.posterior, centers, case.data, parts=command.parts, warm_start=not command.cold, **options,
        progress=not command.quiet, checkpoint_dir=command.checkpoint_dir,
    )  # fmt: skip
    if not command.json:
        print(*language.course_table(result), "", sep="\n")
    _output(command, result, interrupted=bool(result.interrupted))
    if result.interrupted:
        return _interrupted(command)
    return 3 if all(not len(r.kept_chains) for r in result.results["all"]) else 0


def _input_options(command: Any) -> dict[str, Any]:
    """The options of data and model, for ``language.open_case``."""
    names = ("tokens", "text", "dataset", "column", "split", "documents", "dtype", "seq_len", "bfloat16", "backend")
    options = {name: getattr(command, name) for name in names}
    return options if isinstance(command, Course) else {**options, "revision": command.revision}


def _susceptibilities(command: Respond) -> int:
    from slt_jax.cli.observing import show_susceptibilities, susceptibilities_of

    setting, probe, _ = _setting(command)
    found, texts = susceptibilities_of(command, setting, probe)
    show_susceptibilities(command, found, texts)
    if found.interrupted:
        return _interrupted(command)
    return 3 if all(not len(result.kept_chains) for result in found.results.values()) else 0


def _influence(command: Influence) -> int:
    from slt_jax.cli.observing import check_target, influence_of

    check_target(command)
    code = influence_of(command, *_setting(command, command.on))
    return _interrupted(command) if code is None else code


def _setting(command: Probing, on: tuple[str, ...] = ()) -> tuple[Any, list[str], list[str]]:
    """(what is sampled, names of the data sets of the probe, of those that are influenced)."""
    from slt_jax.cli import language
    from slt_jax.cli.observing import Setting
    from slt_jax.estimators.request import Request

    _check_outputs(command)
    _check_numbers(command)
    probes, influenced = _files_by_name(command.probe, "--probe"), _files_by_name(on, "--on")
    if twice := [name for name in probes if influenced.get(name, probes[name]) != probes[name]]:
        raise ValueError(f"--probe and --on have different files called {twice[0]!r}. Give them different names.")
    case = language.open_case(
        command.checkpoint,
        **_input_options(command),
        nbeta=command.nbeta,
        localization=command.localization,
        also={**probes, **influenced},
    )
    options = _estimator_options(command, command.step_size, "underdamped")
    options["thinning"] = 4 if command.thinning is None else command.thinning
    Request.checked(case.posterior, case.data, **options)
    if not command.quiet:
        print(*language.plan_of(case, case.posterior, options), sep="\n", file=sys.stderr)
    setting = Setting(case, language.folder_of_tokenizer(command.checkpoint, command.revision), options)
    return setting, list(probes), list(influenced)


def _plan(command: Planned) -> int:
    import jax

    from slt_jax.cli.planning import planned, show

    settings: Any = jax.config  # its class does not declare its settings
    if settings.jax_platforms is None:  # compiling needs no device, and looking for one prints warnings
        settings.update("jax_platforms", "cpu")
    _check_numbers(command)
    show(command, planned(command))
    return 0


def _report(command: Report) -> int:
    from slt_jax.report.write import write_report

    out = command.out or command.run.with_suffix(".html")
    options = {} if command.drift is None else {"drift": command.drift}
    print(write_report(command.run, out, overwrite=command.overwrite, **options))
    return 0


def _check_heads(command: Llc) -> None:
    excluded = {"--only": command.only, "--checkpoint-dir": command.checkpoint_dir}
    if command.heads and (given := [name for name, value in excluded.items() if value is not None]):
        raise ValueError(f"--heads makes a table of many results and takes no {', '.join(given)}. Leave it out.")


def _heads(command: Llc, case: Any, names: list[str], options: dict[str, Any]) -> int:
    from slt_jax.cli import language
    from slt_jax.models.restrict import shared_heads
    from slt_jax.report.heatmaps import plot_heads

    def report(name: str, result: Any) -> None:
        if result.interrupted:
            raise KeyboardInterrupt
        if not command.quiet:
            print(f"{name}: {result.estimate_text('±')}, {result.verdict}", file=sys.stderr)
        if command.out is not None:
            result.save(command.out / f"{name.replace(' ', '-')}.zarr")

    if (count := shared_heads(case.posterior.center)) > 1 and not command.quiet:
        told = f"heads share keys and values, {count} by {count}: these move with each of the heads that use them."
        print(told, file=sys.stderr)
    if command.out is not None:
        command.out.mkdir()
    results = language.refined(
        case.posterior, case.data, names, on_result=report, progress=False if command.quiet else None, **options
    )
    if command.json:
        print(json.dumps({name: result.to_dict() for name, result in results.items()}, indent=1))
    else:
        print(*language.table(results), sep="\n")
    if command.plot is not None:
        plot_heads(results, command.plot)
    return 0


_COMMANDS: dict[type, Callable[[Any], int]] = {
    Demo: _demo, Llc: _llc, SweepGrid: _sweep, Course: _trajectory, Respond: _susceptibilities, Influence: _influence,
    Planned: _plan, Report: _report,
}  # fmt: skip
