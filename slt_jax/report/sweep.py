"""The page about a sweep."""

import math

from slt_jax.report.heatmaps import plot_sweep
from slt_jax.report.page import (
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
from slt_jax.results.sweep import AXES, Sweep
from slt_jax.results.text import estimate_text


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
        *settings_sections(sweep.settings, AXES),
        citation_section(sweep.settings, False),
        loading_section("sweep", path),
    )
    kind = "Local learning coefficient over a grid of settings"
    return Page(kind, f"Sweep over {len(rows)} settings", tone, verdict, (), sections)
