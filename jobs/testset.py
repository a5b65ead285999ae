"""The held-out documents: read once, split into a validation share for choices and a test share for judging."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from engine.corpus import read_labelled
from engine.evaluate.task import TestSet, match_labels
from engine.rundir import fingerprint
from jobs.job import Job

VALIDATION = "validation.parquet"
"""The validation share, in the columns that training reads."""


def load_test(job: Job) -> TestSet:
    """The test set, cut to `evaluate.max_documents`, labels as indices."""
    settings, corpus = job.spec.evaluate, job.spec.corpus
    text = settings.text or corpus.response or corpus.messages or corpus.text
    label = settings.label if job.spec.task.kind == "classification" else None
    texts, labels = read_labelled(settings.test, text, label, chat=corpus.messages is not None)
    prompts = None
    if corpus.prompt is not None:
        prompts = read_labelled(settings.test, corpus.prompt, None)[0]
    indices = None if labels is None else match_labels(labels, job.spec.task)
    return TestSet(texts, indices, prompts).at_most(settings.max_documents)


def write_validation(job: Job) -> str:
    """Write the validation share into the run for early stopping; the name of its file."""
    documents, _ = load_test(job).split(job.spec.evaluate.validation_share)
    labels = [-1] * len(documents) if documents.labels is None else documents.labels.tolist()
    columns = {"text": documents.texts, "label": pa.array(labels, pa.int32())}
    if documents.prompts is not None:
        columns |= {"prompt": documents.prompts, "response": documents.texts}
    job.run.write_table(VALIDATION, pa.table(columns))
    return VALIDATION


def content_hash(test: TestSet) -> str:
    """Fingerprint of documents, labels and prompts."""
    digest = hashlib.sha256()
    for text in test.texts:
        digest.update(text.encode() + b"\0")
    labels = None if test.labels is None else test.labels.tolist()
    return fingerprint([digest.hexdigest(), labels, test.prompts])
