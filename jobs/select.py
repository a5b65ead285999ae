"""unbake select: choose documents from the store by a strategy; also from features that the user brings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.corpus import load_plan, read_partition, read_rows
from engine.corpus.duplicates import first_copies
from engine.errors import UserError
from engine.rows import Rows
from engine.rundir import DUPLICATES, SELECTION, STAGES, RunDir
from engine.sections import section_from_fields
from engine.select import Certificate, Columns, Selection, View, open_features, recheck, view_of
from engine.select import select as choose
from engine.spec import SEEDED, Placement, Select, Strategy
from engine.storage import Folder
from engine.store import GradientStore
from jobs.job import Job

CODE = 2
"""Raised whenever the same inputs would give other bytes."""

NO_BYTES = (
    "index_memory_mb",
    "cache_memory_mb",
    "shards",
    "verify",
    "cpus_per_shard",
    *Placement.model_fields,
)
"""Fields of the section that change how picks are found, never which."""

CERTIFICATE = f"{STAGES}/{{}}.certificate.parquet"
"""File of a stage's certificate, a row for each pick; its counts of work may differ after a resume."""


def select(job: Job) -> dict[str, Any]:
    """Select by `select.strategy` into selection.parquet."""
    return select_with(job, job.spec.select, "select", SELECTION)


def select_for(job: Job, strategy: Strategy, seed: int) -> str:
    """The selection that a retraining of a strategy and seed uses; the name of its file in the run."""
    own = strategy in SEEDED
    settings = job.spec.select.model_copy(
        update={"strategy": strategy, "seed": seed if own else job.spec.select.seed}
    )
    if settings == job.spec.select:
        check_selection(job)
        return SELECTION
    name = job.run.selection_name(strategy, seed if own else None)
    select_with(job, settings, f"select-{os.path.basename(name).removesuffix('.parquet')}", name)
    return name


def select_features(features: str, target: str, settings: Select, out: str) -> Selection:
    """Select rows of a matrix on disk; `out` gets rank, row, norm, objective and gain (Parquet).

    Raises:
        UserError: unreadable or mismatching files, or a strategy that needs labels or losses.
    """
    if settings.dedupe != "none":
        raise UserError(
            "select.dedupe needs the documents' text, which --features does not have: leave it out."
        )
    selection = choose(open_features(features, target), Columns(), settings)
    folder, name = os.path.split(os.path.abspath(out) if "://" not in out else out)
    Folder(folder).write_table(name, pa.table(_numbers(selection)))
    if selection.certificate is not None:
        Folder(folder).write_table(
            f"{name.removesuffix('.parquet')}.certificate.parquet", _certificate(selection.certificate)
        )
    return selection


def select_from_options(options: dict[str, Any]) -> None:
    """`unbake select --features X --target t`: validate the few options that matter, select, say what came out."""
    if not (options["features"] and options["target"]):
        raise UserError("--features, --target and --out belong together: give the first two.")
    other = [name for name in options if "." in name and not name.startswith("select.")]
    given = [*(f"--{name}" for name in other), options["config"], options["run"]]
    if any(given):
        raise UserError(f"--features needs no run: remove {next(filter(None, given))}.")
    fields = {key.removeprefix("select."): value for key, value in options.items() if "." in key}
    settings = section_from_fields(Select, fields, "the command line: select")
    out = options["out"] or "selection.parquet"
    selection = select_features(options["features"], options["target"], settings, out)
    print(
        f"{selection.size:,} rows by {selection.strategy}: objective {selection.objective[-1]:.6f}, largest "
        f"{selection.peak_value:.6f} at {selection.peak_size:,}; written to {out}"
    )


def select_with(job: Job, settings: Select, stage: str, name: str) -> dict[str, Any]:
    """Select by any settings into the file `name` of the run, as a stage of that name; its result."""
    inputs = _inputs(job, settings)
    outputs = (name, CERTIFICATE.format(stage)) if settings.certified else (name,)
    again = settings.certified and settings.verify > 0 and job.run.completed(stage, inputs)
    result = job.guarded(stage, inputs, lambda: _select(job, settings, stage, name), outputs=outputs)
    if again:
        _recheck(job, settings, stage)
    return result


def _inputs(job: Job, settings: Select) -> dict[str, Any]:
    """All that a selection depends on."""
    inputs = {
        "extract": job.run.stage_fingerprint("extract"),
        **{f"select.{k}": v for k, v in settings.model_dump(mode="json").items() if k not in NO_BYTES},
        "code": CODE,
    }
    if settings.in_rounds:  # then it depends on how the base model is retrained too
        from cluster.train import NO_BYTES as IN_TRAINING

        inputs |= {"models.base": job.model_hashes["base"], **job.section("retrain", without=IN_TRAINING)}
    return inputs


def check_selection(job: Job) -> None:
    """UserError where the run's selection was made with other settings than the job's."""
    job.run.check_inputs("select", _inputs(job, job.spec.select))


def _recheck(job: Job, settings: Select, stage: str) -> None:
    """Check random picks of a selection that was complete already."""
    store = GradientStore.open(job.run)
    order = job.run.read_table(CERTIFICATE.format(stage))["row"].to_numpy()
    found = recheck(rows_of(store, settings), columns_of(job, store, settings), settings, order)
    job.progress.say(f"{stage}: {len(found)} random picks are what a full scan of the store finds")


def _select(job: Job, settings: Select, stage: str, name: str) -> dict[str, Any]:
    store = GradientStore.open(job.run)
    rows = rows_of(store, settings)
    columns = columns_of(job, store, settings)
    journal = job.run.sub(f"{STAGES}/{stage}.journal")
    with (
        _shards(job, settings, rows) as shards,
        job.progress.stage(stage, settings.size, "picks") as progress,
    ):
        if settings.in_rounds:
            from jobs.rounds import select_in_rounds  # which needs this module

            selection = select_in_rounds(job, store, rows, columns, settings, stage, progress)
        else:
            from cluster.metrics import Picks  # which loads Ray

            selection = choose(
                rows, columns, settings, progress.update,
                journal=journal, shards=shards, on_pick=Picks(job.run.uri),
            )  # fmt: skip
        job.run.write_table(name, _table(job, store, selection))
        if selection.certificate is not None:
            job.run.write_table(CERTIFICATE.format(stage), _certificate(selection.certificate))
        progress.update(settings.size)
        seconds = progress.seconds
    journal.remove("")
    summary = {**selection.summary, "peak": {"size": selection.peak_size, "value": selection.peak_value}}
    beside = selection.random_path
    summary["random_path"] = {
        "sizes": beside.sizes.tolist(),
        "mean": beside.mean.tolist(),
        "std": beside.std.tolist(),
    }
    summary |= {"path": selection.path.tolist(), "seconds": round(seconds, 3)}
    summary["preconditioned"] = isinstance(rows, View) and rows.scale is not None
    return summary


@contextlib.contextmanager
def _shards(job: Job, settings: Select, rows: Rows) -> Iterator[Any]:
    """A factory of index shards in Ray actors where more than one is asked for, else None."""
    if settings.shards == 1:
        yield None
        return
    from cluster.resources import check as check_resources
    from cluster.select import ray_shards
    from cluster.session import session

    with session(job.spec.ray, job.verbose):
        check_resources(job.spec, ("select",))
        view = (rows.target, rows.scale, rows.checkpoints) if isinstance(rows, View) else None
        yield ray_shards(functools.partial(_open, job.run.uri, view), settings.shards)


def _open(uri: str, view: tuple[Any, ...] | None) -> Rows:
    """The store of a run, or the `View` of it with these arguments, opened in the process of a shard."""
    store = GradientStore.open(RunDir(uri))
    return store if view is None else View(store, *view)


def rows_of(store: GradientStore, settings: Select) -> Rows:
    """The rows that these settings select from; UserError where they mean nothing for this store."""
    kind = store.attributes["projector"]["kind"]
    if settings.precondition != "none" and kind != "exact":
        raise UserError(
            f"select.precondition=second_moment needs each weight's own coordinate, and the store is a {kind} "
            "projection: extract with gradients.projector=exact."
        )
    return view_of(store, settings, store.attributes["fractions"])


def _repeats(job: Job, settings: Select) -> npt.NDArray[np.bool_] | None:
    """Rows of the corpus that repeat an earlier one, (N,) bool; found once a run, by a stage of its own."""
    kind = settings.dedupe
    if kind == "none":
        return None
    plan, name = load_plan(job.run), f"{DUPLICATES}-{kind}.parquet"

    def find() -> dict[str, Any]:
        with job.progress.stage(f"dedupe-{kind}", plan.n_rows, "documents") as progress:

            def texts() -> Iterator[str]:
                for partition in range(plan.n_partitions):
                    documents = read_partition(plan, partition, job.spec.corpus)
                    yield from documents.text
                    progress.advance(len(documents))

            first = first_copies(texts(), kind)
        row = np.flatnonzero(first != np.arange(first.size))
        job.run.write_table(name, pa.table({"row": row, "repeats": first[row]}))
        return {"documents": int(first.size), "repeats": int(row.size)}

    inputs = {"extract": job.run.stage_fingerprint("extract"), "code": CODE}
    job.guarded(f"dedupe-{kind}", inputs, find, outputs=(name,))
    repeats = np.zeros(plan.n_rows, np.bool_)
    repeats[job.run.read_table(name)["row"].to_numpy()] = True
    return repeats


def columns_of(job: Job, store: GradientStore, settings: Select) -> Columns:
    """The columns that a selection by these settings reads beside the rows."""
    confidence = store.column("confidence") if settings.needs_confidence else None
    return Columns(_labels(job, store), finetuned_loss(store), confidence, _repeats(job, settings))


def _labels(job: Job, store: GradientStore) -> npt.NDArray[np.int32] | None:
    return store.column("label") if job.spec.task.kind == "classification" else None


def finetuned_loss(store: GradientStore) -> npt.NDArray[np.float32]:
    """Loss under theta_f of every document, (N,) float32, also where theta_f is no checkpoint of the run."""
    if store.attributes["fractions"][-1] == 1.0:
        return np.asarray(store.column("loss", -1))
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(store.column("confidence")))


def _table(job: Job, store: GradientStore, selection: Selection) -> pa.Table:
    """selection.parquet: the documents with their numbers."""
    documents, numbers = documents_of(job, store, selection.rows), _numbers(selection)
    before = ("row", "doc_id", "partition", "text", "label", "confidence", "loss", "alignment")
    columns: dict[str, Any] = {"rank": numbers["rank"]}
    columns |= {name: documents[name] for name in before}
    columns |= {name: numbers[name] for name in ("norm", "weight", "objective", "gain")}
    columns |= {name: documents[name] for name in documents.column_names if name not in before}
    return pa.table(columns)


def documents_of(job: Job, store: GradientStore, rows: npt.NDArray[np.int64]) -> pa.Table:
    """The documents at the given rows of the store, with what extraction found of each.

    Raises:
        UserError: a document is no longer what it was.
    """
    documents = read_rows(load_plan(job.run), rows, job.spec.corpus)
    if documents.problems:
        row = int(rows[min(documents.problems)])
        raise UserError(f"row {row} of the corpus has changed since it was extracted: restore the file.")
    columns: dict[str, Any] = {
        "row": rows,
        "doc_id": documents.ids,
        "partition": (rows // store.block_rows).astype(np.int32),
        "text": documents.text,
        "label": store.column("label")[rows],
        "confidence": store.column("confidence")[rows],
        "loss": finetuned_loss(store)[rows],
        "alignment": store.column("alignment").mean(axis=0)[rows],
    }
    if documents.prompts is not None:
        columns |= {"prompt": documents.prompts, "response": documents.responses}
    return pa.table(columns)


def _certificate(certificate: Certificate) -> pa.Table:
    """A row for each pick: why it is the argmax over all rows; see `Certificate`."""
    rank = np.arange(certificate.score.size, dtype=np.int32)
    columns = {field.name: getattr(certificate, field.name) for field in dataclasses.fields(certificate)}
    return pa.table({"rank": rank, **columns})


def _numbers(selection: Selection) -> dict[str, npt.NDArray[Any]]:
    return {
        "rank": np.arange(selection.size, dtype=np.int32),
        "row": selection.rows,
        "norm": selection.norm,
        "weight": selection.weight,
        "objective": selection.objective,
        "gain": selection.gain,
    }
