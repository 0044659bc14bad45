"""The figures of a comparison (learning curves, heat map, forest of paired differences) and its report, one HTML file."""

from __future__ import annotations

from collections.abc import Iterable
from colorsys import hsv_to_rgb
from html import escape
from itertools import chain, count
from typing import Any

import numpy as np

from dfpo_core import html
from dfpo_core.comparison import MEASURES, SAMPLED_NOTE, ComparisonConfig, by_measure, collapses, starts_by_setting

COLOURS = ("#0b6e4f", "#c8553d", "#3066be", "#b88a00", "#7b4b94", "#2a9d8f", "#8d6346", "#d1495b", "#5b6875", "#111111", "#e377c2")


def figures(study: ComparisonConfig, records: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """name -> matplotlib figure: `curves`, `heat_map`, and `forest` where there are at least two paired seeds."""
    drawn = {"curves": curves(study, records), "heat_map": heat_map(study, summary)}
    pairs = [pair for pair in summary["paired"] if pair["measure"] == "average"]
    return drawn | ({"forest": forest(study, pairs)} if pairs else {})


def curves(study: ComparisonConfig, records: list[dict[str, Any]]):
    """In-domain accuracy over steps, a panel a setting, a line an algorithm: mean over seeds in a band from lowest to highest seed."""
    from matplotlib.figure import Figure

    settings = [s for s in study.settings if any(r["setting"] == s for r in records)]
    rows, columns = _grid(len(settings), 3)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 0.8 + 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, setting in zip(panels, settings, strict=False):
        for name, colour in _colours(study):
            mine = [r["curve"] for r in records if (r["setting"], r["algorithm"]) == (setting, name)]
            length = min(map(len, mine), default=0)  # a run that diverged is shorter
            if not length:
                continue
            steps = [point["step"] for point in mine[0][:length]]
            heights = np.array([[point["id_test"] for point in curve[:length]] for curve in mine])
            bold = name == study.reference
            axes.plot(steps, heights.mean(0), color=colour, linewidth=2.6 if bold else 1.3, label=name, zorder=3 if bold else 2)
            axes.fill_between(steps, heights.min(0), heights.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.set_title(setting, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(color="#e6eaee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(settings) :]:
        axes.remove()
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    figure.supylabel("in-domain accuracy", fontsize=10)
    return figure


def heat_map(study: ComparisonConfig, summary: dict[str, Any]):
    """Average of in-domain and out-of-domain accuracy at the end, in points: algorithms down, settings across."""
    from matplotlib.figure import Figure

    means = {(m["setting"], m["algorithm"]): 100 * m["mean"] for m in summary["means"] if m["measure"] == "average"}
    settings = [s for s in study.reported if any(key[0] == s for key in means)]
    names = [a for a in study.algorithms if any(key[1] == a for key in means)]
    values = np.array([[means.get((s, a), np.nan) for s in settings] for a in names])
    figure = Figure(figsize=(2.6 + 1.15 * len(settings), 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if value < middle else "black")
    axes.set_xticks(range(len(settings)), settings, rotation=20, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    figure.colorbar(image, label="points")
    return figure


def forest(study: ComparisonConfig, pairs: list[dict[str, Any]]):
    """Reference minus rival, paired by seed, with 95 % intervals: a panel a setting."""
    from matplotlib.figure import Figure

    settings = [s for s in study.reported if any(p["setting"] == s for p in pairs)]
    names = [a for a in study.algorithms if any(p["rival"] == a for p in pairs)]
    rows, columns = _grid(len(settings), 5)
    figure = Figure(figsize=(1.8 + 2.3 * columns, 0.4 + rows * (1.0 + 0.34 * len(names))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for axes, setting in zip(panels, settings, strict=False):
        for name, colour in _colours(study):
            for pair in pairs:
                if (pair["setting"], pair["rival"]) == (setting, name):
                    mean, low, high = (100 * pair[key] for key in ("mean", "low", "high"))
                    axes.errorbar([mean], [names.index(name)], xerr=[[mean - low], [high - mean]], fmt="o", color=colour, markersize=5)
        axes.axvline(0, color="#5b6875", linewidth=1, zorder=0)
        axes.set_title(setting, fontsize=10, loc="left", fontweight="bold")
        axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)  # there may be no panel beneath
    for axes in panels[len(settings) :]:
        axes.remove()
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"{study.reference} minus the rival, points (average of in and out of domain)", fontsize=9)
    return figure


def _grid(panels: int, columns: int) -> tuple[int, int]:
    """(rows, columns) for so many panels, at most `columns` in a row and as many in each as can be."""
    rows = -(-panels // columns)
    return rows, -(-panels // rows)


def _colours(study: ComparisonConfig) -> Iterable[tuple[str, str | tuple[float, float, float]]]:
    """A colour of its own for each algorithm: COLOURS, then hues a golden section of the circle apart, which never meet."""
    more = (hsv_to_rgb(0.618034 * turn % 1, 0.9, 0.8) for turn in count(2))
    return zip(study.algorithms, chain(COLOURS, more), strict=False)


def render(study: ComparisonConfig, records: list[dict[str, Any]], summary: dict[str, Any], drawn: dict[str, Any]) -> str:
    """The whole report as one HTML file."""
    seeds = sorted({record["seed"] for record in records})
    done = f"{len(records)} runs, seeds {', '.join(map(str, seeds))}"
    questions = ", ".join(f"{count} {domain}" for domain, count in records[0]["questions"].items()) if records else "none"
    heading = (
        f"<h1>{escape(study.name)}</h1><p class='soft'>{escape(done)}. Greedy accuracy on held-out questions: {escape(questions)}.</p>"
    )
    mean = f"; noisy: mean over {', '.join(study.averaged)}" if "noisy" in study.reported else ""
    notes = {
        "heat_map": ("Where each algorithm ends", f"Average of in-domain and out-of-domain accuracy at the end{mean}."),
        "forest": (f"{study.reference} against each rival", "Paired by seed, 95 % Student's t. Right of zero is better than the rival."),
        "curves": ("Learning curves", "Mean over seeds; the band reaches from the lowest to the highest seed."),
    }
    sections = [heading]
    if summary["starts"]:
        settings = [entry["setting"] for entry in summary["starts"]]
        table = html.table(["", *settings], [[escape(name), *(shown[s] for s in settings)] for name, shown in starts_by_setting(summary)])
        note = "Per cent of the training labels, and accuracy of the warm start in domain / out of domain, mean over seeds."
        sections.append(html.section("What every algorithm starts from", table, note))
    for name, (title, note) in notes.items():
        if name in drawn:
            sections.append(html.section(title, html.image(drawn[name], title), note))
    if summary["paired"]:
        column, rows = by_measure(study, summary)
        table = html.table(["", *MEASURES.values()], [[escape(name), *gaps] for name, *gaps in rows])
        title = f"{study.reference} minus each rival by every measure, {column}"
        sections.append(html.section(title, table, f"Points, paired by seed, 95 % Student's t. {SAMPLED_NOTE}"))
    sections.append(
        html.section("Runs and cost", _cost(summary), "Collapsed: diverged, or ends below the in-domain accuracy that it started from.")
    )
    return html.page(study.name, sections)


def _cost(summary: dict[str, Any]) -> str:
    rows = [
        [
            escape(row["algorithm"]),
            str(row["runs"]),
            escape(collapses(row)),
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for row in summary["runs"]
    ]
    return html.table(["", "runs", "collapsed", "CPU seconds a run", "peak MB"], rows)
