"""unbake retrain: train the base model on the selection of every strategy and seed that is compared."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import cluster.resources
import cluster.train
from cluster.deepspeed_config import deepspeed_config
from cluster.examples import document_count
from cluster.session import session
from cluster.train import NO_BYTES, TrainJob
from engine.errors import UserError, install
from engine.rundir import LOGS, MODELS, TRAIN
from engine.spec import Retrain, Strategy
from engine.storage import Folder
from engine.train_log import check_loggers
from jobs.job import Job
from jobs.select import select_for
from jobs.testset import write_validation

CODE = 2
"""Raised whenever the same inputs would give other weights."""


def check(job: Job) -> None:
    """Find mistakes in the section before hours of work; UserError names the field."""
    deepspeed_config(job.spec.retrain, (1, 1), "float32")
    if job.spec.retrain.lora.rank and importlib.util.find_spec("peft") is None:
        raise UserError(f"retrain.lora needs PEFT: {install('adapters')}.")
    check_loggers(f"{job.run.uri}/{LOGS}", list(job.spec.retrain.loggers))
    _check_room(job)
    settings = job.spec.evaluate
    if job.spec.retrain.judges and not (settings.test and settings.validation_share):
        name = "early_stopping" if job.spec.retrain.early_stopping else "eval_steps"
        raise UserError(f"retrain.{name} needs evaluate.test and a validation_share above 0.")


def _check_room(job: Job) -> None:
    """Refuse workers that a private local Ray would wait for in vain; a cluster may still grow."""
    settings, ray = job.spec.retrain, job.spec.ray
    if ray.address or os.environ.get("RAY_ADDRESS"):
        return
    cpus = ray.num_cpus or os.cpu_count() or 1
    if settings.workers > cpus:
        raise UserError(
            f"retrain.workers is {settings.workers}, and this machine has {cpus} CPUs, of which each worker "
            "takes one at least: lower it, or give ray.address."
        )


def retrain(job: Job) -> dict[str, Any]:
    """Train all that is missing, as many at a time as the cluster holds; metrics of each by name."""
    check(job)
    job.run.stage_fingerprint("extract")  # refused now rather than after Ray's start
    todo: list[tuple[str, dict[str, Any], TrainJob]] = []
    results: dict[str, Any] = {}
    validation = write_validation(job) if job.spec.retrain.judges else None
    with session(job.spec.ray, job.verbose):
        for seed in job.spec.retrain.seeds:
            for strategy in job.spec.strategies:
                stage, inputs, work = _prepare(job, strategy, seed, validation)
                if job.run.completed(stage, inputs):
                    job.progress.skip(stage)
                    results[work.name] = job.run.stage_result(stage)
                else:
                    todo.append((stage, inputs, work))
        if todo:
            cluster.resources.check(job.spec, ("retrain",))
            results |= _train(job, todo)
    return results


def retrained(job: Job, strategy: Strategy, seed: int) -> tuple[str, str] | None:
    """(folder within the run, fingerprint) of a retrained model, or None when there is none."""
    stage = _stage(strategy, seed)
    if not job.run.exists(f"stages/{stage}.json"):
        return None
    return job.run.model_name(strategy, seed), job.run.stage_fingerprint(stage)


def _stage(strategy: Strategy, seed: int) -> str:
    return f"retrain-{strategy}-{seed}"


def train_job(
    job: Job,
    name: str,
    selection: str,
    validation: str | None,
    target: str,
    folder: str,
    retrain: Retrain,
    seed: int,
) -> TrainJob:
    """A training of the job's base model on a selection; checkpoints and logs lie below `folder`."""
    return TrainJob(
        name=name,
        base=job.endpoints.base,
        selection=selection,
        validation=validation,
        target=target,
        checkpoints=f"{folder}/{TRAIN}",
        task=job.spec.task,
        scope=job.spec.loss_scope,
        retrain=retrain,
        seed=seed,
        trust_remote_code=job.spec.models.trust_remote_code,
        base_hash=job.model_hashes["base"],
        finetuned=job.endpoints.finetuned,
        finetuned_hash=job.model_hashes["finetuned"],
        chat=job.spec.corpus.messages is not None,
        logs=f"{folder}/{LOGS}",
    )


def _prepare(
    job: Job, strategy: Strategy, seed: int, validation: str | None
) -> tuple[str, dict[str, Any], TrainJob]:
    selection = select_for(job, strategy, seed)
    name = f"{strategy}-{seed}"
    work = train_job(
        job,
        name,
        selection=f"{job.run.uri}/{selection}",
        validation=validation and f"{job.run.uri}/{validation}",
        target=f"{job.run.uri}/{job.run.model_name(strategy, seed)}",
        folder=job.run.uri,
        retrain=job.spec.retrain,
        seed=seed,
    )
    inputs = {
        "models.base": job.model_hashes["base"],
        "selection": work.hashes[work.selection],
        "validation": work.judged_on and work.hashes[work.judged_on],
        **job.section("task"),
        **job.section("retrain", without=NO_BYTES),
        "seed": seed,
        "code": CODE,
    }
    if job.spec.retrain.labels == "soft":
        inputs["models.finetuned"] = job.model_hashes["finetuned"]
    return _stage(strategy, seed), inputs, work


def _train(job: Job, todo: list[tuple[str, dict[str, Any], TrainJob]]) -> dict[str, Any]:
    """Train what is left, and record each that is done, also when another fails."""
    for stage, inputs, _ in todo:
        job.run.begin(stage, inputs)
    job.run.save_spec(job.spec)
    seen: dict[str, int] = {}
    each = {work.name: job.spec.retrain.epochs * document_count(work.selection) for _, _, work in todo}
    with job.progress.stage("retrain", sum(each.values()), "documents") as progress:

        def step(event: dict[str, Any]) -> None:
            name = event["job"]
            seen[name] = event["documents"]
            progress.row(name, event["documents"], each[name], step_text(event))
            progress.update(sum(seen.values()))

        try:
            cluster.train.train_many([work for _, _, work in todo], step)
            progress.update(sum(each.values()))
        except UserError:
            _record(job, todo)
            for stage, _, _ in todo:
                job.run.forget(stage)  # of those that failed: their inputs may be mended
            raise
    return _record(job, todo)


def step_text(event: dict[str, Any]) -> str:
    """How far a training has come, of an event of `cluster.train.train_many`."""
    return f"step {event['step']:,} of {event['steps']:,}, loss {event['loss']:.4f}"


def _record(job: Job, todo: list[tuple[str, dict[str, Any], TrainJob]]) -> dict[str, Any]:
    """Finish the stages whose model is there; metrics of each by name."""
    results = {}
    for stage, inputs, work in todo:
        folder = Folder(work.target)
        if folder.exists(cluster.train.DONE):
            results[work.name] = folder.read_json(cluster.train.DONE)
            files = job.run.walk(f"{MODELS}/{work.name}")
            job.run.finish(stage, inputs, results[work.name], files)
    return results
