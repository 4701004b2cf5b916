"""The picture of quality.py: losses, and how the gap falls with rounds, H and the outer settings; SPARTA's delay."""

from __future__ import annotations

from arms import GLOBAL_BATCH, SEQUENCE_LENGTH, Outcome, gap_on_the_way
from report import RECORDS, Report


def draw(report: Report, baseline: Outcome, arms: dict[str, Outcome], every: int) -> None:
    """Six panels from the judged arms and the studies in ``report.data``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    losses(axes[0, 0], {"data parallelism": baseline} | arms)
    for name, outcome in arms.items():
        points = {step: 100 * share for step, share in gap_on_the_way(outcome, baseline).items() if step}
        axes[0, 1].plot([step / every for step in points], list(points.values()), marker=".", label=name)
    axes[0, 1].set(xlabel=f"rounds of {every} steps", ylabel="gap to data parallelism, %", title="on the way")
    for name, gaps in report.data["long rounds"].items():
        axes[0, 2].plot(list(gaps), [100 * share for share in gaps.values()], marker=".", label=name)
    axes[0, 2].set(xlabel="H (inner steps per round)", ylabel="gap to data parallelism, %", title="longer rounds", xscale="log")
    swept = {name: entry["gap"] for name, entry in report.data["sweep"]["diloco"][2].items()}
    bars(axes[1, 0], swept, f"outer settings, {report.data['sweep']['rounds']} rounds: gap, %")
    bars(axes[1, 1], report.data["few rounds"], "outer settings, few rounds: gap, %")
    delayed = report.data["SPARTA's delay"]
    axes[1, 2].bar(list(delayed), list(delayed.values()))
    axes[1, 2].set(ylabel="held-out loss", title="SPARTA's delay in steps", ylim=(0.98 * min(delayed.values()), None))
    axes[1, 2].tick_params(axis="x", rotation=30)
    for axis in (axes[0, 0], axes[0, 1], axes[0, 2]):
        axis.legend(fontsize=8)
    figure.tight_layout()
    for folder in (report.out, *([RECORDS] if report.recording else [])):
        figure.savefig(folder / "quality.png", dpi=90)


def losses(axis, arms: dict[str, Outcome]) -> None:
    for name, outcome in arms.items():
        points = {step: loss for step, loss in outcome.curve().items() if step}
        axis.plot([step * GLOBAL_BATCH * SEQUENCE_LENGTH for step in points], list(points.values()), marker=".", label=name)
    axis.set(xlabel="tokens", ylabel="held-out loss, nats per byte", title="the same tokens and global batch")


def bars(axis, gaps: dict[str, float], title: str) -> None:
    axis.barh(list(gaps), [100 * share for share in gaps.values()])
    axis.set(title=title)
    axis.tick_params(axis="y", labelsize=8)
