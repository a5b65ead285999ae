"""Selections and models for other tools: training rows as TRL and axolotl read them, and cards for the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from engine.chat import load_chat
from engine.report.text import markdown
from engine.spec import RunSpec

TAGS = ["unbake", "training-data-attribution"]
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
COLUMNS = {
    "rank": "place in the order of picks, from 0",
    "row": "row of the seed corpus",
    "doc_id": "id of the document: the corpus' own, or a hash of its content",
    "text": "the document",
    "prompt": "the prompt, which carries no loss",
    "response": "the response, which does",
    "messages": "the chat",
    "label": "what the fine-tuned model calls it",
    "confidence": "how sure the fine-tuned model is; in language modelling, exp of minus the mean loss",
    "loss": "under the fine-tuned model",
    "alignment": "inner product of the document's gradient with the change in weights",
    "norm": "of the projected gradient",
    "objective": "cosine of the summed gradients with the change in weights, up to this pick",
    "gain": "what this pick added to it",
    "weight": "loss weight in training",
}
"""Column of a selection -> what it means; others are left out of an export."""


def dataset_table(selection: pa.Table, spec: RunSpec) -> pa.Table:
    """The selection as a data set: known columns, chats as lists of messages."""
    table = selection.select([name for name in COLUMNS if name in selection.column_names])
    if spec.corpus.messages is None:
        return table
    at = table.column_names.index("text")
    chats = [load_chat(text) for text in table["text"].to_pylist()]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return table.set_column(at, "messages", pa.array(chats, pa.list_(message)))


def training_rows(selection: pa.Table, spec: RunSpec) -> Iterator[dict[str, Any]]:
    """Rows as TRL's SFTTrainer reads them, axolotl too: the task decides the kind.

    Classification: prompt and completion, the prompt being the task's template and the completion a space and
    the label word. A chat: messages. Prompt and response: prompt and completion. Else: text. The template is
    filled with the whole text: what cuts it to `task.max_tokens` is the trainer's own limit.
    """
    before, _, after = spec.task.template.partition("{text}")
    for row in selection.to_pylist():
        if spec.task.kind == "classification":
            word = spec.task.labels[row["label"]]
            yield {"prompt": f"{before}{row['text']}{after}", "completion": f" {word}"}
        elif spec.corpus.messages is not None:
            yield {"messages": load_chat(row["text"])}
        elif spec.corpus.response is not None:
            yield {"prompt": row["prompt"], "completion": row["response"]}
        else:
            yield {"text": row["text"]}


def dataset_card(table: pa.Table, spec: RunSpec, facts: dict[str, Any]) -> str:
    """README.md of the data set's folder: what the Hub and `datasets.load_dataset` read, then what people do.

    Args:
        table: what `dataset_table` made; facts: `engine.report.facts.facts`.
    """
    size = next((name for limit, name in SIZES if table.num_rows < limit), "n>1M")
    data = DatasetCardData(
        pretty_name=facts["title"],
        task_categories=[_category(spec)],
        size_categories=[size],
        tags=TAGS,
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
        ],
        dataset_info={"features": [_feature(field, spec) for field in table.schema]},
    )
    columns = [f"- `{name}`: {COLUMNS[name]}" for name in table.column_names]
    return _card(data.to_yaml(), facts, ["## Columns", "", *columns])


def model_card(spec: RunSpec, facts: dict[str, Any], strategy: str, seed: int) -> str:
    """README.md of a retrained model: its base, what it was trained on, and how well it does.

    Args:
        facts: `engine.report.facts.facts` of the run.
    """
    metrics = facts["metrics"] or {"models": [], "metric": "accuracy"}
    value = next(
        (
            model["test"][metrics["metric"]]
            for model in metrics["models"]
            if (model["strategy"], model["seed"]) == (strategy, seed)
        ),
        None,
    )
    name = f"{_short(spec.models.base)}-{strategy}-{seed}"
    results = EvalResult(_category(spec), "unbake", "the run's test share", metrics["metric"], value)
    hub = not os.path.exists(spec.models.base) and spec.models.base.count("/") == 1
    data = ModelCardData(
        library_name="transformers",
        tags=TAGS,
        base_model=spec.models.base if hub else None,
        model_name=name if value is not None else None,
        eval_results=[results] if value is not None else None,
    )
    lines = [
        f"`{markdown(_short(spec.models.base))}` trained on the documents that {strategy} selected (training seed "
        f"{seed}), to come near to `{markdown(_short(spec.models.finetuned))}`.",
        "",
        *_scores(facts["metrics"], strategy),
    ]
    return _card(data.to_yaml(), facts | {"title": name}, lines)


def _card(head: str, facts: dict[str, Any], lines: list[str]) -> str:
    """Front matter, the run in a sentence, its warnings, what is special, and how to make it again."""
    warnings = [f"- {markdown(warning)}" for warning in facts["warnings"]]
    hashes = [f"- {markdown(name)}: `{digest}`" for name, digest in facts["hashes"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"---\n{head.strip()}\n---", "", f"# {markdown(facts['title'])}", "", markdown(facts["sentence"]), "",
        f"> {facts['caution']}", "", *([*warnings, ""] if warnings else []), *lines, "",
        "## How it was made", "", f"{versions}; sha256 of", "", *hashes,
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _scores(metrics: dict[str, Any] | None, strategy: str) -> list[str]:
    """The table of the comparison, with this model's strategy named first."""
    from engine.report.numbers import gap, plus_minus, value

    if not metrics:
        return []
    kind = metrics["metric"]
    rows = sorted(metrics["strategies"], key=lambda row: row["strategy"] != strategy)
    return [
        f"| base trained on | {kind} | gap closed | seeds |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {row['strategy']} | {plus_minus(row['mean'], row['spread'], kind)} | "
            f"{gap(row['gap_closed'], row['gap_spread'])} | {row['n']} |"
            for row in rows
        ),
        f"| nothing (base) | {value(metrics['base'], kind)} | | |",
        f"| true data (fine-tuned) | {value(metrics['finetuned'], kind)} | | |",
    ]


def _feature(field: pa.Field, spec: RunSpec) -> dict[str, Any]:
    """A column as `datasets` describes it, labels with their names."""
    if field.name == "label" and spec.task.kind == "classification":
        names = {str(i): name for i, name in enumerate(spec.task.names)}
        return {"name": field.name, "dtype": {"class_label": {"names": names}}}
    if field.name == "messages":
        parts = [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]
        return {"name": field.name, "list": parts}
    kinds = {"float": "float32", "double": "float64"}
    return {"name": field.name, "dtype": kinds.get(str(field.type), str(field.type))}


def _category(spec: RunSpec) -> str:
    return "text-classification" if spec.task.kind == "classification" else "text-generation"


def _short(source: str) -> str:
    return source.rstrip("/").rsplit("/", 1)[-1] or source
