"""Results of an experiment: one tidy row a cell, and means with confidence intervals over seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from engine.evaluate.comparison import LEVEL, REFERENCE, compare, half_width
from engine.report import numbers

COSTS = {"store_bytes": "store, MB", "extract_seconds": "extract, s", "select_seconds": "select, s"}
"""Columns of the results that the table shows where cells come from several extractions, and their heads."""


def results_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The tidy table: a column for every key of any row, absent values null.

    An axis whose values are not all numbers is text, so that every column has one type.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pa.table({name: _one_type(values) for name, values in columns.items()})


def summarise(rows: list[dict[str, Any]], axes: list[str]) -> list[dict[str, Any]]:
    """Each strategy at each point of the axes: mean over seeds, its interval, and the gap it closes.

    Args:
        rows: of cells, with strategy, seed, metric, value (None where a model failed), base, finetuned.
        axes: columns that tell points apart.

    Returns:
        rows with the axes, strategy, judged, n, mean, low, high (Student's t at LEVEL over seeds; None for one seed),
        gap_closed, gap_low, gap_high (`engine.evaluate.comparison.compare`), base, finetuned, metric;
        minus_random, minus_random_stderr, minus_random_n: of the differences from random at the same seed, their
        mean, its standard error and their number (None where there are none, or one alone); and the means of COSTS
        where the rows come from several extractions.
    """
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    costs = COSTS if len({row.get("extraction") for row in rows}) > 1 else {}
    for row in rows:
        points.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    summary = []
    for point, members in points.items():
        first = members[0]
        runs = [{k: row[k] for k in ("strategy", "seed")} | {"metric": row["value"]} for row in members]
        compared = compare(
            {"base": first["base"], "finetuned": first["finetuned"], "runs": runs},
            first["metric"] == "accuracy",
        )
        reference = _by_seed(members, REFERENCE)
        for line in compared["strategies"]:
            half = half_width(line["spread"], line["n"])
            gap_half = half_width(line["gap_spread"], line["gap_n"])
            summary.append(
                {
                    **dict(zip(axes, point, strict=True)),
                    "strategy": line["strategy"],
                    "n": line["n"],
                    "mean": line["mean"],
                    **_bounds("low", "high", line["mean"], half),
                    "gap_closed": line["gap_closed"],
                    **_bounds("gap_low", "gap_high", line["gap_closed"], gap_half),
                    **_differences(_by_seed(members, line["strategy"]), reference),
                    **{name: first[name] for name in ("base", "finetuned", "metric")},
                    "judged": first.get("judged", "test"),
                    **{
                        name: float(np.mean([r[name] for r in members if r["strategy"] == line["strategy"]]))
                        for name in costs
                    },
                }
            )
    return summary


def _by_seed(members: list[dict[str, Any]], strategy: str) -> dict[int, float]:
    """A strategy's values by seed, those of models that failed left out."""
    return {
        row["seed"]: row["value"]
        for row in members
        if row["strategy"] == strategy and row["value"] is not None
    }


def _differences(values: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    """Differences from the reference at the same seed: mean, its standard error, number."""
    found = np.array([value - reference[seed] for seed, value in values.items() if seed in reference])
    n = len(found)
    return {
        "minus_random": float(found.mean()) if n else None,
        "minus_random_stderr": float(found.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "minus_random_n": n,
    }


def to_markdown(summary: list[dict[str, Any]], axes: list[str]) -> str:
    """The summary as a Markdown table: intervals as mean ± half their width, differences ± standard error."""
    if not summary:
        return "No results yet.\n"
    metric = summary[0]["metric"]
    heads = [
        *axes, "strategy", f"{metric} ({LEVEL:.0%} interval)", "minus random (± SE)", "gap closed", "seeds",
    ]  # fmt: skip
    costs = [name for name in COSTS if name in summary[0]]
    heads += [COSTS[name] for name in costs]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join([' --- '] * len(heads))}|"]
    for row in summary:
        half = None if row["low"] is None else row["mean"] - row["low"]
        gap_half = None if row["gap_low"] is None else row["gap_closed"] - row["gap_low"]
        cells = [
            *(str(row[axis]) for axis in axes),
            row["strategy"],
            numbers.plus_minus(row["mean"], half, metric),
            difference(row),
            numbers.gap(row["gap_closed"], gap_half),
            str(row["n"]),
            *(numbers.figures(row[name] / (1 << 20 if name == "store_bytes" else 1), 4) for name in costs),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    ends = {(row["base"], row["finetuned"]) for row in summary}
    for base, finetuned in sorted(ends, key=str):
        lines += [
            "",
            f"Base {numbers.value(base, metric)}, fine-tuned {numbers.value(finetuned, metric)}.",
        ]
    if summary[0]["judged"] == "validation":
        lines += ["", "Judged on the validation documents: for choices, not for comparison with other work."]
    return "\n".join(lines) + "\n"


def difference(row: dict[str, Any]) -> str:
    """A line's difference from random with its standard error: accuracy in points; a dash for random itself."""
    mean, stderr = row["minus_random"], row["minus_random_stderr"]
    if mean is None or row["strategy"] == REFERENCE:
        return numbers.NONE
    scale, digits = (100, 1) if row["metric"] == "accuracy" else (1, 2)
    shown = f"{scale * mean:+.{digits}f}"
    return shown if stderr is None else f"{shown} ± {scale * stderr:.{digits}f}"


def _bounds(low: str, high: str, mean: float | None, half: float | None) -> dict[str, float | None]:
    if mean is None or half is None:
        return {low: None, high: None}
    return {low: mean - half, high: mean + half}


def _one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    return [None if value is None else str(value) for value in values]


def numeric(values: list[Any]) -> bool:
    """Whether an axis can be drawn to scale."""
    return all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values)
