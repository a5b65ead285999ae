"""The whole pipeline, behind `unbake recover` and `jobs.recover`; complete stages that still fit are skipped."""

from __future__ import annotations

from typing import Any

from cluster.session import session
from jobs.evaluate import evaluate
from jobs.extract import extract, prepare
from jobs.job import Job
from jobs.report import report
from jobs.retrain import check, retrain
from jobs.select import select
from jobs.testset import load_test


def recover(job: Job) -> dict[str, Any]:
    """Extract, select, retrain, evaluate (where a test set is given) and report, in one Ray session."""
    check(job)
    if job.spec.evaluate.test:
        load_test(job)  # a broken test set is found now, not after the hours before its turn
    ready = prepare(job)
    with session(job.spec.ray, job.verbose):
        results: dict[str, Any] = {"extract": extract(job, ready)}
        results |= {"select": select(job), "retrain": retrain(job)}
    if job.spec.evaluate.test:
        results["evaluate"] = evaluate(job)
    results["report"] = report(job)
    return results
