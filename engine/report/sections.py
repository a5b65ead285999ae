"""What the page says: plain values for the template, from the spec, the metrics and the stages' results."""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa

from engine.report import documents, numbers, plots
from engine.rundir import SPEC, STAGES, RunDir
from engine.spec import RunSpec

PACKAGES = ("unbake", "torch", "transformers", "ray", "deepspeed", "zarr", "numpy", "pyarrow")
STAGE_ORDER = ("extract", "select", "retrain", "evaluate")


def context(
    run: RunDir, spec: RunSpec, metrics: dict[str, Any] | None, selection: pa.Table, summary: dict[str, Any]
) -> dict[str, Any]:
    """Everything page.html uses; see `engine.report.render` for the arguments."""
    select, extract = summary.get("select") or {}, summary.get("extract") or {}
    objective = _objective(selection, select)
    block, in_block = documents.data_block(selection, spec.task.names)
    return {
        "title": f"What {_short_name(spec.models.finetuned)} may have learned from",
        "sentence": sentence(spec, metrics, selection, select, extract, objective),
        "warnings": _warnings(metrics, summary, objective),
        "spec": spec,
        "metrics": metrics,
        "standard_error": _standard_error(metrics),
        "comparison": plots.comparison(metrics) if metrics else None,
        "objective": objective,
        "certificate": select.get("certificate") or {},
        "labels": _labels(selection, extract, spec.task.names),
        "confidence": plots.confidence(
            _numbers(selection, "confidence"), extract.get("confidence_histogram")
        ),
        "map": plots.scatter(summary["map"]) if summary.get("map") else None,
        "documents": documents.first(selection, spec.task.names),
        "data": block,
        "n_selected": selection.num_rows,
        "n_searchable": in_block,
        "extract": extract,
        "diagnostics": summary.get("diagnostics") or {},
        "stages": _stages(run, summary),
        "command": f"unbake recover --config {shlex.quote(run.path(SPEC))}",
        "versions": summary.get("versions") or versions(),
        "yaml": spec.to_yaml(),
        "spec_hash": hashlib.sha256(spec.to_yaml().encode()).hexdigest(),
    }


def sentence(
    spec: RunSpec,
    metrics: dict[str, Any] | None,
    selection: pa.Table,
    select: dict[str, Any],
    extract: dict[str, Any],
    objective: dict[str, Any] | None,
) -> str:
    """The whole run in one sentence."""
    strategy = select.get("strategy", spec.select.strategy)
    n = select.get("candidates") or select.get("eligible") or extract.get("documents")
    corpus = f"{n:,} documents" if n else "all documents"
    start = (
        f"Out of {corpus}, {strategy} chose {selection.num_rows:,} as the most useful for turning "
        f"{_short_name(spec.models.base)} into {_short_name(spec.models.finetuned)}"
    )
    rows = {row["strategy"]: row for row in metrics["strategies"]} if metrics else {}
    row = rows.get(strategy)
    if metrics and row and row["mean"] is not None:
        name, random = metrics["metric"], rows.get("random")
        reached = numbers.plus_minus(row["mean"], row["spread"], name)
        beside = [f"fine-tuned {numbers.value(metrics['finetuned'], name)}"]
        if random and strategy != "random":
            beside.insert(0, f"random documents {numbers.value(random['mean'], name)}")
        closed = row["gap_closed"] if strategy != "random" else None
        share = f", {numbers.gap(closed, None)} of the gap between the two" if closed and closed > 0 else ""
        end = f"the base model reaches {reached} {name} ({', '.join(beside)}){share}"
        return f"{start}: trained on them, {end}."
    if objective:
        cosine = numbers.fixed(objective["last"], 3)
        return f"{start}: their summed gradient has cosine {cosine} with the change in weights."
    return f"{start}."


def versions() -> dict[str, str]:
    """Versions of the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _objective(selection: pa.Table, select: dict[str, Any]) -> dict[str, Any] | None:
    """The path of f with its peak, and its figures; None without an objective."""
    path = select.get("path")
    values = np.array(path, np.float64) if path else _numbers(selection, "objective")
    if values.size == 0:
        return None
    at = int(np.argmax(values))
    peak = select.get("peak") or {"size": at + 1, "value": float(values[at])}
    random = select.get("random_path") or None
    return {
        "size": selection.num_rows,
        "last": float(values[min(selection.num_rows, values.size) - 1]),
        "peak": peak,
        "random": {"mean": random["mean"][-1], "std": random["std"][-1]}
        if random and random["mean"]
        else None,
        "path": plots.objective(values, peak, random),
        "norm": plots.norms(_numbers(selection, "norm")),
    }


def _labels(selection: pa.Table, extract: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Per label: name, and count and share in the selection and, where known, in the corpus."""
    if not names or "label" not in selection.column_names:
        return []
    label = selection["label"].fill_null(-1).to_numpy()
    chosen = np.bincount(label[(label >= 0) & (label < len(names))], minlength=len(names))
    counted = extract.get("label_counts") or []
    corpus = np.array(counted if len(counted) == len(names) else [0] * len(names), np.int64)
    return [
        {
            "name": name,
            "selected": int(chosen[i]),
            "selected_share": float(chosen[i] / max(1, chosen.sum())),
            "corpus": int(corpus[i]) if corpus.any() else None,
            "corpus_share": float(corpus[i] / corpus.sum()) if corpus.any() else None,
        }
        for i, name in enumerate(names)
    ]


def _stages(run: RunDir, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Duration and fingerprint of every completed stage, in the order of the pipeline."""
    rows = []
    for file in run.names(STAGES):
        if file.endswith(".json") and not file.endswith(".inputs.json"):
            name, record = file.removesuffix(".json"), run.read_json(f"{STAGES}/{file}")
            seconds = (record.get("result") or summary.get(name) or {}).get("seconds")
            rows.append({"name": name, "seconds": seconds, "fingerprint": str(record.get("fingerprint", ""))})
    return sorted(rows, key=lambda row: ([not row["name"].startswith(s) for s in STAGE_ORDER], row["name"]))


def _standard_error(metrics: dict[str, Any] | None) -> float | None:
    """Binomial standard error of the fine-tuned model's accuracy on the test documents."""
    measured = ((metrics or {}).get("measured") or {}).get("test")
    if not metrics or not measured or metrics["metric"] != "accuracy" or metrics["finetuned"] is None:
        return None
    p = metrics["finetuned"]
    return math.sqrt(p * (1 - p) / measured["documents"])


def _warnings(
    metrics: dict[str, Any] | None, summary: dict[str, Any], objective: dict[str, Any] | None
) -> list[str]:
    found = [*(metrics or {}).get("warnings", []), *summary.get("warnings", [])]
    if objective and objective["peak"]["size"] < 0.9 * objective["size"]:
        found.append(
            f"The objective peaks at {objective['peak']['size']:,} of {objective['size']:,} documents and "
            "falls after that: select.stop=at_peak keeps the part before."
        )
    return list(dict.fromkeys(found))


def _numbers(selection: pa.Table, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column's finite values as float64, in order; empty when it is absent."""
    if column not in selection.column_names:
        return np.zeros(0)
    values = [v for v in selection[column].to_pylist() if v is not None and math.isfinite(v)]
    return np.array(values, np.float64)


def _short_name(source: str) -> str:
    """The last part of a model's path or Hub name."""
    return source.rstrip("/").rsplit("/", 1)[-1] or source
