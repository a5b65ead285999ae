"""A bounded cache of exact rows: what was compared once is seldom read twice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.rows import RowBlock, Rows
from engine.select.objective import Floats, Ints, RowKind, vectors

BATCH = 256
"""Rows asked for together at most, so that memory stays bounded whatever is asked."""


class RowCache:
    """Rows of a store in their stored precision; the least recently used leave first.

    Args:
        rows, start, stop: rows start..stop-1 of a store.
        megabytes: the most that cached rows may take (four batches at least).
    """

    def __init__(self, rows: Rows, start: int, stop: int, kind: RowKind, megabytes: int) -> None:
        self._rows, self._start, self._kind = rows, start, kind
        self._bytes = megabytes << 20
        self._slot = np.full(stop - start, -1, np.int32)
        self._row, self._used, self._free = np.empty((3, 0), np.int64)
        self._features: npt.NDArray[np.floating] | None = None  # made by the first read, which knows the type
        self._scale = np.empty((rows.n_checkpoints, 0), np.float32)
        self._clock = 0
        self.rows_read = self.bytes_read = 0

    def vectors(self, rows: Ints) -> Floats:
        """Vectors (n, P, d) of at most BATCH distinct rows, counted from `start`, in any order.

        Rows that are missing are read in one ascending request, so that rows of a chunk are read together.
        """
        self.load(rows)
        slots = self._slot[rows]
        assert self._features is not None
        block = RowBlock(self._features[:, slots], self._scale[:, slots], np.ones(slots.size, np.bool_))
        return vectors(block, self._kind)

    def load(self, rows: Ints) -> None:
        """Make sure that at most BATCH distinct rows are in memory."""
        self._clock += 1
        here = self._slot[rows]
        self._used[here[here >= 0]] = self._clock
        missing = np.sort(rows[here < 0])
        if missing.size:
            self._read(missing)

    def missing(self, rows: Ints) -> int:
        """How many of these rows are not in memory."""
        return int((self._slot[rows] < 0).sum())

    def count(self, block: RowBlock) -> None:
        """Rows that were read past the cache count as read."""
        self.rows_read += block.valid.size
        self.bytes_read += block.features.nbytes + block.scale.nbytes

    def lately(self, count: int) -> Floats:
        """Unit vectors (m, P, d) of up to `count` rows used last."""
        slots = np.argsort(-np.where(self._row >= 0, self._used, -1), kind="stable")[:count]
        slots = slots[self._row[slots] >= 0]
        assert self._features is not None
        block = RowBlock(self._features[:, slots], self._scale[:, slots], np.ones(slots.size, np.bool_))
        return vectors(block, "unit")

    def _read(self, rows: Ints) -> None:
        block = self._rows.take(rows + self._start)
        self.rows_read += rows.size
        chunks = np.unique((rows + self._start) // self._rows.chunk_rows).size
        self.bytes_read += (
            chunks * self._rows.chunk_rows * (block.features[:, 0].nbytes + block.scale[:, 0].nbytes)
        )
        if self._features is None:
            self._features = self._make_room(block)
        if self._free.size < rows.size:
            share = max(BATCH, self._row.size // 8)
            leaving = np.argpartition(self._used, share)[:share]
            gone = self._row[leaving]
            self._slot[gone[gone >= 0]] = -1
            self._row[leaving], self._free = -1, leaving
        slots, self._free = self._free[: rows.size], self._free[rows.size :]
        self._features[:, slots], self._scale[:, slots] = block.features, block.scale
        self._row[slots], self._used[slots], self._slot[rows] = rows, self._clock, slots

    def _make_room(self, like: RowBlock) -> npt.NDArray[np.floating]:
        """Set aside as many rows as the budget allows; features (P, most, d)."""
        checkpoints, _, dim = like.features.shape
        most = max(4 * BATCH, self._bytes // (checkpoints * (dim * like.features.itemsize + 4)))
        most = min(most, max(self._slot.size, 4 * BATCH))
        self._row, self._used = np.full(most, -1, np.int64), np.zeros(most, np.int64)
        self._free, self._scale = np.arange(most), np.empty((checkpoints, most), np.float32)
        return np.empty((checkpoints, most, dim), like.features.dtype)
