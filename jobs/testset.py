"""The held-out documents: read from the spec's files, and their validation share as training reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from engine.corpus import read_labelled
from engine.evaluate.task import TestSet, match_labels
from engine.spec import RunSpec

if TYPE_CHECKING:
    from jobs.job import Job

VALIDATION = "validation.parquet"
"""The validation share, in the columns that training reads."""


def read_test(spec: RunSpec) -> TestSet:
    """The test set, cut to `evaluate.max_documents`, labels as indices."""
    settings, corpus = spec.evaluate, spec.corpus
    text = settings.text or corpus.response or corpus.messages or corpus.text
    label = settings.label if spec.task.kind == "classification" else None
    texts, labels = read_labelled(settings.test, text, label, chat=corpus.messages is not None)
    prompts = None
    if corpus.prompt is not None:
        prompts = read_labelled(settings.test, corpus.prompt, None)[0]
    indices = None if labels is None else match_labels(labels, spec.task)
    return TestSet(texts, indices, prompts).at_most(settings.max_documents)


def write_validation(job: Job) -> str:
    """Write the validation share into the run for early stopping; the name of its file."""
    documents, _ = job.test.split(job.spec.evaluate.validation_share)
    labels = [-1] * len(documents) if documents.labels is None else documents.labels.tolist()
    columns = {"text": documents.texts, "label": pa.array(labels, pa.int32())}
    if documents.prompts is not None:
        columns |= {"prompt": documents.prompts, "response": documents.texts}
    job.run.write_table(VALIDATION, pa.table(columns))
    return VALIDATION
