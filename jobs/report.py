"""unbake report: gather what the stages left in the run directory into one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from engine.report import render
from engine.rundir import METRICS, REPORT, SELECTION
from jobs.job import Job


def report(job: Job) -> str:
    """Write report.html from what is there; its path. UserError when there is no selection yet."""
    run = job.run
    summary: dict[str, Any] = {}
    for stage in ("extract", "select"):
        run.stage_fingerprint(stage)
        summary[stage] = run.stage_result(stage)
    metrics = run.read_json(METRICS) if run.exists(METRICS) else None
    page = render(run, job.spec, metrics, run.read_table(SELECTION), summary)
    run.write_bytes(REPORT, page.encode())
    job.progress.log.write("report", "end", path=run.path(REPORT))
    job.progress.say(f"report: {run.path(REPORT)}")
    return run.path(REPORT)
