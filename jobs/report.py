"""unbake report: gather what the stages left in the run directory into one page, or Markdown, or JSON."""

from __future__ import annotations

import argparse
import json
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from jobs.options import parse_spec, spec_parser

if TYPE_CHECKING:
    from engine.rundir import RunDir
    from jobs.job import Job

CODE = 1
"""Raised whenever the same store and selection would give another map."""


def main(arguments: list[str]) -> int:
    """Read the options and write the report."""
    spec, options = parse_spec(parser(), arguments)
    if spec is None:
        return 0
    if options["open"] and options["format"] != "html":
        raise UserError(f"--open shows the HTML page: leave --format {options['format']} out.")
    from jobs.job import Job

    job = Job(spec, quiet=options["quiet"], verbose=options["verbose"])
    path = report(job, options["format"], options["out"], options["price"])
    if options["open"]:
        if "://" in path or (not job.run.local and not options["out"]):
            raise UserError("--open needs a page on this machine: add --out report.html.")
        address = Path(path).absolute().as_uri()
        if webbrowser.open(address) is False:
            job.progress.say(f"no browser here: open {address} where there is one")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake report`."""
    made = spec_parser("report", "write the report of a run directory; what is not there yet is left out")
    group = made.add_argument_group("the report")
    group.add_argument("--format", choices=["html", "md", "json"], default="html", help="default: html")
    group.add_argument(
        "--out", metavar="FILE", help="default: report.FORMAT in the run directory; - prints it"
    )
    group.add_argument("--open", action="store_true", help="show the page in the browser")
    group.add_argument(
        "--price", type=float, metavar="P", help="price of an hour of all machines, to show what stages cost"
    )
    return made


def report(job: Job, kind: str = "html", out: str | None = None, price: float | None = None) -> str:
    """Write the report from what is there; its path. UserError when there is no selection yet.

    Args:
        kind: html, md or json.
        out: a file of this machine in place of report.<kind> in the run directory; "-" prints it.
        price: of an hour of the machines.
    """
    from engine import report as formats
    from engine.rundir import DIAGNOSTICS, METRICS, NEAREST, SELECTION

    run = job.run
    summary: dict[str, Any] = {"spent": spent(run), "price_per_hour": price}
    for stage in ("extract", "select"):
        run.stage_fingerprint(stage)
        summary[stage] = run.stage_result(stage)
    selection = run.read_table(SELECTION)
    summary["map"] = _map(run, selection["row"].to_numpy(), keep=out is None)
    if run.exists(NEAREST) and (near := run.read_table(NEAREST)).num_rows == selection.num_rows:
        for name in near.column_names:
            selection = selection.append_column(name, near[name])
    metrics = run.read_json(METRICS) if run.exists(METRICS) else None
    summary["diagnosed"] = run.read_json(DIAGNOSTICS) if run.exists(DIAGNOSTICS) else None
    render = {"html": formats.render, "md": formats.render_markdown, "json": formats.render_json}[kind]
    page = render(run, job.spec, metrics, selection, summary)
    if out == "-":
        print(page, end="")
        return out
    path = out or run.path(f"report.{kind}")
    if out:  # into a folder that may be nobody's to write to, nothing is written
        _write_file(out, page)
    else:
        run.write_bytes(f"report.{kind}", page.encode())
        job.progress.log.write("report", "end", path=path)
        job.progress.log.flush()
    job.progress.say(f"report: {path}")
    return path


def spent(run: RunDir) -> dict[str, float]:
    """Seconds of every stage in the log, over all its starts, also those that were killed."""
    from engine.rundir import LOG

    total: dict[str, float] = {}
    begun: dict[str, float] = {}
    for line in run.read_bytes(LOG).decode().splitlines() if run.exists(LOG) else ():
        try:
            record = json.loads(line)
            stage, event, at = record["stage"], record["event"], float(record["time"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed process left half written
        if event == "begin":
            begun[stage] = at
        elif stage in begun and event in ("progress", "end", "failed"):
            total[stage] = total.get(stage, 0.0) + at - begun[stage]
            begun[stage] = at
    return total


def _map(run: RunDir, rows: Any, keep: bool) -> dict[str, Any] | None:
    """The map of the selection; kept as a stage of its own, for the store may be gone at the next report.

    Args:
        rows: of the selection, in pick order.
        keep: write it into the run.
    """
    from engine.report import plane
    from engine.rundir import STAGES, STORE, fingerprint
    from engine.store import GradientStore

    inputs = {"select": run.stage_fingerprint("select"), "code": CODE}
    if run.exists(f"{STAGES}/map.json"):
        record = run.read_json(f"{STAGES}/map.json")
        if record["fingerprint"] == fingerprint(inputs):
            return record["result"]["map"]
    if not run.exists(STORE):
        return None
    started = time.monotonic()
    found = plane(GradientStore.open(run), rows)
    if keep:
        run.write_json(f"{STAGES}/map.inputs.json", inputs)
        run.finish("map", inputs, {"map": found, "seconds": round(time.monotonic() - started, 3)})
    return found


def _write_file(name: str, page: str) -> None:
    try:
        Path(name).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {name}: {(error.strerror or str(error)).lower()}.") from None
