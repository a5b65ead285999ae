"""Integrity: every byte a run holds against the records made when it was written; what is damaged, by name."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus import Plan, load_plan
from engine.errors import UserError, first_line
from engine.rundir import CORPUS, MODELS, STAGES, STORE, RunDir, fingerprint
from engine.storage import is_outage
from engine.store import (
    PER_CHECKPOINT,
    PER_DOCUMENT,
    QUARANTINED,
    VALID,
    GradientStore,
    damaged_layout,
    read_records,
    record_name,
)

THREADS = 8
"""Partitions read at once, at most: each is held in memory while it is checked."""

BEGUN = ".inputs"
"""Ending of a record's name that holds a stage's inputs."""

NORM_ERROR = 0.01
"""How far a stored row may be from unit norm: float16 rounds each entry by 2^-11 of itself."""


@dataclass(frozen=True)
class Damage:
    """One finding: what is damaged, how, and the records whose removal makes a later run repeat just that."""

    where: str
    what: str
    withdraw: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Findings:
    """What `verify` found: partitions and their documents that were read, and the damage."""

    partitions: int
    documents: int
    missing: int
    damage: list[Damage]


def verify(run: RunDir, progress: Callable[[int], None] | None = None) -> Findings:
    """Check a run directory from end to end; reads the store once and changes nothing.

    Checked are: each stage's record against its inputs; the layout of the store and the completion record of
    every partition against their own checksums; of every partition all objects, their CRC32C, the sha256 of
    what was written, row counts, states, finite values and unit norms; the plan and the converted corpus;
    the files that stages left (selections, models) against the sha256 in the stages' records.

    Args:
        progress: called with the number of documents checked so far.

    Raises:
        UserError: the folder holds no extraction, or the storage fails.
    """
    inputs, damage = _stages(run)
    if "extract" not in inputs:
        raise UserError(f"{run.uri} holds no extraction to verify: run `unbake extract` first.")
    stamp = fingerprint(inputs["extract"])
    plan, found = _plan(run, inputs["extract"])
    damage += found
    broken = [
        Damage(name, "is missing or not what was written", _again("extract")) for name in damaged_layout(run)
    ]
    if broken:  # nothing can be read through a layout that is wrong
        return Findings(0, 0, 0, damage + broken)
    store = GradientStore.open(run)
    if store.attributes["fingerprint"] != stamp:
        damage.append(Damage(STORE, "was made from other inputs than this run's", _again("extract")))
    if plan is not None and plan.n_rows != store.n_rows:
        damage.append(Damage(STORE, f"has {store.n_rows:,} rows, the plan {plan.n_rows:,}"))
    checked, documents, missing, found = _partitions(store, stamp, progress)
    return Findings(checked, documents, missing, damage + found)


def _again(stage: str, *more: str) -> tuple[str, ...]:
    """The records to withdraw so that a stage runs again."""
    return (*more, f"{STAGES}/{stage}.json")


def _stages(run: RunDir) -> tuple[dict[str, dict[str, Any]], list[Damage]]:
    """Inputs of every stage that was begun; records that do not fit them, and outputs that do not fit records."""
    damage = []
    contents: dict[str, dict[str, Any]] = {}
    for name in run.names(STAGES):
        if name.endswith(".json") and not name.startswith("."):
            path = f"{STAGES}/{name}"
            try:
                contents[name.removesuffix(".json")] = dict(run.read_json(path))
            except (ValueError, TypeError):
                damage.append(Damage(path, "is not readable", (path,)))
    inputs = {name.removesuffix(BEGUN): about for name, about in contents.items() if name.endswith(BEGUN)}
    for stage, record in contents.items():
        if stage in inputs:
            path = f"{STAGES}/{stage}.json"
            if record.get("fingerprint") != fingerprint(inputs[stage]):
                both = (path, f"{STAGES}/{stage}{BEGUN}.json")
                damage.append(Damage(path, "does not belong to the inputs beside it", both))
            damage += _outputs(run, stage, record.get("outputs", {}))
    return inputs, damage


def _outputs(run: RunDir, stage: str, outputs: dict[str, str]) -> Iterator[Damage]:
    """Files that a stage wrote and that have gone or changed."""
    for name, known in outputs.items():
        try:
            wrong = run.digest(name) != known
        except FileNotFoundError:
            yield Damage(name, "is missing", _again(stage))
            continue
        if wrong:
            whole = name if not name.startswith(f"{MODELS}/") else os.path.dirname(name)
            yield Damage(name, "is not what was written (sha256)", _again(stage, whole))


def _plan(run: RunDir, inputs: dict[str, Any]) -> tuple[Plan | None, list[Damage]]:
    """The plan, if it is the one that was extracted, and damage to it or to the corpus files of the run."""
    try:
        plan = load_plan(run)
    except UserError as error:
        return None, [Damage("plan.parquet", str(error).rstrip("."), ("plan.parquet",))]
    damage = []
    if plan.fingerprint != inputs.get("corpus"):
        damage.append(Damage("plan.parquet", "is not the plan that was extracted", ("plan.parquet",)))
    for file in plan.files:
        name = f"{CORPUS}/{file.rsplit('/', 1)[-1]}"
        if file == f"{run.uri}/{name}" and (wrong := _corpus_file(run, name)):
            damage.append(Damage(name, wrong, (name,)))
    return plan, damage


def _corpus_file(run: RunDir, name: str) -> str | None:
    """What is wrong with a converted file of the corpus, page by page, or None."""
    try:
        with run.fs.open(run.path(name), "rb") as handle:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            for _ in file.iter_batches(1024, use_threads=False):
                pass
    except FileNotFoundError:
        return "is missing"
    except (OSError, pa.ArrowException, ValueError) as error:
        _raise_outage(error)
        return f"is damaged ({first_line(error)})"
    return None


def _partitions(
    store: GradientStore, stamp: str, progress: Callable[[int], None] | None
) -> tuple[int, int, int, list[Damage]]:
    """Partitions and documents checked, partitions not extracted yet, and the damage."""
    complete = store.run.exists(f"{STAGES}/extract.json")
    records, names = read_records(store.run), set(store.run.walk(STORE))
    documents, missing, damage, known = 0, 0, list[Damage](), []
    for partition in range(store.shape.partitions):
        if partition in records:
            known.append(partition)
        elif complete:
            damage.append(_partition_damage(partition, "its completion record is missing"))
        else:
            missing += 1
    for partition in sorted(records.keys() - set(range(store.shape.partitions))):
        damage.append(_partition_damage(partition, "has a record, and the store has no such partition"))

    def check(partition: int) -> tuple[int, str | None]:
        return _partition_rows(store, partition), _wrong_partition(
            store, partition, records[partition], stamp, names
        )

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for partition, (rows, wrong) in zip(known, pool.map(check, known), strict=True):
            documents += rows
            if wrong is not None:
                damage.append(_partition_damage(partition, wrong))
            if progress is not None:
                progress(documents)
    return len(known), documents, missing, damage


def _partition_damage(partition: int, what: str) -> Damage:
    return Damage(f"partition {partition}", what, _again("extract", record_name(partition)))


def _partition_rows(store: GradientStore, partition: int) -> int:
    start = partition * store.block_rows
    return min(start + store.block_rows, store.n_rows) - start


def _wrong_partition(
    store: GradientStore, partition: int, record: dict[str, Any] | None, stamp: str, names: set[str]
) -> str | None:
    """What is wrong with a partition, or None."""
    if record is None:
        return f"its completion record {record_name(partition)} is damaged"
    if record["fingerprint"] != stamp:
        return "it was made from other inputs than this run's"
    if record["rows"] != _partition_rows(store, partition):
        return (
            f"its record counts {record['rows']:,} documents, the store {_partition_rows(store, partition):,}"
        )
    lost = [name for name in store.objects(partition) if name not in names]
    if lost:
        return f"{lost[0]} is missing"
    digest = hashlib.sha256()
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, place, read in _pieces(store, partition):
        try:
            values = read()
        except Exception as error:  # a decoder may raise anything on damaged bytes
            _raise_outage(error)
            return f"{place} is damaged ({first_line(error)})"
        digest.update(np.ascontiguousarray(values).tobytes())
        if name == "features":
            wrong = _wrong_features(values)
            if wrong:
                return f"{place}: {wrong}"
        else:
            columns[name] = values
    if digest.hexdigest() != record["sha256"]:
        return "its objects are intact one by one, and together not what was written (sha256)"
    return _wrong_columns(store, partition, columns, record)


def _pieces(
    store: GradientStore, partition: int
) -> Iterator[tuple[str, str, Callable[[], npt.NDArray[Any]]]]:
    """(column, object, how to read it) of a partition's objects, in the order of `GradientStore.write`."""
    start = partition * store.block_rows
    stop = start + _partition_rows(store, partition)
    objects = iter(store.objects(partition))
    for checkpoint in range(store.n_checkpoints):
        yield "features", next(objects), functools.partial(store.raw, "features", start, stop, checkpoint)
    for name in (*PER_CHECKPOINT, *PER_DOCUMENT):
        yield name, next(objects), functools.partial(store.raw, name, start, stop)


def _wrong_features(features: npt.NDArray[np.float16]) -> str | None:
    """Rows (n, dim) are of unit norm, or zero."""
    wide = features.astype(np.float32)
    square = np.einsum("nd,nd->n", wide, wide)
    bad = np.flatnonzero(~((square == 0) | (np.abs(np.sqrt(square) - 1) <= NORM_ERROR)))
    return (
        f"row {bad[0]} of the partition has norm {np.sqrt(square[bad[0]]):g}, not 1 or 0"
        if bad.size
        else None
    )


def _wrong_columns(
    store: GradientStore, partition: int, columns: dict[str, npt.NDArray[Any]], record: dict[str, Any]
) -> str | None:
    """What is wrong with the numbers beside the features: states, finite values, labels, counts."""
    state, start = columns["state"], partition * store.block_rows
    valid = state == VALID
    if not (valid | (state == QUARANTINED)).all():
        return "it has documents that are neither valid nor quarantined"
    if np.flatnonzero(~valid).tolist() != [row - start for row, _, _ in record["quarantined"]]:
        return "its quarantined documents are not those of its record"
    for name in ("scale", "loss"):
        if not np.isfinite(columns[name][:, valid]).all():
            return f"a valid document has a {name} that is not finite"
    if not np.isfinite(columns["confidence"]).all():
        return "a document has a confidence that is not finite"
    if int(columns["tokens"].sum()) != record["tokens"]:
        return "its tokens are not those its record counts"
    return None


def _raise_outage(error: Exception) -> None:
    """Storage that fails is no damage."""
    if is_outage(error):
        raise UserError(f"the storage fails ({first_line(error)}): nothing can be said of the run.") from None
