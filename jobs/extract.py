"""unbake extract: plan the corpus, lay out the store, and stream every document's gradients into it."""

from __future__ import annotations

import collections
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import cluster.extract
import cluster.resources
from cluster.session import gpus_per_worker, session
from engine.checkpoints import added_tokens
from engine.corpus import Plan, make_plan
from engine.errors import UserError
from engine.rundir import QUARANTINE, STAGES, fingerprint
from engine.sources import is_quantised
from engine.store import VALID, GradientStore, StoreShape
from engine.target import Target, choose_target
from jobs.job import Job

STAGE = "extract"
CODE = 3
"""Raised whenever the same inputs would give other bytes."""

REASONS = 20
"""Kinds of quarantine reasons counted by name; quarantine.parquet has the reason of each document."""

LOW_CONFIDENCE = 0.5
"""Mean confidence of the fine-tuned model on the corpus below which its labels are doubted (classification)."""


@dataclass(frozen=True)
class Prepared:
    """What extraction needs to know beforehand; delta (dim,) and its norm are None once the stage is complete."""

    plan: Plan
    target: Target
    delta: tuple[npt.NDArray[np.float64], float] | None


def prepare(job: Job) -> Prepared:
    """Find every mistake that can be found without Ray and without loading a model; plan the corpus.

    Raises:
        UserError: models, labels, layers or corpus are not usable; the run directory is left as it was.
    """
    with job.run.unchanged_on_mistake():
        target = choose_target(job.spec, job.endpoints, job.encoder.label_ids)
        complete = job.run.exists(f"{STAGES}/{STAGE}.json")
        delta = None if complete else target.project(job.endpoints)
        plan = make_plan(job.spec.corpus, job.run, job.progress.counter(STAGE, "documents converted"))
        if job.spec.select.size > plan.n_rows:
            raise UserError(
                f"select.size is {job.spec.select.size:,} and the corpus has {plan.n_rows:,} documents: "
                "choose fewer, or give a larger corpus."
            )
    return Prepared(plan, target, delta)


def extract(job: Job, prepared: Prepared | None = None) -> dict[str, Any]:
    """Run the stage; its result: documents, quarantined, label counts, seconds, ..."""
    ready = prepared or prepare(job)
    with session(job.spec.ray, job.verbose):
        inputs = _inputs(job, ready.plan)
        return job.guarded(STAGE, inputs, lambda: _extract(job, ready, inputs), True, (QUARANTINE,))


def _inputs(job: Job, plan: Plan) -> dict[str, Any]:
    """All that the store's bytes depend on."""
    hashes = job.model_hashes
    return {
        "models.base": hashes["base"],
        "models.finetuned": hashes["finetuned"],
        "corpus": plan.fingerprint,
        "models.load_in": job.spec.models.load_in,
        **job.section("task"),
        "task.loss_scope": job.spec.loss_scope,
        **job.section("gradients"),
        "extract.threads": cluster.extract.threads_per_worker(job.spec.extract),
        "device": "cuda" if gpus_per_worker(job.spec.extract.gpus_per_worker) else "cpu",
        "code": CODE,
    }


def _extract(job: Job, ready: Prepared, inputs: dict[str, Any]) -> dict[str, Any]:
    plan, target = ready.plan, ready.target
    if job.widened:
        job.progress.say(
            "`auto` types are float32 in this run, which began on a CPU without instructions for bfloat16"
        )
    delta, delta_norm = ready.delta or target.project(job.endpoints)
    _warn_models(job, target, delta_norm)
    stamp = fingerprint(inputs)
    shape = StoreShape(len(job.spec.gradients.fractions), plan.n_rows, target.dim, plan.partition_rows)
    about = {"fingerprint": stamp, "projector": target.projector().describe(), "delta_norm": delta_norm}
    store = GradientStore.create(job.run, shape, delta, {**about, "fractions": job.spec.gradients.fractions})
    done = store.done(stamp)
    todo = [p for p in range(plan.n_partitions) if p not in done]
    rows_done = sum(record["rows"] for record in done.values())
    watch = _Quarantine(job, plan.n_rows, done)
    started = time.monotonic()
    with job.progress.stage(STAGE, plan.n_rows, "documents", rows_done) as stage:
        if todo:
            cluster.resources.check(job.spec, (STAGE,))
            work = cluster.extract.ExtractJob(
                spec=job.spec,
                run_uri=job.run.uri,
                plan=plan,
                target=target,
                base=job.endpoints.base,
                finetuned=job.endpoints.finetuned,
                fingerprint=stamp,
                threads=inputs["extract.threads"],
            )

            lowered = _Lowered(job)

            def on_receipt(receipt: dict[str, Any]) -> None:
                watch.add(receipt)
                lowered.see(receipt)
                stage.advance(receipt["rows"])

            cluster.extract.extract(work, todo, on_receipt, lambda text: job.progress.warn(STAGE, text))
    missing = sorted(set(range(plan.n_partitions)) - store.done(stamp).keys())
    if missing:
        raise UserError(
            f"partition {missing[0]} was not written, after {job.spec.extract.max_attempts} attempts "
            f"({len(missing)} in all): run the same command again to retry them."
        )
    store.sweep()
    watch.write()
    return _result(job, store, target, watch, time.monotonic() - started)


class _Lowered:
    """Says once for each new budget that a worker ran out of memory and went on with smaller batches."""

    def __init__(self, job: Job) -> None:
        self._job, self._said = job, set[int]()

    def see(self, receipt: dict[str, Any]) -> None:
        tokens = receipt.get("tokens_per_batch")
        if tokens is not None and tokens not in self._said:
            self._said.add(tokens)
            self._job.progress.warn(
                STAGE,
                f"memory ran out in a worker, which goes on with batches of {tokens:,} tokens: gradients agree with "
                "those of larger batches to rounding, not to the byte; set gradients.tokens_per_batch to repeat "
                "them exactly.",
            )


class _Quarantine:
    """Counts quarantined documents as receipts come in; stops the run when their share is too large."""

    def __init__(self, job: Job, documents: int, done: dict[int, dict[str, Any]]) -> None:
        self._job, self._documents = job, documents
        self._records: dict[int, dict[str, Any]] = {}
        self.count = self.tokens = self.truncated = 0
        for record in done.values():
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        self._records[record["partition"]] = record
        self.count += len(record["quarantined"])
        self.tokens += record["tokens"]
        self.truncated += record["truncated"]
        allowed = self._job.spec.corpus.max_quarantined
        if self.count > allowed * self._documents:
            self.write()
            row, id_, why = self._rows()[0]
            raise UserError(
                f"{self.count:,} of {self._documents:,} documents could not be used, more than the allowed share "
                f"of {allowed:.0%} (corpus.max_quarantined); the first is row {row}, id {id_}: {why}; all are in "
                f"{self._job.run.path(QUARANTINE)}."
            )

    def reasons(self) -> dict[str, int]:
        """Kind of reason -> number of documents, most frequent first; at most REASONS kinds, the rest as one."""
        kinds = collections.Counter(_kind(why) for _, _, why in self._rows()).most_common()
        most, rest = dict(kinds[:REASONS]), sum(count for _, count in kinds[REASONS:])
        return {**most, "other reasons": rest} if rest else most

    def write(self) -> None:
        rows, ids, why = zip(*self._rows(), strict=True) if self.count else ((), (), ())
        schema = pa.schema([("row", pa.int64()), ("doc_id", pa.string()), ("reason", pa.string())])
        self._job.run.write_table(QUARANTINE, pa.table([list(rows), list(ids), list(why)], schema=schema))

    def _rows(self) -> list[tuple[int, str, str]]:
        return sorted(tuple(entry) for record in self._records.values() for entry in record["quarantined"])


def _kind(why: str) -> str:
    """A reason without the place it holds for: file, line and position."""
    return re.sub(r"\d+", "N", re.sub(r"^.* line \d+: ", "", why))


def _result(
    job: Job, store: GradientStore, target: Target, watch: _Quarantine, seconds: float
) -> dict[str, Any]:
    valid = store.column("state") == VALID
    confidence = store.column("confidence")[valid]
    if not valid.any():
        raise UserError(
            "every document of the corpus was quarantined: see quarantine.parquet for the reasons."
        )
    classifies = job.spec.task.kind == "classification"
    counts = (
        np.bincount(store.column("label")[valid], minlength=len(job.spec.task.labels)) if classifies else []
    )
    mean = float(confidence.mean())
    if classifies and mean < LOW_CONFIDENCE:
        job.progress.warn(
            STAGE,
            f"the fine-tuned model is unsure of the corpus (mean confidence {mean:.2f}): its labels, and with "
            "them the selection, may mean little; try a corpus nearer to the task.",
        )
    histogram, edges = np.histogram(confidence, bins=20, range=(0.0, 1.0))
    return {
        "documents": store.n_rows,
        "quarantined": watch.count,
        "quarantine_reasons": watch.reasons(),
        "truncated": watch.truncated,
        "tokens": watch.tokens,
        "label_counts": [int(c) for c in counts],
        "mean_confidence": mean,
        "confidence_histogram": {"edges": edges.tolist(), "counts": histogram.tolist()},
        "projector": target.kind,
        "dim": target.dim,
        "layers": [layer.name for layer in target.layers],
        "checkpoints": job.spec.gradients.fractions,
        "seconds": round(seconds, 3),
        "documents_per_second": round(store.n_rows / max(seconds, 1e-9), 3),
    }


def _warn_models(job: Job, target: Target, delta_norm: float) -> None:
    endpoints = job.endpoints
    extra = added_tokens(endpoints.base, endpoints.finetuned)
    if extra:
        job.progress.warn(
            STAGE,
            f"the fine-tuned model has {len(extra)} tokens of its own ({', '.join(extra[:3])}...): they are left "
            "out, the models are compared on the shared vocabulary.",
        )
    models = job.spec.models
    both = ((models.base, endpoints.base), (models.finetuned, endpoints.finetuned))
    sides = tuple(i for i, (name, path) in enumerate(both) if name.endswith(".gguf") or is_quantised(path))
    if sides:
        share = target.noise(endpoints, sides) / max(delta_norm, 1e-30)
        names = " and ".join(("models.base", "models.finetuned")[side] for side in sides)
        job.progress.warn(
            STAGE,
            f"{names} quantised: rounding noise of about {share:.0%} of Delta's norm on the chosen layers is to "
            "be expected.",
        )
    if models.load_in != "none":
        share = target.packing(endpoints, models.load_in) / max(delta_norm, 1e-30)
        job.progress.warn(
            STAGE,
            f"models.load_in={models.load_in}: gradients are taken at weights that rounding moves by {share:.0%} of "
            "what fine-tuning moved them, on the chosen layers; Delta is that of the files.",
        )
