"""Distances of selections from the true training set, where `evaluate.train` names it; one stage a selection."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.checkpoints import weights_hash
from engine.corpus import read_labelled
from engine.evaluate.distances import Documents, compare_sets, nearest
from engine.evaluate.embedding import Embedder, embedder_folder
from engine.evaluate.task import TestSet, match_labels
from engine.rundir import NEAREST, SELECTION
from jobs.job import Job

CODE = 2
"""Raised whenever the same inputs would give other numbers."""


@dataclass
class TrueSet:
    """The true training set of a run: its documents, and their embeddings once they are asked for.

    texts: of chats their canonical text, of responses these alone, with their prompts beside them.
    """

    texts: list[str]
    labels: np.ndarray[Any, np.dtype[np.int64]] | None
    folder: str
    prompts: list[str] | None = None

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The embedder of the run."""
        import torch

        return Embedder(self.folder, "cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def documents(self) -> Documents:
        """The true set, embedded."""
        return Documents(self.texts, self.embedder.embed(self.texts), self.labels)

    @functools.cached_property
    def identity(self) -> list[str]:
        """Fingerprint of documents and embedder."""
        return [TestSet(self.texts, self.labels, self.prompts).fingerprint, weights_hash(self.folder)]


@functools.lru_cache(maxsize=4)
def _load(
    paths: tuple[str, ...],
    text: str,
    label: str | None,
    task: str,
    folder: str,
    prompt: str | None,
    chat: bool,
) -> TrueSet:
    from engine.spec import Task

    texts, labels = read_labelled(list(paths), text, label, chat=chat)
    indices = None if labels is None else match_labels(labels, Task.model_validate_json(task))
    prompts = None if prompt is None else read_labelled(list(paths), prompt, None)[0]
    return TrueSet(texts, indices, folder, prompts)


def true_set(job: Job) -> TrueSet:
    """The true training set of a run, read once a process.

    Raises:
        UserError: a file of evaluate.train is missing, unreadable or has other columns than the test set.
    """
    settings, corpus = job.spec.evaluate, job.spec.corpus
    text = settings.text or corpus.response or corpus.messages or corpus.text
    label = settings.label if job.spec.task.kind == "classification" else None
    folder = embedder_folder(settings.embedder, job.endpoints.base)
    task = job.spec.task.model_dump_json()
    chat = corpus.messages is not None
    return _load(tuple(settings.train), text, label, task, folder, corpus.prompt, chat)


def distances(job: Job, stage: str, selection: str, true: TrueSet) -> dict[str, Any]:
    """Distances of one selection file of the run; see `engine.evaluate.distances.compare_sets`."""
    table = job.run.read_table(selection)
    texts = table["response" if job.spec.corpus.response else "text"].to_pylist()
    labels = None if true.labels is None else table["label"].to_numpy().astype(np.int64)
    inputs = {
        "selection": TestSet(texts, labels).fingerprint,
        "evaluate.train": true.identity,
        "evaluate.compared": job.spec.evaluate.compared,
        "code": CODE,
    }

    def compare() -> dict[str, Any]:
        with job.progress.stage(stage, len(texts), "documents") as progress:
            chosen = Documents(texts, true.embedder.embed(texts), labels)
            found = compare_sets(chosen, true.documents, job.spec.evaluate.compared)
            if selection == SELECTION:  # for the report
                near, distance = nearest(chosen, true.documents)
                columns = {"nearest": [true.texts[i] for i in near], "nearest_distance": distance}
                job.run.write_table(NEAREST, pa.table(columns))
            progress.update(len(texts))
            return found | {"seconds": round(progress.seconds, 3)}

    return job.guarded(stage, inputs, compare)
