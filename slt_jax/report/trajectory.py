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
    settled = sum(result.verdict in SETTLED for result in estimates)
    tone = GOOD if settled == len(estimates) else CAUTION
    if trajectory.unserved() or not settled:
        tone = BAD
    rows = []
    for name, results in trajectory.results.items():
        for step, result in zip(trajectory.steps, results, strict=True):
            llc = "none" if not len(result.kept_chains) else result.estimate_text("±")
            place = f"step {step:,}" + ("" if name == WHOLE else f", {name}")
            cells = (place, f"{result.init_loss:.4g}", llc, f"{result.health.rhat:.3f}", result.verdict)
            rows.append(Row(cells, tone_of(result.verdict)))
    settings = estimates[-1].settings
    sections = (
        Section("Over training", picture=picture(trajectory.plot(unit=unit, drift=drift), alt)),
        Section("Reading", code=trajectory.summary(drift)),
        Section("All estimates", header=("checkpoint", "loss", "LLC", "R-hat", "verdict"), rows=tuple(rows)),
        *settings_sections(settings),
        citation_section(settings, False),
        loading_section("trajectory", path),
    )
    verdict = f"{settled} of {len(estimates)} estimates have settled"
    title = f"LLC at {len(estimates)} checkpoints"
    return Page("Local learning coefficient over training", title, tone, verdict, (), sections)
