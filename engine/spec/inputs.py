"""What a run is given: the two models, the seed corpus, the task, and what it is judged by."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.extend import OneOf
from engine.sections import Section

LARGEST_PARTITION, STEP, PARTITIONS = 4096, 256, 32
"""Documents of a partition at most and by how many it grows, and partitions of a corpus at least, by default."""

LoadIn = Literal["none", "8bit", "4bit"]
LossScope = Literal["last_token", "response", "all_tokens"]


class Models(Section):
    """The two endpoints. Each is a folder, a Hub name, a GGUF file, or (finetuned) a PEFT adapter on base."""

    base: str = Field(description="theta_0: local folder, Hub name or .gguf file")
    finetuned: str = Field(description="theta_f: the same, or a PEFT adapter folder")
    base_revision: str | None = Field(None, description="Hub revision of base")
    finetuned_revision: str | None = Field(None, description="Hub revision of finetuned")
    trust_remote_code: bool = Field(False, description="run Python code that a model repository ships")
    load_in: LoadIn = Field(
        "none", description="8bit, 4bit: gradients with weights packed by bitsandbytes (extra: quantization)"
    )


class Corpus(Section):
    """The seed corpus: files or a Hub data set, and which columns to read."""

    paths: list[str] = Field(default_factory=list, description="files, folders or globs, on any fsspec URI")
    hub: str | None = Field(None, description="Hub data set name or save_to_disk folder (extra: datasets)")
    hub_config: str | None = Field(None, description="configuration of the Hub data set")
    hub_split: str = Field("train", description="split of the Hub data set")
    hub_revision: str | None = Field(None, description="Hub revision of the data set")
    format: Annotated[str, OneOf(("auto", "parquet", "jsonl", "csv", "txt"))] = Field(
        "auto", description="file format"
    )
    text: str = Field("text", description="column with the document")
    id: str | None = Field(None, description="column with the document's id; default: a content hash")
    prompt: str | None = Field(None, description="column with a prompt that carries no loss")
    response: str | None = Field(None, description="column with the response that carries the loss")
    messages: str | None = Field(
        None, description="column with chats, lists of {role, content}; the assistant's turns carry the loss"
    )
    partition_rows: int | None = Field(
        None,
        ge=1,
        description="documents in a partition, the unit of work and resuming; default: 4096, fewer of a small corpus",
    )
    max_documents: int | None = Field(None, ge=1, description="read only the first so many documents")
    max_chars: int = Field(1_000_000, ge=1, description="longer documents are cut to so many characters")
    max_quarantined: float = Field(0.05, ge=0, le=1, description="stop when a larger share is quarantined")

    def partition_rows_of(self, documents: int) -> int:
        """Documents in a partition of a corpus of so many.

        By default a corpus makes PARTITIONS at least, so that all workers have work to the end; by 256, so that
        a partition divides into chunks of every size (`engine.store.StoreShape.chunk_rows`).
        """
        fitting = STEP * max(1, documents // (STEP * PARTITIONS))
        return self.partition_rows or min(LARGEST_PARTITION, fitting)

    @model_validator(mode="after")
    def _one_source(self) -> Corpus:
        if bool(self.paths) == bool(self.hub):
            raise ValueError("give either corpus.paths or corpus.hub, not both and not neither")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("corpus.prompt and corpus.response must be given together")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("give either corpus.messages or corpus.prompt and corpus.response")
        return self


class Task(Section):
    """What the fine-tuned model was trained to do, and how a document becomes a training example."""

    kind: Literal["classification", "language_modelling"] = Field("classification")
    labels: list[str] = Field(default_factory=list, description="label words; each one token after a space")
    display_names: list[str] | None = Field(None, description="names of the labels in tables and the report")
    template: str = Field("{text}\nTopic:", description="classification prompt; must contain {text}")
    max_tokens: int = Field(128, ge=2, description="tokens of text kept, before the template is applied")
    label_softmax: Literal["restricted", "full"] = Field(
        "restricted", description="softmax over the labels alone, or over the whole vocabulary"
    )
    loss_scope: LossScope | None = Field(
        None,
        description="tokens that carry loss; default: last_token (classification), response when the corpus "
        "has prompt/response columns or messages, else all_tokens",
    )

    @model_validator(mode="after")
    def _coherent(self) -> Task:
        if self.kind == "classification":
            if len(self.labels) < 2:
                raise ValueError("task.labels needs at least two label words for classification")
            if self.template.count("{text}") != 1:
                raise ValueError("task.template must contain {text} once")
            if self.template.rstrip(" ") != self.template:
                raise ValueError("task.template must not end in a space: the label words bring their own")
            if re.search(r"\\n(?![a-z])", self.template):
                raise ValueError(
                    "task.template has a backslash and an n, where a line break must be meant: YAML reads one in "
                    "double quotes, bash in $'...'"
                )
            if self.loss_scope not in (None, "last_token"):
                raise ValueError("task.loss_scope must be last_token for classification")
            if self.display_names is not None and len(self.display_names) != len(self.labels):
                raise ValueError("task.display_names must name every label of task.labels")
        elif self.labels:
            raise ValueError("task.labels is for classification; remove it for language_modelling")
        return self

    @property
    def names(self) -> list[str]:
        """Display names of the labels, in label order."""
        return self.display_names or self.labels


class Evaluate(Section):
    """The test set, and the true training set where it is known."""

    test: list[str] = Field(
        default_factory=list, description="files of held-out documents; empty: no evaluation"
    )
    text: str | None = Field(None, description="text column of the test set; default: corpus.text")
    label: str = Field("label", description="label column: index, label word or display name")
    validation_share: float = Field(0.3, ge=0, lt=1, description="share of the test files used for choices")
    max_documents: int | None = Field(None, ge=1, description="documents judged at most, validation and test")
    tokens_per_batch: int = Field(4096, ge=1)
    train: list[str] = Field(
        default_factory=list, description="files of the true training set, for distances (extra: distances)"
    )
    embedder: str = Field(
        "auto", description="sentence-transformers folder, or base; auto: MiniLM where installed, else base"
    )
    compared: int = Field(10_000, ge=2, description="documents of a set that distances compare at most")
