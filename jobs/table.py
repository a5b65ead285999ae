"""The comparison table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from engine.report.facts import gap_intervals
from engine.report.numbers import gap, interval, plus_minus, value


def print_table(metrics: dict[str, Any], console: Console) -> None:
    """Print metrics.json's table (see `engine.evaluate.comparison`); its warnings are the caller's to say."""
    name = metrics["metric"]
    measured = (metrics.get("measured") or {}).get("test") or {}
    caption = f"{measured['documents']:,} test documents" if measured else None
    table = Table(title=f"{name} on the test share", caption=caption)
    table.add_column("base trained on")
    table.add_column(name, justify="right")
    table.add_column("gap closed", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("seeds", justify="right")
    table.add_row("nothing (base)", value(metrics["base"], name), "", "", "")
    intervals = gap_intervals(metrics)
    for row in metrics["strategies"]:
        table.add_row(
            row["strategy"],
            plus_minus(row["mean"], row["spread"], name),
            gap(row["gap_closed"], row["gap_spread"]),
            interval(intervals.get(row["strategy"])),
            str(row["n"]),
        )
    table.add_row("true data (fine-tuned)", value(metrics["finetuned"], name), "", "", "")
    console.print(table)
