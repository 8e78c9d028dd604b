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
    table_note,
    tone_of,
)
from slt_jax.results.sweep import AXES, Sweep
from slt_jax.results.text import estimate_text, interrupted_line, marked


def sweep_page(sweep: Sweep, path: str | None) -> Page:
    """The recommended setting, the reading, heat maps, and a row for each cell. ``path``: where the sweep is saved."""
    data, reading = sweep.dataset, sweep.reading
    best, alt = reading.recommended, "Heat maps of the LLC over step size and localization, one for each nbeta."
    verdict, tone = "no setting can be recommended", BAD
    if best is not None:
        verdict = "take " + ", ".join(f"{name} {best[name]:.4g}" for name in AXES)
        on_plateau = any(math.isclose(nbeta, best["nbeta"]) for nbeta in reading.plateaus)
        verdict, tone = (verdict, GOOD) if on_plateau else (f"{verdict}, though no plateau was found there", CAUTION)
    cells = data.stack(cell=AXES)
    rows = []
    for i in range(cells.sizes["cell"]):
        cell = cells.isel(cell=i)
        diverged, cell_verdict = bool(cell["diverged"]), str(cell["verdict"].item())
        llc = "none" if diverged else estimate_text(float(cell["llc"]), float(cell["llc_stderr"]), "±")
        llc = llc if diverged else marked(llc, cell_verdict)
        place = ", ".join(f"{name} {float(cell[name]):.4g}" for name in AXES)
        rows.append(Row((place, llc, cell_verdict), BAD if diverged else tone_of(cell_verdict)))
    sections = (
        Section("Reading", code=str(reading)),
        Section("Heat maps", picture=picture(plot_sweep(data, reading), alt)),
        Section("All cells", table_note(rows), header=("cell", "LLC", "verdict"), rows=tuple(rows)),
        *settings_sections(sweep.settings, AXES),
        citation_section(sweep.settings, False),
        loading_section("sweep", path),
    )
    converged = int((data["verdict"] == "converged").sum())
    text = [f"{converged} of {len(rows)} cells have converged."]
    if line := interrupted_line(sweep.settings):
        text.append(line)
    kind = "Local learning coefficient over a grid of settings"
    return Page(kind, f"Sweep over {len(rows)} settings", tone, verdict, tuple(text), sections)
