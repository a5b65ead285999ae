"""Results of an experiment: one tidy row a cell, and means with confidence intervals over seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from engine.evaluate.comparison import compare
from engine.report import numbers

LEVEL = 0.95
"""Confidence level of every interval."""


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
        rows with the axes, strategy, n, mean, low, high (Student's t at LEVEL over seeds; None for one seed),
        gap_closed, gap_low, gap_high (`engine.evaluate.comparison.compare`), base, finetuned, metric.
    """
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
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
                    **{name: first[name] for name in ("base", "finetuned", "metric")},
                }
            )
    return summary


def half_width(spread: float | None, n: int) -> float | None:
    """Half the confidence interval of a mean: t(LEVEL, n - 1) spread / sqrt(n); None for fewer than two."""
    if spread is None or n < 2:
        return None
    return float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * spread / math.sqrt(n)


def to_markdown(summary: list[dict[str, Any]], axes: list[str]) -> str:
    """The summary as a Markdown table; intervals as mean ± half their width."""
    if not summary:
        return "No results yet.\n"
    metric = summary[0]["metric"]
    heads = [*axes, "strategy", f"{metric} ({LEVEL:.0%} interval)", "gap closed", "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join([' --- '] * len(heads))}|"]
    for row in summary:
        half = None if row["low"] is None else row["mean"] - row["low"]
        gap_half = None if row["gap_low"] is None else row["gap_closed"] - row["gap_low"]
        cells = [
            *(str(row[axis]) for axis in axes),
            row["strategy"],
            numbers.plus_minus(row["mean"], half, metric),
            numbers.gap(row["gap_closed"], gap_half),
            str(row["n"]),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    ends = {(row["base"], row["finetuned"]) for row in summary}
    for base, finetuned in sorted(ends, key=str):
        lines += [
            "",
            f"Base {numbers.value(base, metric)}, fine-tuned {numbers.value(finetuned, metric)}.",
        ]
    return "\n".join(lines) + "\n"


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
