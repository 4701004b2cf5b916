"""The pictures of quality.py and studies.py."""

from __future__ import annotations

from typing import Any

from arms import EVERY, GLOBAL_BATCH, SEQUENCE_LENGTH, Outcome, gap_on_the_way
from report import RECORDS, Report


def draw(report: Report, baseline: Outcome, arms: dict[str, Outcome]) -> None:
    """Losses against tokens, the gap against rounds, and the gap by the outer settings."""
    figure, axes = panels(3)
    for name, outcome in ({"data parallelism": baseline} | arms).items():
        points = {step: loss for step, loss in outcome.curve().items() if step}
        axes[0].plot([step * GLOBAL_BATCH * SEQUENCE_LENGTH for step in points], list(points.values()), marker=".", label=name)
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats per byte", title="the same tokens and global batch")
    for name, outcome in arms.items():
        points = {step: 100 * share for step, share in gap_on_the_way(outcome, baseline).items() if step}
        axes[1].plot([step / EVERY for step in points], list(points.values()), marker=".", label=name)
    axes[1].set(xlabel=f"rounds of {EVERY} steps", ylabel="gap to data parallelism, %", title="on the way")
    swept = report.data["sweep"]
    for workers, settings in swept["diloco"].items():
        labels = [f"{workers} x {name}" for name in settings]
        axes[2].barh(labels, [100 * entry["gap"] for entry in settings.values()])
    axes[2].set(title=f"outer settings, {swept['rounds']} rounds: gap, %")
    axes[2].tick_params(axis="y", labelsize=7)
    axes[0].legend()
    axes[1].legend()
    save(figure, report)


def draw_studies(report: Report) -> None:
    """Few rounds, longer rounds, SPARTA beside DiLoCo, SPARTA's delay."""
    figure, axes = panels(4)
    few, both, delayed = (report.data[name] for name in ("few rounds", "SPARTA and DiLoCo", "SPARTA's delay"))
    axes[0].bar(list(few), [100 * share for share in few.values()])
    axes[0].set(title="outer settings, few rounds: gap, %")
    for name, gaps in report.data["long rounds"].items():
        axes[1].plot(list(gaps), [100 * share for share in gaps.values()], marker=".", label=name)
    axes[1].set(xlabel="H (inner steps per round)", title="longer rounds: gap, %", xscale="log")
    axes[1].legend(fontsize=8)
    for axis, title, losses in ((axes[2], "SPARTA beside DiLoCo: loss", both), (axes[3], "SPARTA's delay: loss", delayed)):
        heights = [sum(loss) / len(loss) if isinstance(loss, list) else loss for loss in losses.values()]
        axis.bar(list(losses), heights)
        axis.set(title=title, ylim=(0.98 * min(heights), None))
        axis.tick_params(axis="x", rotation=30)
    save(figure, report)


def panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, count, figsize=(5 * count, 4.2))


def save(figure: Any, report: Report) -> None:
    figure.tight_layout()
    for folder in (report.out, *([RECORDS] if report.recording else [])):
        figure.savefig(folder / f"{report.name}.png", dpi=90)
