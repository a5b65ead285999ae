"""Making a fine-tuned model to recover from: labelled documents in, a model folder out, by our own trainer."""

from __future__ import annotations

import os

import pyarrow.parquet as pq

from cluster.session import session
from cluster.train import TrainJob, train
from jobs.job import Job


def fine_tune(
    job: Job, documents: str, epochs: int, seed: int, trajectory: str | None = None, every: int | None = None
) -> None:
    """Train `models.base` on a Parquet file (text, label) into the folder `models.finetuned`, once.

    The recipe is the spec's retrain section with other epochs. Nothing else of the run sees `documents`.

    Args:
        trajectory: folder that keeps the model of every `every`-th step (default: of every epoch), for
            `unbake diagnose --trajectory`.
    """
    spec = job.spec
    if os.path.isfile(f"{spec.models.finetuned}/config.json"):
        job.progress.skip("fine-tune")
        return
    # soft labels are those of the model that is made here
    recipe = spec.retrain.model_copy(update={"epochs": epochs, "labels": "hard"})
    if trajectory is not None:
        recipe = recipe.model_copy(update={"checkpoint_steps": every})
    work = TrainJob(
        name="fine-tune",
        base=spec.models.base,
        selection=documents,
        target=spec.models.finetuned,
        checkpoints=job.run.path("train"),
        task=spec.task,
        scope=spec.loss_scope,
        retrain=recipe,
        seed=seed,
        trajectory=trajectory,
    )
    total = epochs * pq.read_metadata(documents).num_rows
    with session(spec.ray, job.verbose), job.progress.stage("fine-tune", total, "documents") as stage:
        train(work, lambda event: stage.update(event["documents"]))
        stage.update(total)
