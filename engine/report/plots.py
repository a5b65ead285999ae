"""Figures as inline SVG that take their colours from the page, so that they follow light, dark and print.

Matplotlib draws with marker colours, which become CSS variables; its style attributes, which the page's
Content-Security-Policy forbids, become presentation attributes. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

INK, MUTED, LINE, ACCENT, SECOND = "#000001", "#000002", "#000003", "#000004", "#000005"
PAINT = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
POINTS = 800
"""Points of a curve at most; more cannot be seen."""

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", SVG[1:-1])
ET.register_namespace("xlink", HREF[1:-5])

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unbake",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 1.8,
}


def comparison(metrics: dict[str, Any]) -> Markup | None:
    """Each strategy's seeds, mean and spread between the lines of base and fine-tuned."""
    rows = [row for row in metrics["strategies"] if row["n"]][::-1]
    if not rows:
        return None
    scale = 100.0 if metrics["metric"] == "accuracy" else 1.0
    with mpl.rc_context(STYLE):
        figure, axes = _axes(0.6 + 0.34 * (len(rows) + 1))
        for y, row in enumerate(rows):
            color = ACCENT if row["strategy"].startswith("greedy") else MUTED
            spread = scale * (row["spread"] or 0.0)
            axes.errorbar(
                scale * row["mean"], y, xerr=spread, color=color, capsize=4, marker="D", markersize=6
            )
            axes.plot(
                scale * np.array(row["values"]), [y] * row["n"], "o", color=color, alpha=0.35, markersize=4
            )
        for name, style in (("base", ":"), ("finetuned", "--")):
            if metrics[name] is not None:
                axes.axvline(scale * metrics[name], color=SECOND, linestyle=style, linewidth=1.4)
                label = {"base": "base", "finetuned": "fine-tuned"}[name]
                axes.text(scale * metrics[name], len(rows) - 0.35, label, ha="center", color=MUTED)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_yticks(range(len(rows)), [row["strategy"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy on the test share, %" if scale == 100 else "perplexity on the test share")
        return _svg(figure, "comparison", "Test metric of every strategy between base and fine-tuned")


def objective(path: Floats, peak: dict[str, Any], random: dict[str, Any] | None) -> Markup:
    """f after each pick with its peak, beside random sets of each size (mean and one standard deviation)."""
    kept = _thinned(path.size, int(peak["size"]) - 1)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.2)
        axes.plot(kept + 1, path[kept], color=ACCENT, label="selection")
        if random and random["mean"]:
            sizes, mean, std = (np.array(random[key], np.float64) for key in ("sizes", "mean", "std"))
            axes.fill_between(sizes, mean - std, mean + std, color=MUTED, alpha=0.25, linewidth=0)
            axes.plot(sizes, mean, color=MUTED, label="random sets")
        axes.plot(
            peak["size"], peak["value"], "o", color=SECOND, markersize=8, label=f"peak at {peak['size']:,}"
        )
        axes.set_xlabel("documents selected")
        axes.set_ylabel("objective f")
        axes.legend(loc="best")
        return _svg(figure, "objective", "Objective after each pick, with its peak, beside random sets")


def norms(values: Floats) -> Markup | None:
    """Norm of each picked gradient; on a logarithmic axis when they differ by more than a decade."""
    values = np.where(values > 0, values, np.nan)
    if values.size < 2 or not np.isfinite(values).any():
        return None
    kept = _thinned(values.size, 0)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.2)
        few = kept.size <= 100
        axes.plot(kept + 1, values[kept], "o", color=ACCENT, alpha=0.6, markersize=5 if few else 2)
        if np.nanmax(values) > 10 * np.nanmin(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("pick")
        axes.set_ylabel("gradient norm")
        return _svg(figure, "norms", "Norm of the gradient of each picked document")


def confidence(counts: dict[str, Any]) -> Markup:
    """Distribution of the fine-tuned model's confidence: selection against corpus.

    Args:
        counts: edges (n + 1), selected (n) and corpus (n, or None).
    """
    edges, selected = np.array(counts["edges"], np.float64), np.array(counts["selected"], np.float64)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.2)
        share = 100 * selected / selected.sum()
        axes.stairs(share, edges, fill=True, color=ACCENT, alpha=0.6, label="selection")
        if counts["corpus"]:
            shares = 100 * np.array(counts["corpus"]) / sum(counts["corpus"])
            axes.stairs(shares, edges, color=SECOND, linewidth=1.8, label="corpus")
        axes.set_xlabel("confidence of the fine-tuned model")
        axes.set_ylabel("documents, %")
        axes.legend(loc="best")
        return _svg(figure, "confidence", "Distribution of confidence, selection against corpus")


def scatter(points: dict[str, Any]) -> Markup:
    """Directions of gradients in a plane (`engine.report.plane`): selected documents among the corpus.

    Args:
        points: corpus and selected, lists of [x, y]; where known target [x, y] and variance [x, y].
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(4.2)
        for name, color, size in (("corpus", MUTED, 2.5), ("selected", ACCENT, 4.5)):
            xy = np.array(points.get(name) or np.zeros((0, 2)), np.float64)[: 5 * POINTS]
            axes.plot(
                xy[:, 0],
                xy[:, 1],
                "o",
                color=color,
                alpha=0.35 if name == "corpus" else 0.8,
                markersize=size,
                label=name,
            )
        if points.get("target"):
            x, y = points["target"]
            axes.plot(x, y, "*", color=SECOND, markersize=13, label="change in weights")
        shares = points.get("variance") or (None, None)
        for share, label, word in zip(
            shares, (axes.set_xlabel, axes.set_ylabel), ("first", "second"), strict=True
        ):
            label(
                f"{word} direction" + (f" ({100 * share:.0f}% of the variance)" if share is not None else "")
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="best")
        return _svg(
            figure, "map", "Gradients of selected documents among those of the corpus, in two dimensions"
        )


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    return figure, figure.add_subplot()


def _thinned(size: int, keep: int) -> npt.NDArray[np.int64]:
    """At most about POINTS positions of a curve, its ends and the position `keep` among them."""
    kept = np.linspace(0, size - 1, min(size, POINTS)).round().astype(np.int64)
    return np.unique(np.append(kept, min(max(keep, 0), size - 1)))


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an inline svg element without style attributes, metadata or ids that could collide."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(sink.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style") or "metadata" in child.tag:
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        _restyle(element, name, used)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    # What matplotlib says in a style element for all of them.
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt", "role": "img", "aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode"))


def _restyle(element: ET.Element, name: str, used: set[str]) -> None:
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        prop, text = (part.strip() for part in declaration.split(":", 1))
        if prop == "font":
            element.set("font-size", re.search(r"[\d.]+(?=px)", text)[0])  # type: ignore[index]
        else:
            element.set(prop, text)
    if element.get("id") not in used:
        element.attrib.pop("id", None)
    for key, text in element.attrib.items():
        if key == "id":
            text = f"{name}-{text}"
        elif key == HREF or "url(#" in text:
            text = text.replace("#", f"#{name}-", 1)
        element.set(key, PAINT.get(text, text))
