"""The report of ``distmerge ptm``: statistics over the seeds, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html as escape
import io
import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distmerge.studies.config import PtmConfig
from distmerge.studies.curves import SHORTER, curve, finetuning, points_of, shape

MERGED = ("ptm", "linear", "wise-ft")


def summarise(config: PtmConfig, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, the knees, the interference, and how often a diagnosis was right.

    Returns:
        JSON: ``config``, ``seeds`` (all measurements), ``arms``, ``skills``, ``interference``, ``summary``.
    """
    skills = list(measured[0]["omega"])
    return {
        "config": config.model_dump(mode="json"),
        "seeds": measured,
        "arms": [arm for skill in skills for arm in arms_of(skill, measured)],
        "skills": {skill: shape(skill, measured) for skill in skills},
        "interference": interference(skills, measured),
        "summary": {"rule": hits([entry for seed in measured for entry in seed["rule"]])},
    }


def hits(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the method that a diagnosis recommends was the best: of those it chooses among, and of all that were tried."""
    return {
        "merges": len(entries),
        "best_of_its_own": sum(entry["chosen"] == entry["best"] for entry in entries),
        "best_of_all": sum(entry["chosen"] == entry["best_of_all"] for entry in entries),
        "chosen": {name: sum(entry["chosen"] == name for entry in entries) for name in sorted({e["chosen"] for e in entries})},
        "best": {name: sum(entry["best"] == name for entry in entries) for name in sorted({e["best"] for e in entries})},
    }


def mean_and_spread(values: list[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def arms_of(skill: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm: its losses on the general text and the skill, and its cost. Merged arms are taken at |D| / |G|."""
    omega = measured[0]["omega"][skill]
    rows = []
    names = dict.fromkeys(point["arm"] for point in measured[0]["points"] if point["skill"] in (skill, None))
    for name in names:
        points = points_of(measured, name, skill, omega if name in MERGED else None)
        rows.append(
            {
                "skill": skill,
                "arm": f"{name} at {omega:.3g}" if name in MERGED else name,
                "general": mean_and_spread([point["losses"]["general"] for point in points]),
                "own": mean_and_spread([point["losses"][skill] for point in points]),
                "tokens": points[0]["tokens"],
                "steps": points[0]["steps"],
            }
        )
    return rows


def interference(skills: list[str], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """How skills that are merged together raise each other's losses.

    Returns:
        ``matrix[i][j]``, the rise of the loss on skill i when skill j is merged as well, mean over the seeds; and ``merges``,
        each with its skills' rises and its diagnosis.
    """
    matrix = np.zeros((len(skills), len(skills)))
    pairs = []
    for entry_index, entry in enumerate(measured[0]["several"]):
        if len(entry["skills"]) < 2:
            continue
        same = [seed["several"][entry_index] for seed in measured]
        rises = {name: mean_and_spread([each["interference"][name] for each in same]) for name in entry["skills"]}
        cosines = [np.asarray(each["diagnosis"]["cosines"]) for each in same]
        upper = np.triu_indices(len(entry["skills"]), 1)
        pairs.append(
            {
                "skills": entry["skills"],
                "interference": rises,
                "cosine": float(np.mean([each[upper].mean() for each in cosines])),
                "conflict_mass": statistics.mean(each["diagnosis"]["conflict_mass"] for each in same),
                "recommended": same[0]["diagnosis"]["recommendation"]["method"],
            }
        )
        if len(entry["skills"]) == 2:
            i, j = (skills.index(name) for name in entry["skills"])
            matrix[i, j], matrix[j, i] = (rises[name][0] for name in entry["skills"])
    return {"skills": skills, "matrix": matrix.tolist(), "merges": pairs}


# ---- the page


def html(results: dict[str, Any]) -> str:
    """The report as one self-contained page, with plots embedded as PNG."""
    seeds = results["seeds"]
    skills = list(results["skills"])
    parts = [
        "<!doctype html><meta charset=utf-8><title>Parallel-train-then-merge</title>",
        "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}</style>",
        "<h1>Parallel-train-then-merge</h1>",
        f"<p>{len(seeds)} seeds. Losses are in nats per token on test text that no run has seen, mean and standard deviation "
        "over the seeds. Tokens do not include the training of the base nor, except for retraining, of the general model.</p>",
    ]
    for skill in skills:
        rows = [row for row in results["arms"] if row["skill"] == skill]
        parts += [f"<h2>{escape.escape(skill)}</h2>", arms_table(rows), image(pareto(skill, seeds)), findings(skill, results)]
    parts += ["<h2>Cost</h2>", image(cost(results))]
    parts += [
        "<h2>Skills merged together</h2>",
        image(heat_map(results["interference"])),
        merges_table(results["interference"]),
    ]
    parts += ["<h2>Recommended methods</h2>", f"<p>{rule_in_words(results['summary']['rule'])}</p>"]
    return "\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape.escape(cell)}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{escape.escape(cell)}" for cell in row) for row in rows]
    return "\n".join([*lines, "</table>"])


def arms_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["arm"],
            *(f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in ("general", "own")),
            f"{row['tokens']:,}",
            f"{row['steps']:,}",
        ]
        for row in rows
    ]
    return table(["arm", "general", "skill", "tokens", "steps"], cells)


def merges_table(found: dict[str, Any]) -> str:
    cells = [
        [
            " + ".join(entry["skills"]),
            ", ".join(f"{name} {value[0]:+.3f} ± {value[1]:.3f}" for name, value in entry["interference"].items()),
            f"{entry['cosine']:.3f}",
            f"{entry['conflict_mass']:.0%}",
            entry["recommended"],
        ]
        for entry in found["merges"]
    ]
    return table(["merged", "loss against the skill merged alone", "mean cosine", "mass in conflict", "recommended"], cells)


def findings(skill: str, results: dict[str, Any]) -> str:
    """A paragraph about the curves of one skill; :func:`~distmerge.studies.curves.shape` explains the numbers."""
    found = results["skills"][skill]
    equal, equal_spread = mean_and_spread(found["equal_excess"])
    steps, above = (statistics.mean(found[key]) for key in ("equal_steps", "equal_gap"))
    excess, spread = mean_and_spread(found["similar_excess"])
    nearest, nearest_spread = mean_and_spread(found["cft_general_excess"])
    wise, wise_spread = mean_and_spread(found["wise_ft_excess"])
    omega, similar, gap, front = (statistics.mean(found[key]) for key in ("omega", "similar_omega", "similar_gap", "front"))
    knees, lack = ", ".join(f"{value:g}" for value in found["knee"]), statistics.mean(found["skill_gap"])
    return (
        f"<p>Continued finetuning that ends nearest to PTM's skill loss at |D| / |G| ({above:.1%} above it, after {steps:.0f} "
        f"steps) has a general loss {equal:.3f} ± {equal_spread:.3f} above PTM's. "
        f"Where PTM's skill loss is {gap:.1%} above that of the longest run of continued finetuning (omega {similar:.2f}), its "
        f"general loss is {excess:.3f} ± {spread:.3f} below that run's; where it is nearest ({lack:.1%} above), "
        f"{nearest:.3f} ± {nearest_spread:.3f} below. WiSE-FT's general loss, where its skill loss is {gap:.1%} above, is "
        f"{wise:.3f} ± {wise_spread:.3f} below. |D| / |G| is {omega:.3g}; the knee of PTM's curve is at {knees} (by seed). "
        f"{front:.0%} of PTM's points are not beaten on both losses by any point of the other two sweeps.</p>"
    )


def rule_in_words(rule: dict[str, Any]) -> str:
    """A paragraph about the methods that diagnoses recommended."""
    return (
        f"In {rule['merges']} merges of experts with each other, the method that the diagnosis recommends was the best of the "
        f"three that it chooses among in {rule['best_of_its_own']}, and the best of all that were tried, which include task "
        f"arithmetic with a tuned lambda, in {rule['best_of_all']}. Recommended were {rule['chosen']}; the best of the three "
        f"were {rule['best']}."
    )


def image(figure: Figure) -> str:
    """A plot as an HTML element."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def pareto(skill: str, seeds: list[dict[str, Any]]) -> Figure:
    """Skill loss over general loss: the sweeps as curves, the trained arms as points."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for arm, marker in zip(MERGED, ("o", "s", "^"), strict=True):
        mean = np.mean([curve(seed, arm, skill) for seed in seeds], axis=0)
        (drawn,) = axes.plot(mean[:, 1], mean[:, 2], marker=marker, markersize=4, label=arm)
        if arm == "ptm":
            at = int(np.argmin(np.abs(mean[:, 0] - seeds[0]["omega"][skill])))
            axes.plot(
                mean[at, 1], mean[at, 2], marker="*", markersize=16, color=drawn.get_color(), linestyle="", label="|D| / |G|"
            )
    mean = np.mean([finetuning(seed, skill) for seed in seeds], axis=0)
    axes.plot(mean[:, 1], mean[:, 2], marker=".", linestyle=":", color="black", label="cft, increasing steps")
    names = dict.fromkeys(point["arm"] for point in seeds[0]["points"] if point["skill"] in (skill, None))
    for name in names:
        if name not in MERGED and not name.startswith(SHORTER):
            losses = [[p["losses"]["general"], p["losses"][skill]] for p in points_of(seeds, name, skill)]
            x, y = np.mean(losses, axis=0)
            axes.plot(x, y, marker="x", linestyle="", color="black")
            axes.annotate(name, (float(x), float(y)), fontsize=8, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="general loss", ylabel=f"loss on {skill}")
    axes.legend()
    return figure


def cost(results: dict[str, Any]) -> Figure:
    """The training tokens of each arm at its full length, for the first skill."""
    first = next(iter(results["skills"]))
    left_out = ("linear", SHORTER)
    rows = [row for row in results["arms"] if row["skill"] == first and row["tokens"] and not row["arm"].startswith(left_out)]
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row["arm"] for row in rows], [row["tokens"] for row in rows])
    axes.set_xlabel(f"training tokens ({first})")
    return figure


def heat_map(found: dict[str, Any]) -> Figure:
    """The matrix of interference."""
    matrix, skills = np.asarray(found["matrix"]), found["skills"]
    figure = Figure(figsize=(2.5 + len(skills), 1.5 + 0.8 * len(skills)), layout="constrained")
    axes = figure.add_subplot()
    bound = max(1e-6, float(np.abs(matrix).max()))
    axes.imshow(matrix, vmin=-bound, vmax=bound, cmap="RdBu_r")
    axes.set_xticks(range(len(skills)), [f"+ {name}" for name in skills], rotation=30, ha="right")
    axes.set_yticks(range(len(skills)), skills)
    for (row, column), value in np.ndenumerate(matrix):
        if row != column:
            axes.text(column, row, f"{value:+.3f}", ha="center", va="center")
    axes.set_title("rise of the row's loss when the column's skill is merged as well", fontsize=9)
    return figure
