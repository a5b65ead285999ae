"""GradientStore: projected gradients in Zarr v3, one partition = one shard = one writer.

Layout (ARCHITECTURE): `features (P, N, d)` float16 unit-norm rows and `scale (P, N)` float32 (row = scale x
feature), sharded by partition; `loss`, `norm`, `alignment (P, N)` float32; `label` int32, `confidence`
float32, `tokens` int32, `state` uint8 `(N,)`; `target (d,)` float32. Every chunk carries a CRC32C. A partition
counts as written only when its completion record exists: Zarr reads missing chunks as zeros.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, LocalStore

from engine.errors import UserError
from engine.gradients import PartitionGradients
from engine.rows import RowBlock
from engine.rundir import DONE, STORE, RunDir
from engine.storage import reason

MISSING, VALID, QUARANTINED = 0, 1, 2
CHUNK_BYTES = 128 << 10
"""Aimed size of an inner chunk: small enough for single rows, large enough to stream (docs/decisions.md)."""

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
        p, n, d = self._arrays["features"].shape
        self.shape = StoreShape(p, n, d, int(group.attrs["partition_rows"]))
        self.n_checkpoints, self.n_rows, self.dim = p, n, d
        self.block_rows, self.chunk_rows = self.shape.partition_rows, self.shape.chunk_rows
        with _sound(run):
            self.target: npt.NDArray[np.float64] = np.asarray(self._arrays["target"][:], np.float64)
        self.attributes: dict[str, Any] = dict(group.attrs)

    @classmethod
    def create(
        cls, run: RunDir, shape: StoreShape, target: npt.NDArray[np.float64], attributes: dict[str, Any]
    ) -> GradientStore:
        """Lay out an empty store; an unfinished layout is replaced, one that is complete is opened instead."""
        if run.exists(f"{STORE}/zarr.json") and "complete" in _open_group(run, "r").attrs:
            return cls.open(run)
        try:
            group = zarr.create_group(_backend(run, read_only=False), overwrite=True)
            _create_arrays(group, shape, target)
            group.attrs.update({**attributes, "partition_rows": shape.partition_rows})
            group.attrs["complete"] = True
        except OSError as error:
            raise UserError(f"cannot create the store {run.path(STORE)}: {reason(error)}.") from None
        return cls(run, group)

    @classmethod
    def open(cls, run: RunDir, writable: bool = False) -> GradientStore:
        """Open the store of a run; UserError when there is none."""
        if not run.exists(f"{STORE}/zarr.json"):
            raise UserError(f"{run.uri} has no gradient store: run `unbake extract` first.")
        with _sound(run):
            group = _open_group(run, "r+" if writable else "r")
        return cls(run, group)

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
        """
        start = partition * self.block_rows
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
            except OSError as error:
                raise UserError(
                    f"cannot write partition {partition} to {self.run.path(STORE)}: {reason(error)}."
                ) from None
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
        self.run.write_json(f"{DONE}/{partition:08d}.json", record)
        return record

    def done(self, fingerprint: str) -> dict[int, dict[str, Any]]:
        """Completion records with the right fingerprint, by partition; not of those that lost an object."""
        records = {}
        present = self._present()
        for name in self.run.names(DONE):
            if not name.startswith(".") and name.endswith(".json"):
                record = self.run.read_json(f"{DONE}/{name}")
                if record["fingerprint"] == fingerprint and int(record["partition"]) in present:
                    records[int(record["partition"])] = record
        return records

    def _present(self) -> set[int]:
        """Partitions of which every column has its objects, by one listing of the store."""
        found: collections.Counter[int] = collections.Counter()
        for path in self.run.walk(STORE):
            _, name, *key = path.split("/")  # e.g. gradients.zarr/features/c/<checkpoint>/<partition>/0
            if name in PER_DOCUMENT and len(key) == 2:
                found[int(key[1])] += 1
            elif (name == "features" or name in PER_CHECKPOINT) and len(key) > 2:
                found[int(key[2])] += 1
        whole = self.n_checkpoints + len(PER_CHECKPOINT) + len(PER_DOCUMENT)
        return {partition for partition, objects in found.items() if objects == whole}

    def column(self, name: str, checkpoint: int | None = None) -> npt.NDArray[Any]:
        """A whole column: (N,), or (P, N) for per-checkpoint columns unless one checkpoint is asked for."""
        array = self._arrays[name]
        with _sound(self.run):
            return np.asarray(array[:] if checkpoint is None else array[checkpoint])

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """See `engine.rows.Rows.valid`."""
        return self.column("state") == VALID

    def read(self, start: int, stop: int) -> RowBlock:
        """See `engine.rows.Rows.read`; UserError when a chunk fails its checksum."""
        stop = min(stop, self.n_rows)
        with _sound(self.run):
            return RowBlock(
                np.asarray(self._arrays["features"][:, start:stop]),
                np.asarray(self._arrays["scale"][:, start:stop]),
                np.asarray(self._arrays["state"][start:stop]) == VALID,
            )

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """See `engine.rows.Rows.take`; UserError when a chunk fails its checksum."""
        with _sound(self.run):
            return RowBlock(
                np.asarray(self._arrays["features"].oindex[:, rows]),
                np.asarray(self._arrays["scale"].oindex[:, rows]),
                np.asarray(self._arrays["state"].oindex[rows]) == VALID,
            )


@contextlib.contextmanager
def _sound(run: RunDir) -> Iterator[None]:
    """What Zarr says of a damaged chunk (a ValueError that names nothing) as one sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(
            f"the store {run.path(STORE)} is damaged or unreadable ({str(error).splitlines()[0].rstrip('.')}): "
            f"remove {run.path('')} and extract again."
        ) from None


def _rows(name: str, start: int, stop: int) -> tuple[slice, ...]:
    """Trailing index of a column's rows: features have one more axis after them."""
    return (slice(start, stop), slice(None)) if name == "features" else (slice(start, stop),)


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
    return zarr.open_group(_backend(run, read_only=mode == "r"), mode=mode)
