"""Pages about many estimates: a sweep's, and a trajectory's."""

import math

from slt_jax.grid import AXES, Sweep
from slt_jax.heatmaps import plot_sweep
from slt_jax.plateau import SETTLED
from slt_jax.reading import estimate_text
from slt_jax.report import (
    BAD,
    CAUTION,
    GOOD,
    Page,
    Row,
    Section,
    citation_section,
    loading_section,
    picture,
    settings_sections,
    tone_of,
)
from slt_jax.training import WHOLE, Trajectory


def sweep_page(sweep: Sweep, path: str | None) -> Page:
    data, reading = sweep.dataset, sweep.reading
    best, alt = reading.recommended, "Heat maps of the LLC over step size and localization, one for each nbeta."
    verdict, tone = "no setting can be recommended", BAD
    if best is not None:
        verdict = "take " + ", ".join(f"{name} {best[name]:.4g}" for name in AXES)
        stands = any(math.isclose(nbeta, best["nbeta"]) for nbeta in reading.plateaus)
        verdict, tone = (verdict, GOOD) if stands else (f"{verdict}, though no plateau was found there", CAUTION)
    cells = data.stack(cell=AXES)
    rows = []
    for i in range(cells.sizes["cell"]):
        one = cells.isel(cell=i)
        lost, told = bool(one["diverged"]), str(one["verdict"].item())
        llc = "none" if lost else estimate_text(float(one["llc"]), float(one["llc_stderr"]), "±")
        place = ", ".join(f"{name} {float(one[name]):.4g}" for name in AXES)
        rows.append(Row((place, llc, told), BAD if lost else tone_of(told)))
    sections = (
        Section("What it says", code=str(reading)),
        Section("Heat maps", picture=picture(plot_sweep(data, reading), alt)),
        Section("All cells", header=("cell", "LLC", "verdict"), rows=tuple(rows)),
        *settings_sections({name: x for name, x in sweep.settings.items() if name not in AXES}),
        citation_section(sweep.settings, False),
        loading_section("sweep", path),
    )
    kind = "Local learning coefficient over a grid of settings"
    return Page(kind, f"Sweep over {len(rows)} settings", tone, verdict, (), sections)


def trajectory_page(
    found: Trajectory, path: str | None, *, unit: str = "nats per example", drift: float | None = None
) -> Page:
    """LLC and loss over training, the stages, and a row for each checkpoint and part."""
    alt = "LLC and loss over training steps, with the boundaries of stages and their intervals."
    bad, whole = found.unserved(), found.results[WHOLE]
    settled = sum(result.verdict in SETTLED for result in whole)
    verdict, tone = f"{settled} of {len(whole)} estimates have settled", GOOD if settled == len(whole) else CAUTION
    if bad or not settled:
        tone = BAD
    rows = []
    for name, results in found.results.items():
        for step, result in zip(found.steps, results, strict=True):
            llc = "none" if not len(result.kept_chains) else result.estimate_text("±")
            place = f"step {step:,}" + ("" if name == WHOLE else f", {name}")
            cells = (place, f"{result.init_loss:.4g}", llc, f"{result.health.rhat:.3f}", result.verdict)
            rows.append(Row(cells, tone_of(result.verdict)))
    settings = {k: v for k, v in whole[-1].settings.items() if k not in ("probe", "gradients", "cost")}
    sections = (
        Section("Over training", picture=picture(found.plot(unit=unit, drift=drift), alt)),
        Section("What it says", code=found.summary(drift)),
        Section("All estimates", header=("checkpoint", "loss", "LLC", "R-hat", "verdict"), rows=tuple(rows)),
        *settings_sections(settings),
        citation_section(settings, False),
        loading_section("trajectory", path),
    )
    title = f"LLC at {len(whole)} checkpoints"
    return Page("Local learning coefficient over training", title, tone, verdict, (), sections)
