"""The whole pipeline, behind `unbake recover` and `jobs.recover`; complete stages that still fit are skipped."""

from __future__ import annotations

from typing import Any

from cluster.session import session
from engine.evaluate.comparison import metrics
from engine.rundir import STAGES, STORE
from jobs.diagnose import diagnose
from jobs.evaluate import evaluate, judge_endpoints, metric_of
from jobs.extract import extract, prepare
from jobs.job import Job
from jobs.report import report
from jobs.retrain import check, retrain
from jobs.select import select

DIAGNOSED_SECONDS = 300.0
"""A selection that took longer is not diagnosed by itself: the negative controls search for it twice more."""


def recover(job: Job) -> dict[str, Any]:
    """Extract, select, retrain, evaluate (where a test set is given), diagnose (where that is cheap) and report."""
    check(job)
    if job.spec.evaluate.test:
        _ = job.test  # read here: a broken test set is found now, not after the hours before its turn
    ready = prepare(job)
    endpoints = _judge_first(job)
    with session(job.spec.ray, job.verbose):
        results: dict[str, Any] = {"extract": extract(job, ready)}
        results |= {"select": select(job), "retrain": retrain(job)}
    if job.spec.evaluate.test:
        results["evaluate"] = evaluate(job, endpoints)
    if cheap(job, results["select"]):
        results["diagnose"] = diagnose(job)
    results["report"] = report(job)
    return results


def cheap(job: Job, selected: dict[str, Any]) -> bool:
    """Whether diagnosing is cheap, so a run ends with it: the store is here and one process searches it soon."""
    return job.run.exists(STORE) and job.spec.select.shards == 1 and selected["seconds"] <= DIAGNOSED_SECONDS


def _judge_first(job: Job) -> list[dict[str, Any]] | None:
    """Judge base and fine-tuned model before a new run's hours: swapped models or a wrong template show here."""
    if not job.spec.evaluate.test or job.run.exists(f"{STAGES}/extract.inputs.json"):
        return None
    for name in ("base", "finetuned"):  # of a start that was stopped to mend what it showed
        for record in (f"{STAGES}/evaluate-{name}.json", f"{STAGES}/evaluate-{name}.inputs.json"):
            job.run.remove(record)
    endpoints = judge_endpoints(job)
    for warning in metrics(endpoints, metric_of(job), 0.0)["warnings"]:
        job.progress.warn("evaluate", warning)
    return endpoints
