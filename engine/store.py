"""GradientStore: projected gradients in Zarr v3, one partition = one shard = one writer.

Layout (ARCHITECTURE): `features (P, N, d)` float16 unit-norm rows and `scale (P, N)` float32 (row = scale x
feature), sharded by partition; `loss`, `norm`, `alignment (P, N)` float32; `label` int32, `confidence`
float32, `tokens` int32, `state` uint8 `(N,)`; `target (d,)` float32. Every chunk carries a CRC32C. A partition
counts as written only when its completion record exists: Zarr reads missing chunks as zeros.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from engine.errors import UserError, first_line
from engine.gradients import PartitionGradients
from engine.rows import RowBlock
from engine.rundir import DONE, LAYOUT, STORE, RunDir, fingerprint
from engine.shard_rows import ShardRows
from engine.storage import failed, is_outage, storage_errors

MISSING, VALID, QUARANTINED = 0, 1, 2
CHUNK_BYTES = 128 << 10
"""Aimed size of an inner chunk: small enough for single rows, large enough to stream (docs/decisions.md)."""

_SMALL_COLUMNS = 512  # partitions whose scale and state `take` keeps: about 10 MB

PER_CHECKPOINT = {"scale": "float32", "loss": "float32", "norm": "float32", "alignment": "float32"}
PER_DOCUMENT = {"label": "int32", "confidence": "float32", "tokens": "int32", "state": "uint8"}


@dataclass(frozen=True)
class StoreShape:
    """P checkpoints, N documents, d dimensions, S documents a partition."""

    checkpoints: int
    docs: int
    dim: int
    partition_rows: int

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk: the largest divisor of S whose bytes stay within CHUNK_BYTES."""
        most = max(1, CHUNK_BYTES // (2 * self.dim))
        return max(c for c in range(1, min(most, self.partition_rows) + 1) if self.partition_rows % c == 0)

    @property
    def partitions(self) -> int:
        """Number of partitions, the last one perhaps shorter."""
        return -(-self.docs // self.partition_rows)


class GradientStore:
    """Read and write access to the store of one run; implements `engine.rows.Rows`."""

    def __init__(self, run: RunDir, group: zarr.Group) -> None:
        self.run, self._group = run, group
        # All-zero chunks are written too (Zarr does not keep this setting in the store): an absent object
        # always means an unwritten or lost partition.
        self._arrays: dict[str, zarr.Array[Any]] = {
            name: array.with_config({"write_empty_chunks": True}) for name, array in group.arrays()
        }
        missing = {"features", "target", *PER_CHECKPOINT, *PER_DOCUMENT} - self._arrays.keys()
        if missing or "partition_rows" not in group.attrs:
            raise UserError(
                f"the store {run.path(STORE)} is damaged (it has no {', '.join(sorted(missing)) or 'attributes'}): "
                f"run `unbake verify {run.uri}`."
            )
        p, n, d = self._arrays["features"].shape
        self.shape = StoreShape(p, n, d, int(group.attrs["partition_rows"]))
        self.n_checkpoints, self.n_rows, self.dim = p, n, d
        self.block_rows, self.chunk_rows = self.shape.partition_rows, self.shape.chunk_rows
        with _sound(run):
            self.target: npt.NDArray[np.float64] = np.asarray(self._arrays["target"][:], np.float64)
        self.attributes: dict[str, Any] = dict(group.attrs)
        self._shards: dict[tuple[int, int], ShardRows] = {}  # 17 bytes a chunk read from
        self._small_columns: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]] = {}

    @classmethod
    def create(
        cls, run: RunDir, shape: StoreShape, target: npt.NDArray[np.float64], attributes: dict[str, Any]
    ) -> GradientStore:
        """Lay out an empty store, or open the one that is there; a damaged layout is mended, partitions stay.

        Raises:
            UserError: no space or permission, or a damaged layout that was made from other inputs.
        """
        layout = _layout(shape, target, attributes)
        known = _read_layout(run)
        for name, data in layout.items():
            if known is None:
                run.write_bytes(f"{STORE}/{name}", data)
            elif not _intact(run, name, known):
                if content_hash(data) != known.get(name):
                    raise UserError(
                        f"{run.path(STORE)}/{name} is damaged, and was not made from what this run would make "
                        f"it from: remove {run.path('')} and extract again."
                    )
                run.write_bytes(f"{STORE}/{name}", data)
        if known is None:
            known = {name: content_hash(data) for name, data in layout.items()}
            run.write_json(LAYOUT, {"files": known, "check": _check(known)})
        return cls.open(run, writable=True)

    @classmethod
    def open(cls, run: RunDir, writable: bool = False) -> GradientStore:
        """Open the store of a run; UserError when there is none."""
        if not run.exists(f"{STORE}/zarr.json"):
            raise UserError(f"{run.uri} has no gradient store: run `unbake extract` first.")
        with _sound(run):
            return cls(run, _open_group(run, "r+" if writable else "r"))

    def write(
        self,
        partition: int,
        gradients: PartitionGradients,
        fingerprint: str,
        ids: dict[int, str],
        truncated: int = 0,
    ) -> dict[str, Any]:
        """Write one partition's shard, then its completion record, and return that record.

        Args:
            gradients: the partition's n documents, in row order.
            fingerprint: of the extraction, kept in the record.
            ids: position -> document id of the quarantined ones.
            truncated: documents that were cut before they were encoded.

        Raises:
            UserError: no space, no permission; StorageError: an outage, after which the same call may succeed.
        """
        start = partition * self.block_rows
        self._small_columns.pop(partition, None)
        self._shards = {key: shard for key, shard in self._shards.items() if key[1] != partition}
        n = len(gradients.label)
        state = np.full(n, VALID, np.uint8)
        state[list(gradients.problems)] = QUARANTINED
        digest = hashlib.sha256()
        for name in ("features", *PER_CHECKPOINT, *PER_DOCUMENT):
            values = state if name == "state" else getattr(gradients, name)
            values = np.ascontiguousarray(values)
            digest.update(values.tobytes())
            try:
                self._arrays[name][..., *_rows(name, start, start + n)] = values
            except storage_errors() as error:
                raise failed(f"cannot write partition {partition} to {self.run.path(STORE)}", error) from None
        self.run.sync(self.objects(partition))
        record = {
            "partition": partition,
            "rows": n,
            "fingerprint": fingerprint,
            "sha256": digest.hexdigest(),
            "truncated": truncated,
            "tokens": int(gradients.tokens.sum()),
            "quarantined": [
                [start + i, ids.get(i, ""), why] for i, why in sorted(gradients.problems.items())
            ],
        }
        record["check"] = _check(record)
        self.run.write_json(record_name(partition), record)
        return record

    def objects(self, partition: int) -> list[str]:
        """Names, within the run, of the objects that hold a partition."""
        per_document = [f"{STORE}/{name}/c/{partition}" for name in PER_DOCUMENT]
        per_checkpoint = [f"{STORE}/{name}/c/0/{partition}" for name in PER_CHECKPOINT]
        shards = [f"{STORE}/features/c/{j}/{partition}/0" for j in range(self.n_checkpoints)]
        return shards + per_checkpoint + per_document

    def sweep(self) -> None:
        """Remove what writers that were killed left half-written; nobody else may be writing."""
        if self.run.local:  # on an object store a write that is cut off leaves nothing to see
            for name in [*self.run.walk(STORE), *self.run.walk(DONE)]:
                if name.endswith(".partial") or name.rsplit("/", 1)[-1].startswith("."):
                    self.run.remove(name)

    def done(self, fingerprint: str) -> dict[int, dict[str, Any]]:
        """Sound completion records with the right fingerprint, by partition; not of those that lost an object."""
        names = set(self.run.walk(STORE))
        records = {}
        for partition, record in read_records(self.run).items():
            if (
                record is not None
                and record["fingerprint"] == fingerprint
                and names.issuperset(self.objects(partition))
            ):
                records[partition] = record
        return records

    def column(self, name: str, checkpoint: int | None = None) -> npt.NDArray[Any]:
        """A whole column: (N,), or (P, N) for per-checkpoint columns unless one checkpoint is asked for."""
        array = self._arrays[name]
        with _sound(self.run):
            return np.asarray(array[:] if checkpoint is None else array[checkpoint])

    def raw(self, name: str, start: int, stop: int, checkpoint: int | None = None) -> npt.NDArray[Any]:
        """Rows start to stop - 1 of any column as they are stored; Zarr's own error for a damaged chunk.

        Returns:
            (n,) or (P, n); features of all checkpoints (P, n, d), of one (n, d).
        """
        array = self._arrays[name]
        return np.asarray(array[... if checkpoint is None else checkpoint, *_rows(name, start, stop)])

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """See `engine.rows.Rows.valid`."""
        return self.column("state") == VALID

    def read(self, start: int, stop: int) -> RowBlock:
        """See `engine.rows.Rows.read`; UserError when a chunk fails its checksum."""
        stop = min(stop, self.n_rows)
        with _sound(self.run):
            state = np.asarray(self._arrays["state"][start:stop])
            return RowBlock(
                self._read_features(start, state) if self.run.local else self.raw("features", start, stop),
                np.asarray(self._arrays["scale"][:, start:stop]),
                state == VALID,
            )

    def _read_features(self, start: int, state: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Features (P, n, d) of consecutive rows from `start`, from the files; zeros where none were written."""
        out = np.empty((self.n_checkpoints, state.size, self.dim), np.float16)
        low = 0
        while low < state.size:
            partition, first = divmod(start + low, self.block_rows)
            high = min(state.size, low + self.block_rows - first)
            if (state[low:high] != MISSING).any():
                for j in range(self.n_checkpoints):
                    self._shard(j, partition).read(first, out[j, low:high])
            else:
                out[:, low:high] = 0
            low = high
        return out

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """See `engine.rows.Rows.take`; UserError when a chunk fails its checksum."""
        scale, state = np.empty((self.n_checkpoints, rows.size), np.float32), np.empty(rows.size, np.uint8)
        features = np.empty((self.n_checkpoints, rows.size, self.dim), np.float16)
        with _sound(self.run):
            for partition, first in zip(*np.unique(rows // self.block_rows, return_index=True), strict=True):
                part = slice(first, np.searchsorted(rows, (partition + 1) * self.block_rows))
                here = rows[part] - partition * self.block_rows
                scales, states = self._small(int(partition))
                scale[:, part], state[part] = scales[:, here], states[here]
                written = bool((state[part] != MISSING).any())
                features[:, part] = self._take_features(int(partition), here) if written else 0
        return RowBlock(features, scale, state == VALID)

    def _take_features(self, partition: int, here: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Features (P, n, d) of rows of one partition: from the files where they are local."""
        if not self.run.local:
            rows = here + partition * self.block_rows
            return np.asarray(self._arrays["features"].oindex[:, rows])
        return np.stack([self._shard(j, partition).take(here) for j in range(self.n_checkpoints)])

    def _shard(self, checkpoint: int, partition: int) -> ShardRows:
        key = (checkpoint, partition)
        if key not in self._shards:
            path = self.run.path(f"{STORE}/features/c/{checkpoint}/{partition}/0")
            self._shards[key] = ShardRows(path, self.block_rows, self.chunk_rows, self.dim)
        return self._shards[key]

    def _small(self, partition: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Scale (P, rows) and state (rows,) of a partition; those asked for lately stay in memory, for a
        random read wants a few numbers of each and would fetch whole objects."""
        if partition not in self._small_columns:
            if len(self._small_columns) >= _SMALL_COLUMNS:
                del self._small_columns[next(iter(self._small_columns))]
            part = slice(partition * self.block_rows, (partition + 1) * self.block_rows)
            self._small_columns[partition] = (
                np.asarray(self._arrays["scale"][:, part]),
                np.asarray(self._arrays["state"][part]),
            )
        return self._small_columns[partition]


@contextlib.contextmanager
def _sound(run: RunDir) -> Iterator[None]:
    """What Zarr says of a damaged chunk or layout (an error of any type, that names nothing) as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_outage(error):
            raise UserError(
                f"the storage of {run.path(STORE)} fails ({first_line(error)}): when it works, run the same command "
                "again."
            ) from None
        raise UserError(
            f"the store {run.path(STORE)} is damaged or unreadable ({first_line(error)}): "
            f"`unbake verify {run.uri}` says which part, and has just that made anew."
        ) from None


def _rows(name: str, start: int, stop: int) -> tuple[slice, ...]:
    """Trailing index of a column's rows: features have one more axis after them."""
    return (slice(start, stop), slice(None)) if name == "features" else (slice(start, stop),)


def record_name(partition: int) -> str:
    """Name, within the run, of a partition's completion record."""
    return f"{DONE}/{partition:08d}.json"


def read_records(run: RunDir) -> dict[int, dict[str, Any] | None]:
    """Completion records by partition; None in place of one that is not what was written."""
    found: dict[int, dict[str, Any] | None] = {}
    for name in run.names(DONE):
        stem = name.removesuffix(".json")
        if stem.isdecimal() and stem != name:
            found[int(stem)] = _record(run, int(stem))
    return found


def _record(run: RunDir, partition: int) -> dict[str, Any] | None:
    try:
        record = run.read_json(record_name(partition))
        check = record.pop("check")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    sound = check == _check(record) and record["partition"] == partition
    return {**record, "check": check} if sound else None


def _check(record: dict[str, Any]) -> str:
    return fingerprint(record)[:16]


def content_hash(data: bytes) -> str:
    """sha256 of a file of the layout, as its record holds it."""
    return hashlib.sha256(data).hexdigest()


def damaged_layout(run: RunDir) -> list[str]:
    """Names, within the run, of layout files that are missing or not what was written."""
    known = _read_layout(run)
    if known is None:
        return [LAYOUT]
    return [f"{STORE}/{name}" for name in known if not _intact(run, name, known)]


def _read_layout(run: RunDir) -> dict[str, str] | None:
    """The layout's checksums, name -> sha256, or None when their file is missing or damaged."""
    try:
        record = run.read_json(LAYOUT)
        files = dict(record["files"])
        return files if record["check"] == _check(files) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _intact(run: RunDir, name: str, known: dict[str, str]) -> bool:
    try:
        return content_hash(run.read_bytes(f"{STORE}/{name}")) == known.get(name)
    except FileNotFoundError:
        return False


def _layout(
    shape: StoreShape, target: npt.NDArray[np.float64], attributes: dict[str, Any]
) -> dict[str, bytes]:
    """An empty store as files, name -> bytes: equal arguments, equal bytes."""
    files: dict[str, Any] = {}
    group = zarr.create_group(
        MemoryStore(files), attributes={**attributes, "partition_rows": shape.partition_rows}
    )
    _create_arrays(group, shape, target)
    return {name: buffer.to_bytes() for name, buffer in sorted(files.items())}


def _create_arrays(group: zarr.Group, shape: StoreShape, target: npt.NDArray[np.float64]) -> None:
    p, n, d, s = shape.checkpoints, shape.docs, shape.dim, shape.partition_rows
    common: dict[str, Any] = {"compressors": [Crc32cCodec()], "fill_value": 0}
    group.create_array(
        "features",
        shape=(p, n, d),
        dtype="float16",
        shards=(1, s, d),
        chunks=(1, shape.chunk_rows, d),
        **common,
    )
    for name, dtype in PER_CHECKPOINT.items():
        group.create_array(name, shape=(p, n), dtype=dtype, chunks=(p, s), **common)
    for name, dtype in PER_DOCUMENT.items():
        group.create_array(name, shape=(n,), dtype=dtype, chunks=(s,), **common)
    group.create_array("target", shape=(d,), dtype="float32", chunks=(d,), **common)[:] = target.astype(
        np.float32
    )


def _backend(run: RunDir, read_only: bool) -> LocalStore | FsspecStore:
    if run.local:
        return LocalStore(run.path(STORE), read_only=read_only)
    return FsspecStore.from_url(f"{run.uri}/{STORE}", read_only=read_only)


def _open_group(run: RunDir, mode: str) -> zarr.Group:
    # Format 2 knows a codec that unpickles.
    return zarr.open_group(_backend(run, read_only=mode == "r"), mode=mode, zarr_format=3)
