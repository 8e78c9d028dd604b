"""The page about a trajectory."""

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
from slt_jax.results.plateau import SETTLED
from slt_jax.results.trajectory import WHOLE, Trajectory


def trajectory_page(
    trajectory: Trajectory, path: str | None, *, unit: str = "nats per example", drift: float | None = None
) -> Page:
    """LLC and loss over training, the stages, and a row for each checkpoint and part."""
    alt = "LLC and loss over training steps, with the boundaries of stages and their intervals."
    estimates = trajectory.results[WHOLE]
    converged = sum(result.verdict == "converged" for result in estimates)
    tone = GOOD if converged == len(estimates) else CAUTION
    if trajectory.unserved() or not any(result.verdict in SETTLED for result in estimates):
        tone = BAD
    rows = []
    for name, results in trajectory.results.items():
        for step, result in zip(trajectory.steps, results, strict=True):
            llc = "none" if not len(result.kept_chains) else result.estimate_text("±")
            place = f"step {step:,}" + ("" if name == WHOLE else f", {name}")
            cells = (place, f"{result.init_loss:.4g}", llc, f"{result.health.rhat:.3f}", result.verdict)
            rows.append(Row(cells, tone_of(result.verdict)))
    settings, header = estimates[-1].settings, ("checkpoint", "loss", "LLC", "R-hat", "verdict")
    sections = (
        Section("Over training", picture=picture(trajectory.plot(unit=unit, drift=drift), alt)),
        Section("Reading", code=trajectory.summary(drift)),
        Section("All estimates", table_note(rows), header=header, rows=tuple(rows)),
        *settings_sections(settings),
        citation_section(settings, False),
        loading_section("trajectory", path),
    )
    verdict = f"{converged} of {len(estimates)} estimates have converged"
    text = ['This counts the estimates of the whole model, one for each checkpoint, whose verdict is "converged".']
    if len(trajectory.results) > 1:
        text.append("Those of its parts are listed below, and not counted.")
    if trajectory.interrupted:
        text.append(f"Interrupted after {len(estimates)} of {trajectory.interrupted} checkpoints.")
    title = f"LLC at {len(estimates)} checkpoints"
    return Page("Local learning coefficient over training", title, tone, verdict, tuple(text), sections)
