"""unbake evaluate: judge base, fine-tuned and every retrained model on the test set; write metrics.json."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from engine.errors import UserError
from engine.evaluate.comparison import metrics
from engine.evaluate.task import evaluate_model
from engine.experiment.grid import Judged
from engine.models import load_model, torch_dtype
from engine.rundir import METRICS
from engine.sources import resolve
from engine.spec import SEEDED, Retrain
from jobs.distances import distances, true_set
from jobs.job import Job, local_copy
from jobs.retrain import retrained
from jobs.select import select_for
from jobs.table import print_table

CODE = 1
"""Raised whenever the same inputs would give other numbers."""

DISTANCES = ("train", "embedder", "compared")
"""Fields of the section that concern the true data alone."""


def metric_of(job: Job) -> str:
    """What the task is judged by."""
    return "accuracy" if job.spec.task.kind == "classification" else "perplexity"


def judge_endpoints(job: Job) -> list[dict[str, Any]]:
    """Judge the base and the fine-tuned model: the first two entries of `evaluate`."""
    if not job.spec.evaluate.test:
        raise UserError("evaluate.test names no files: give held-out documents to judge the models on.")
    _ = job.test  # a broken test set is found before the models are hashed
    both = ("base", job.endpoints.base), ("finetuned", job.endpoints.finetuned)
    return [_judge(job, name, None, None, folder, job.model_hashes[name]) for name, folder in both]


def evaluate(job: Job, endpoints: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Judge every model that exists; each judgement is a stage of its own, so that adding one repeats none.

    Args:
        endpoints: what `judge_endpoints` gave, if it was asked before.
    """
    started = time.monotonic()
    models = list(endpoints or judge_endpoints(job))
    for strategy in job.spec.strategies:
        for seed in job.spec.retrain.seeds:
            found = retrained(job, strategy, seed)
            if found is not None:
                models.append(_judge(job, "retrained", strategy, seed, *found))
    result = metrics(models, metric_of(job), round(time.monotonic() - started, 3))
    if job.spec.evaluate.train:
        result["distances"] = _distances(job, models)
    job.run.write_json(METRICS, result)
    print_table(result, job.progress.out)
    for warning in result["warnings"]:
        job.progress.warn("evaluate", warning)
    return result


def _judge(
    job: Job, model: str, strategy: str | None, seed: int | None, folder: str, identity: str
) -> dict[str, Any]:
    name = model if strategy is None else f"{strategy}-{seed}"
    below = frozen_below(job.spec.retrain)
    judge = lambda: measure(job, name, folder, frozen_below=below)  # noqa: E731
    entry = {"model": model, "strategy": strategy, "seed": seed}
    inputs = judgement_inputs(job, identity, frozen_below=below)
    return entry | job.guarded(f"evaluate-{name}", inputs, judge)


def _distances(job: Job, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Distances of every retrained model's selection from the true training set, each selection once."""
    true = true_set(job)
    rows: dict[str, dict[str, Any]] = {}
    for entry in models:
        if entry["model"] == "retrained":
            name = select_for(job, entry["strategy"], entry["seed"])
            stage = f"distances-{os.path.basename(name).removesuffix('.parquet')}"
            own = entry["seed"] if entry["strategy"] in SEEDED else None
            rows[name] = {"strategy": entry["strategy"], "seed": own, **distances(job, stage, name, true)}
    return list(rows.values())


def judgement_inputs(
    job: Job, identity: str, parts: Judged = "both", frozen_below: int = 0
) -> dict[str, Any]:
    """All that a judgement's numbers depend on; `identity` is the model's hash or fingerprint.

    Args:
        parts, frozen_below: as for `measure`.
    """
    return {
        "model": identity,
        "test": job.test.fingerprint,
        **job.section("task"),
        **job.section("evaluate", without=("test", "text", "label", "max_documents", *DISTANCES)),
        "gradients.dtype": job.spec.gradients.dtype,
        "code": CODE,
        **({} if parts == "both" else {"parts": parts}),
        **({"frozen_below": frozen_below} if frozen_below else {}),
    }


def frozen_below(retrain: Retrain) -> int:
    """The block whose entering states are kept from one judgement to the next, by the recipe; 0: none are."""
    return retrain.freeze_below if retrain.cache_frozen else 0


def measure(
    job: Job, name: str, folder: str, parts: Judged = "both", frozen_below: int = 0
) -> dict[str, Any]:
    """Judge one model folder: {"validation", "test"} as `evaluate_model` returns them, and seconds.

    Args:
        parts: which of the two are judged; the other is None.
        frozen_below: as for `evaluate_model`.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    remote = job.spec.models.trust_remote_code
    shares = dict(
        zip(("validation", "test"), job.test.split(job.spec.evaluate.validation_share), strict=True)
    )
    asked = {
        part: documents
        for part, documents in shares.items()
        if parts in ("both", part) and (len(documents) or part == parts or part == "test")
    }
    settings = job.spec.evaluate.tokens_per_batch, job.spec.task.label_softmax, frozen_below
    total = sum(map(len, asked.values()))
    with job.progress.stage(f"evaluate-{name}", total, "documents") as stage:
        path = folder if os.path.isabs(folder) else local_copy(job.run, folder)
        with tempfile.TemporaryDirectory(prefix="unbake-") as scratch:  # for an adapter, merged
            path = resolve(path, f"{scratch}/merged", job.endpoints.base, trust_remote_code=remote)
            loaded = load_model(path, torch_dtype(job.spec.gradients.dtype), device, remote)
        found: dict[str, Any] = {"validation": None, "test": None}
        for part, documents in asked.items():
            found[part] = evaluate_model(loaded, job.encoder, documents, *settings)
            stage.advance(len(documents))
        if device == "cuda":  # the memory is the workers' that come after
            del loaded
            torch.cuda.empty_cache()
        return found | {"seconds": round(stage.seconds, 3)}
