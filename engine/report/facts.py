"""What a report says, in any format: plain values from the spec, the metrics and the stages' results."""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.evaluate.comparison import half_width
from engine.report import numbers
from engine.report.findings import findings, sentences
from engine.rundir import SPEC, STAGES, RunDir
from engine.spec import RunSpec

PACKAGES = ("unbake", "torch", "transformers", "ray", "deepspeed", "zarr", "numpy", "pyarrow")
STAGE_ORDER = ("extract", "select", "retrain", "evaluate")
CAUTION = (
    "A selected document is not evidence of membership in the training set: it is evidence of usefulness. "
    "It moves the base model the way the fine-tuned model went, whether or not it was ever trained on."
)
DISTANCES = {
    "transport": "emd",
    "Sinkhorn": "sinkhorn",
    "edit": "edit",
    "true words": "vocabulary",
    "true documents": "true_found",
}
"""Columns of the table of distances from the true set -> keys of `engine.evaluate.distances.compare_sets`."""
HASHES = {"models.base": "base weights", "models.finetuned": "fine-tuned weights", "corpus": "corpus plan"}
"""Inputs of the extract stage that identify what a run was made from, and their names in the report."""


def facts(
    run: RunDir, spec: RunSpec, metrics: dict[str, Any] | None, selection: pa.Table, summary: dict[str, Any]
) -> dict[str, Any]:
    """Everything that every format shows, JSON-able; see `engine.report.render` for the arguments."""
    select, extract = summary.get("select") or {}, summary.get("extract") or {}
    objective = _objective(selection, select)
    stages = _stages(run, summary)
    return {
        "title": f"What {_short_name(spec.models.finetuned)} may have learned from",
        "sentence": sentence(spec, metrics, selection, select, extract, objective),
        "caution": CAUTION,
        "warnings": _warnings(metrics, summary, objective),
        "strategy": select.get("strategy", spec.select.strategy),
        "n_selected": selection.num_rows,
        "metrics": metrics,
        "gap_intervals": gap_intervals(metrics),
        "standard_error": _standard_error(metrics),
        "objective": objective,
        "certificate": select.get("certificate") or {},
        "labels": _labels(selection, extract, spec.task.names),
        "confidence": _confidence(selection, extract.get("confidence_histogram")),
        "map": summary.get("map"),
        "extract": extract,
        "diagnostics": summary.get("diagnostics") or {},
        "findings": findings(summary.get("diagnosed")),
        "stages": stages,
        "total_seconds": _total(stages, "seconds"),
        "total_cost": _total(stages, "cost"),
        "command": f"unbake recover --config {shlex.quote(run.path(SPEC))}",
        "diagnose": f"unbake diagnose {shlex.quote(run.uri)}",
        "versions": summary.get("versions") or versions(),
        "hashes": _hashes(run, spec),
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
        kind = "preconditioned gradient" if objective["preconditioned"] else "gradient"
        return f"{start}: their summed {kind} has cosine {cosine} with the change in weights."
    return f"{start}."


def gap_intervals(metrics: dict[str, Any] | None) -> dict[str, tuple[float, float]]:
    """95% interval of the gap each strategy closes, by Student's t over paired seeds; left out where unknown."""
    found = {}
    for row in (metrics or {"strategies": []})["strategies"]:
        half = half_width(row["gap_spread"], row.get("gap_n", row["n"]))
        if row["gap_closed"] is not None and half:  # random itself has none
            found[row["strategy"]] = (row["gap_closed"] - half, row["gap_closed"] + half)
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def objective_path(selection: pa.Table, select: dict[str, Any]) -> npt.NDArray[np.float64]:
    """f after each pick, (k,), beyond the selection's end where that was cut at the peak; empty if unknown."""
    path = select.get("path")
    return np.array(path, np.float64) if path else column(selection, "objective")


def _objective(selection: pa.Table, select: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the path of f; None without an objective."""
    values = objective_path(selection, select)
    if values.size == 0:
        return None
    at = int(np.argmax(values))
    random = select.get("random_path") or None
    return {
        "size": selection.num_rows,
        "last": float(values[min(selection.num_rows, values.size) - 1]),
        "peak": select.get("peak") or {"size": at + 1, "value": float(values[at])},
        "random": {"mean": random["mean"][-1], "std": random["std"][-1]}
        if random and random["mean"]
        else None,
        "preconditioned": bool(select.get("preconditioned")),
    }


def _confidence(selection: pa.Table, corpus: dict[str, Any] | None) -> dict[str, Any] | None:
    """Counts of confidence between common edges: selected, and the corpus (None where unknown)."""
    values = column(selection, "confidence")
    if values.size == 0:
        return None
    edges = np.array(corpus["edges"], np.float64) if corpus else np.linspace(0, 1, 21)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {
        "edges": edges.tolist(),
        "selected": counts.tolist(),
        "corpus": corpus["counts"] if corpus and sum(corpus["counts"]) else None,
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
    """Time, cost and fingerprint of every completed stage, in the order of the pipeline.

    The time is the log's, over all starts, where the log has the stage, else the last start's. Models are
    retrained in one go: the stage retrain has the time of all, with their start, and they are `part` of it.
    """
    spent, price = summary.get("spent") or {}, summary.get("price_per_hour")
    rows = []

    def add(name: str, seconds: float | None, stamp: str) -> None:
        cost = seconds / 3600 * price if seconds is not None and price is not None else None
        part = name.startswith("retrain-") and "retrain" in spent
        rows.append({"name": name, "seconds": seconds, "cost": cost, "fingerprint": stamp, "part": part})

    if "retrain" in spent:
        add("retrain", spent["retrain"], "")
    for file in run.names(STAGES):
        if file.endswith(".json") and not file.endswith(".inputs.json"):
            name, record = file.removesuffix(".json"), run.read_json(f"{STAGES}/{file}")
            seconds = spent.get(name, (record.get("result") or summary.get(name) or {}).get("seconds"))
            add(name, seconds, str(record.get("fingerprint", "")))
    return sorted(rows, key=lambda row: ([not row["name"].startswith(s) for s in STAGE_ORDER], row["name"]))


def _total(stages: list[dict[str, Any]], what: str) -> float | None:
    """Sum over the stages that are no part of another; None where nothing is known."""
    return math.fsum(stage[what] or 0.0 for stage in stages if not stage["part"]) or None


def _hashes(run: RunDir, spec: RunSpec) -> dict[str, str]:
    """sha256 of what the run was made from, by a name."""
    found = {"spec.yaml": hashlib.sha256(spec.to_yaml().encode()).hexdigest()}
    name = f"{STAGES}/extract.inputs.json"
    inputs = run.read_json(name) if run.exists(name) else {}
    return found | {HASHES[field]: str(inputs[field]) for field in HASHES if inputs.get(field)}


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
    found += sentences(summary.get("diagnosed"))
    if objective and objective["peak"]["size"] < 0.9 * objective["size"]:
        found.append(
            f"The objective peaks at {objective['peak']['size']:,} of {objective['size']:,} documents and "
            "falls after that: select.stop=at_peak keeps the part before."
        )
    return list(dict.fromkeys(found))


def column(selection: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """A column's finite values as float64, in order; empty when it is absent."""
    if name not in selection.column_names:
        return np.zeros(0)
    values = [v for v in selection[name].to_pylist() if v is not None and math.isfinite(v)]
    return np.array(values, np.float64)


def _short_name(source: str) -> str:
    """The last part of a model's path or Hub name."""
    return source.rstrip("/").rsplit("/", 1)[-1] or source
