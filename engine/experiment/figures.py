"""Figures of an experiment: the metric along each axis, one line a strategy, with confidence intervals."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from engine.evaluate.comparison import LEVEL
from engine.experiment.results import numeric

COLORS = ("#d1495b", "#2e7d9a", "#8a6d3b", "#4f8f4f", "#7a5ca8", "#b0703c", "#5f6f7f", "#c06090")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unbake",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
PANELS = 6
"""Panels of a figure at most; further points are in the tables."""
ROOM = 36
"""Letters that stand side by side below a panel; longer names are slanted."""


def figures(summary: list[dict[str, Any]], axes: list[str]) -> dict[str, bytes]:
    """SVG files by name: one an axis that varies, or one of the strategies where none does.

    Points of the other axes are panels of the figure.
    """
    varying = [axis for axis in axes if len({str(row[axis]) for row in summary}) > 1]
    if not summary:
        return {}
    drawn = {}
    axes_drawn: list[str | None] = [*varying] or [None]
    with mpl.rc_context(STYLE):
        for axis in axes_drawn:
            others = [other for other in varying if other != axis]
            panels: dict[str, list[dict[str, Any]]] = {}
            for row in summary:
                panels.setdefault(", ".join(f"{name} {row[name]}" for name in others), []).append(row)
            name = "strategies" if axis is None else axis.replace("/", "_")
            drawn[f"{name}.svg"] = _figure(dict(list(panels.items())[:PANELS]), axis)
    return drawn


def _figure(panels: dict[str, list[dict[str, Any]]], axis: str | None) -> bytes:
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.8 + 3.0 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    limits = _limits([row for rows in panels.values() for row in rows])
    for place, (title, rows) in zip(grid, panels.items(), strict=False):
        _panel(place, rows, axis, limits)
        place.set_title(title, fontsize=10)
    for number, place in enumerate(grid):
        if number % columns:
            place.set_ylabel("")
    for place in grid[len(panels) :]:
        place.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Limits of the metric that leave the base model out; None where it is near enough for all else to be told apart.

    Near enough is no farther from the retrained and fine-tuned models than these are from each other.
    """
    scale = _scale(rows)
    judged = [
        row[name] for row in rows for name in ("mean", "low", "high", "finetuned") if row[name] is not None
    ]
    bases = [row["base"] for row in rows if row["base"] is not None]
    if not judged or not bases:
        return None
    low, high = min(judged), max(judged)
    span = high - low
    if span == 0 or low - span <= min(bases) <= max(bases) <= high + span:
        return None
    return scale * max(low - 0.1 * span, 0.9 * low), scale * (high + 0.1 * span)


def _scale(rows: list[dict[str, Any]]) -> float:
    return 100.0 if rows[0]["metric"] == "accuracy" else 1.0


def _panel(
    place: Any, rows: list[dict[str, Any]], axis: str | None, limits: tuple[float, float] | None
) -> None:
    metric, scale = rows[0]["metric"], _scale(rows)
    at = [None if axis is None else row[axis] for row in rows]
    values: list[Any] = list(dict.fromkeys(at))
    to_scale = axis is not None and numeric(values)
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    for number, strategy in enumerate(strategies):
        points = [
            (v, row)
            for v, row in zip(at, rows, strict=True)
            if row["strategy"] == strategy and row["mean"] is not None
        ]
        mine = [row for _, row in points]
        if not mine:
            continue
        shift = 0.0 if to_scale else 0.12 * (number - (len(strategies) - 1) / 2)
        x = [v if to_scale else values.index(v) + shift for v, _ in points]
        mean = scale * np.array([row["mean"] for row in mine])
        half = np.array([0.0 if row["low"] is None else scale * (row["mean"] - row["low"]) for row in mine])
        style = {"color": COLORS[number % len(COLORS)], "marker": "o", "markersize": 4, "capsize": 3}
        place.errorbar(x, mean, yerr=half, label=strategy, linestyle="-" if to_scale else "none", **style)
    for name, line in (("base", ":"), ("finetuned", "--")):
        ends = {row[name] for row in rows if row[name] is not None}
        if len(ends) == 1:
            label, end = {"base": "base", "finetuned": "fine-tuned"}[name], scale * ends.pop()
            if limits is not None and name == "base":
                label = f"base {end:.3g},\noff the scale"
            place.axhline(end, color="#888888", linestyle=line, linewidth=1, label=label)
    if to_scale:
        if min(values) > 0 and max(values) >= 8 * min(values):
            place.set_xscale("log")
        place.set_xticks(values, [str(value) for value in values])
        place.minorticks_off()
    else:
        names = ["" if value is None else str(value) for value in values]
        slanted = (
            {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("".join(names)) > ROOM else {}
        )
        place.set_xticks(range(len(values)), names, **slanted)
    means = [row["mean"] for row in rows if row["mean"] is not None]
    if metric == "perplexity" and means and max(means) > 8 * min(means):
        place.set_yscale("log")
        place.yaxis.set_major_formatter("{x:g}")
    if limits is not None:
        place.set_ylim(limits)
    place.set_xlabel(axis or "")
    unit = ", %" if scale == 100 else ""
    place.set_ylabel(f"{metric}{unit} (mean, {LEVEL:.0%} interval)")
