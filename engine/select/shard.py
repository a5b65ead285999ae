"""One shard of a certified search: the best candidate of a range of rows, proved by bounds and exact rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select.cache import BATCH, RowCache
from engine.select.index import ROW_BYTES, SubspaceIndex, leading_directions, orthonormal
from engine.select.objective import Bools, Floats, Ints, RowKind, scores, vectors

_SEEDS = 8  # rows compared first, for a score that rules most others out
_SAMPLE = 4096  # rows that the basis is taken from
_DRIFT = 8  # directions added at a time


@dataclass(frozen=True)
class Request:
    """One pick's question to every shard.

    sums: (P, d) running sums. floor: a score that a candidate known to the driver reaches; a shard need not
    name a best row below it. closed: rows and labels that were closed since the last request. left: picks
    still to come, this one included.
    """

    sums: Floats
    floor: float
    closed_rows: Ints
    closed_labels: tuple[int, ...]
    left: int


@dataclass(frozen=True)
class Found:
    """A shard's answer: its best rows and the bound on all others.

    rows (m,), score (m,), vectors (m, P, d): best first, ties by row; the first is the shard's argmax if it
    reaches the floor. bound: no row that was not compared scores more (-inf if none). compared, rows_read,
    bytes_read: work done.
    """

    rows: Ints
    score: Floats
    vectors: Floats
    bound: float
    compared: int
    rows_read: int
    bytes_read: int


class Shard:
    """Rows start..stop-1 of a store, indexed; answers `search`.

    Args:
        eligible: (N,) bool of the whole store. label: (N,) or None.
        index_mb, cache_mb: memory budgets of this shard's index and row cache.
        runners: rows returned beside the best one, which let the driver set a floor for the next pick.
    """

    def __init__(
        self,
        rows: Rows,
        start: int,
        stop: int,
        kind: RowKind,
        u: Floats,
        eligible: Bools,
        label: npt.NDArray[np.int32] | None,
        index_mb: int,
        cache_mb: int,
        runners: int = 4,
    ) -> None:
        self.rows, self.start, self.u, self.kind = rows, start, u, kind
        self.open = eligible[start:stop].copy()
        self.label = None if label is None else label[start:stop]
        self.cache = RowCache(rows, start, stop, kind, cache_mb)
        self.runners = runners
        self._recent = np.empty(0, np.int64)
        budget = (index_mb << 20) // (rows.n_checkpoints * (stop - start)) - ROW_BYTES
        size = min(budget // 2 - _DRIFT, max(32, rows.dim // 8))
        self.index = SubspaceIndex(rows, start, stop, kind, u, max(8, min(budget // 2, size + 8 * _DRIFT)))
        self._spent: list[float] = []  # seconds of comparing, pick by pick, since the index last grew
        began = time.perf_counter()
        if self.open.any():
            self._first_basis(size)
        self._pass_seconds = time.perf_counter() - began

    def search(self, request: Request) -> Found:
        """The best open row for `request.sums`, certified.

        Every row whose upper bound reaches the best exact score found so far (or the floor) is compared
        exactly, in descending order of bound; when none is left, no other row can win or tie.
        """
        self._close(request.closed_rows, request.closed_labels)
        read, nbytes = self.cache.rows_read, self.cache.bytes_read
        if not self.open.any():
            empty = np.empty(0)
            return Found(np.empty(0, np.int64), empty, np.empty((0, *request.sums.shape)), -np.inf, 0, 0, 0)
        query = self.index.query(request.sums)
        stale = self.index.stale(query)
        bound = self.index.fresh(query) if stale is None else stale
        bound[~self.open] = -np.inf
        self._seen: dict[int, tuple[float, Floats]] = {}
        self._best = request.floor
        began = time.perf_counter()
        self._compare(self._seeds(bound), bound, request.sums)
        candidates = np.flatnonzero(bound >= self._best)
        if stale is not None:
            bound[candidates] = np.minimum(bound[candidates], self.index.fresh(query, candidates))
            candidates = candidates[bound[candidates] >= self._best]
        candidates = candidates[np.argsort(-bound[candidates], kind="stable")]
        size = 2 * _SEEDS
        while candidates.size:
            self._compare(candidates[:size], bound, request.sums)
            candidates = candidates[size:]
            candidates = candidates[bound[candidates] >= self._best]
            size = min(2 * size, BATCH)
        self._spent.append(time.perf_counter() - began)
        self._grow(request)
        top = sorted(self._seen, key=lambda row: (-self._seen[row][0], row))[: 1 + self.runners]
        self._recent = np.array(top[:_SEEDS], np.int64)
        return Found(
            rows=self._recent[: 1 + self.runners] + self.start,
            score=np.array([self._seen[row][0] for row in top]),
            vectors=np.stack([self._seen[row][1] for row in top]),
            bound=float(bound.max()),
            compared=len(self._seen),
            rows_read=self.cache.rows_read - read,
            bytes_read=self.cache.bytes_read - nbytes,
        )

    def _seeds(self, bound: Floats) -> Ints:
        """The best rows of the last search, and the highest bounds of this one."""
        recent = self._recent[self.open[self._recent]]
        if recent.size:
            return recent
        count = min(_SEEDS, int(self.open.sum()))
        return np.argpartition(-bound, count - 1)[:count]

    def _compare(self, rows: Ints, bound: Floats, sums: Floats) -> None:
        """Score rows exactly; they leave the candidates (their bound becomes -inf)."""
        g = self.cache.vectors(rows)
        for row, score, vector in zip(rows.tolist(), scores(sums, g, self.u).tolist(), g, strict=True):
            self._seen[row] = (score, vector)
            self._best = max(self._best, score)
        bound[rows] = -np.inf

    def _close(self, rows: Ints, labels: tuple[int, ...]) -> None:
        local = rows - self.start
        self.open[local[(local >= 0) & (local < self.open.size)]] = False
        if self.label is not None and labels:
            self.open &= ~np.isin(self.label, labels)

    def _first_basis(self, size: int) -> None:
        """u, the mean and the leading principal directions of a sample of rows."""
        sample = self._sample()
        bases = []
        for j in range(self.rows.n_checkpoints):
            keep = orthonormal(np.stack([self.u, sample[:, j].mean(axis=0)], axis=1))
            bases.append(
                np.concatenate([keep, leading_directions(sample[:, j], keep, size - keep.shape[1])], axis=1)
            )
        self.index.extend(np.stack(bases))

    def _grow(self, request: Request) -> None:
        """Add the running sum's rest and what the rows compared lately have in common, when that will pay.

        It pays when comparing has taken as long as the pass over the store that growing costs, and would take
        as long again at its present rate: at worst twice the best that hindsight could do.
        """
        rate = float(np.mean(self._spent[-8:]))
        if sum(self._spent) < self._pass_seconds or rate * request.left < self._pass_seconds:
            return
        if self.index.size >= self.rows.dim:
            return
        began = time.perf_counter()
        rest = self.index.residual(np.concatenate([request.sums[None], self.cache.lately(_SAMPLE // 4)]))
        bases = []
        for j in range(self.rows.n_checkpoints):
            before = self.index.basis[j, :, : self.index.size]
            keep = orthonormal(np.concatenate([before, rest[:1, j].T], axis=1))
            more = leading_directions(rest[1:, j], keep, min(_DRIFT, self.rows.dim - self.index.size) - 1)
            bases.append(np.concatenate([keep[:, before.shape[1] :], more], axis=1))
        self.index.extend(np.stack(bases))
        self._spent = []
        self._pass_seconds = time.perf_counter() - began

    def _sample(self) -> Floats:
        """Unit rows (m, P, d) from chunks spread over the shard."""
        rng = np.random.default_rng(0)
        chunk = self.rows.chunk_rows
        each = min(chunk, 8)
        chunks = np.unique(np.flatnonzero(self.open) // chunk)
        chunks = rng.permutation(chunks)[: max(1, _SAMPLE // each)]
        rows = np.unique(chunks[:, None] * chunk + rng.integers(0, chunk, (chunks.size, each)))
        rows = rows[(rows < self.open.size)]
        rows = rows[self.open[rows]]
        if rows.size == 0:
            rows = np.flatnonzero(self.open)[:_SAMPLE]
        return vectors(self.rows.take(rows + self.start), "unit")
