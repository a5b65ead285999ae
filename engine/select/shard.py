"""One shard of a certified search: the best candidate of a range of rows, proved by bounds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.rows import RowBlock, Rows
from engine.select.cache import BATCH, RowCache
from engine.select.index import ROW_BYTES, SubspaceIndex, leading_directions, orthonormal
from engine.select.objective import Bools, Floats, Ints, RowKind, scores, stream, vectors

_SEEDS = 8  # rows compared first, for a score that rules most others out
_SAMPLE = 2048  # rows that the basis is taken from
_LEAVE, _FEWEST = 0.02, 32  # share of squares that the first basis may leave; its fewest directions
_DRIFT = 8  # directions added at a time
_FOLLOW = 128  # rows compared that cost as much as having Q follow the running sum
_AHEAD = 64  # candidates read together before the first is compared
_ANYWAY = 16  # rows compared for a pick whatever the index is
_SWEEP = 32  # rows read in order that cost about as much as one that is read by itself
_KEPT = 9  # best rows that an answer holds; the driver guesses the next picks from them


@dataclass(frozen=True)
class Step:
    """One pick's question. sums: (P, d), running sums; guess: the row that the driver expects to be picked,
    -1 for none; floor: the score that it reaches: no shard need name a row below it."""

    sums: Floats
    guess: int
    floor: float


@dataclass(frozen=True)
class Request:
    """Questions to every shard in one round trip.

    steps: each supposes that the guesses of the steps before were picked. closed_rows, closed_labels: what
    was picked or used up since the last request, guesses not included. left: picks still to come.
    """

    steps: list[Step]
    closed_rows: Ints
    closed_labels: tuple[int, ...]
    left: int


@dataclass(frozen=True)
class Found:
    """A shard's answer to one step: its best rows and the bound on all others.

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

    def beats(self, step: Step) -> bool:
        """Whether the best row found is to be preferred to the step's guess."""
        return bool(self.rows.size) and (-self.score[0], self.rows[0]) < (-step.floor, step.guess)


class Shard:
    """Rows start..stop-1 of a store, indexed; answers `Request`s.

    Args:
        eligible: (N,) bool of the whole store. label: (N,) or None.
        index_mb, cache_mb: memory budgets of this shard's index and row cache. threads: as in `SubspaceIndex`.
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
        threads: int = 1,
    ) -> None:
        self.rows, self.start, self.u, self.kind = rows, start, u, kind
        self.open = eligible[start:stop].copy()
        self.label = None if label is None else label[start:stop]
        self.cache = RowCache(rows, start, stop, kind, cache_mb)
        self._recent, self._guessed = np.empty((2, 0), np.int64)
        self._top: list[tuple[float, int, Floats]] = []  # (-score, row, vector) of the best rows compared
        self._best, self._compared = -np.inf, 0
        budget = (index_mb << 20) // (rows.n_checkpoints * (stop - start)) - ROW_BYTES
        size = min(budget // 2 - _DRIFT, max(_FEWEST, rows.dim // 8))
        capacity = max(8, min(budget // 2, size + 8 * _DRIFT))
        self.index = SubspaceIndex(rows, start, stop, kind, u, capacity, threads)
        self._spent: list[float] = []  # seconds, pick by pick, that more directions may save
        self._pass_seconds = 0.0  # that the last pass over the store took
        self._unfollowed = 0  # rows compared since the index last followed the running sum
        if self.open.any():
            self._first_basis(size)

    def answer(self, request: Request) -> list[Found]:
        """Search step by step, up to the first where a row of this shard is better than the guess."""
        self.open[self._guessed] = True  # until the driver says which guesses came true
        self._guessed = np.empty(0, np.int64)
        self._close(request.closed_rows, request.closed_labels)
        found: list[Found] = []
        for step in request.steps:
            found.append(self.search(step))
            if found[-1].beats(step):
                break
            guess = step.guess - self.start
            if 0 <= guess < self.open.size:
                self._guessed = np.append(self._guessed, guess)
                self.open[guess] = False
        self._grow(request)
        return found

    def search(self, step: Step) -> Found:
        """The best open row for the sums of a step, certified.

        Every row whose upper bound reaches the best exact score found so far (or the floor) is compared
        exactly, in descending order of bound; when none is left, no other row can win or tie.
        """
        self._top, self._best, self._compared = [], step.floor, 0
        if not self.open.any():
            return Found(
                np.empty(0, np.int64), np.empty(0), np.empty((0, *step.sums.shape)), -np.inf, 0, 0, 0
            )
        read, nbytes = self.cache.rows_read, self.cache.bytes_read
        query = self.index.query(step.sums)
        stale = self.index.stale(query)
        bound = self.index.fresh(query) if stale is None else stale
        bound[~self.open] = -np.inf
        began = time.perf_counter()
        self._compare(self._seeds(bound), bound, step.sums)
        candidates = np.flatnonzero(bound >= self._best)
        if stale is not None:
            bound[candidates] = np.minimum(bound[candidates], self.index.fresh(query, candidates))
            candidates = candidates[bound[candidates] >= self._best]
        self._exhaust(candidates, bound, step.sums)
        self._spent.append((time.perf_counter() - began) * max(0.0, 1 - _ANYWAY / self._compared))
        self._unfollowed += self._compared
        if self._unfollowed > _FOLLOW:
            self.index.follow(step.sums)
            self._unfollowed = 0
        self._recent = np.array([row for _, row, _ in self._top], np.int64)
        return Found(
            rows=self._recent + self.start,
            score=np.array([-negative for negative, _, _ in self._top]),
            vectors=np.stack([vector for _, _, vector in self._top]),
            bound=float(bound.max()),
            compared=self._compared,
            rows_read=self.cache.rows_read - read,
            bytes_read=self.cache.bytes_read - nbytes,
        )

    def _exhaust(self, candidates: Ints, bound: Floats, sums: Floats) -> None:
        """Compare candidates in descending order of bound, until none is left that could win or tie.

        The highest come first by themselves: what they find sets most of the others aside, unsorted. Where many
        are left nonetheless, as with bounds that say little, they are read in the order of the store.
        """
        highest, size = candidates, 2 * _SEEDS
        if candidates.size > 2 * _AHEAD:
            highest = candidates[np.argpartition(-bound[candidates], _AHEAD)[:_AHEAD]]
        for group in (highest, candidates):
            left = group[bound[group] >= self._best]
            left = left[np.argsort(-bound[left], kind="stable")]
            self.cache.load(left[:_AHEAD])
            while left.size:
                if size == BATCH and self.cache.missing(left) * _SWEEP > bound.size:
                    return self._sweep(left, bound, sums)
                self._compare(left[:size], bound, sums)
                left = left[size:]
                left = left[bound[left] >= self._best]
                size = min(2 * size, BATCH)

    def _sweep(self, candidates: Ints, bound: Floats, sums: Floats) -> None:
        """Compare those candidates that still could win or tie, in one pass over the partitions that hold them."""
        candidates = np.sort(candidates) + self.start
        for part, block in stream(self.rows, self.start, self.start + bound.size, candidates):
            low, high = np.searchsorted(candidates, (part.start, part.stop))
            here = candidates[low:high]
            here = here[bound[here - self.start] >= self._best]
            self.cache.count(block)
            if here.size:
                at = here - part.start
                piece = RowBlock(block.features[:, at], block.scale[:, at], block.valid[at])
                self._score(here - self.start, vectors(piece, self.kind), bound, sums)

    def _seeds(self, bound: Floats) -> Ints:
        """The best rows of the last search, and the highest bounds of this one."""
        recent = self._recent[self.open[self._recent]]
        if recent.size:
            return recent
        count = min(_SEEDS, int(self.open.sum()))
        return np.argpartition(-bound, count - 1)[:count]

    def _compare(self, rows: Ints, bound: Floats, sums: Floats) -> None:
        """Score rows exactly, by way of the cache."""
        self._score(rows, self.cache.vectors(rows), bound, sums)

    def _score(self, rows: Ints, g: Floats, bound: Floats, sums: Floats) -> None:
        """Score rows (n,) of vectors g (n, P, d); they leave the candidates (their bound becomes -inf)."""
        score = scores(sums, g, self.u)
        self.index.learn(rows, g)
        self._compared += rows.size
        self._best = max(self._best, float(score.max()))
        best = np.lexsort((rows, -score))[:_KEPT]
        self._top += [(-float(score[i]), int(rows[i]), g[i]) for i in best]
        self._top = sorted(self._top, key=lambda item: item[:2])[:_KEPT]
        bound[rows] = -np.inf

    def _close(self, rows: Ints, labels: tuple[int, ...]) -> None:
        local = rows - self.start
        self.open[local[(local >= 0) & (local < self.open.size)]] = False
        if self.label is not None and labels:
            self.open &= ~np.isin(self.label, labels)

    def _first_basis(self, size: int) -> None:
        """u, the mean and the leading principal directions of a sample of rows: as many as it takes to leave
        _LEAVE of its squares, and at most `size`."""
        sample = self._sample()
        bases, needed = [], 1
        for j in range(self.rows.n_checkpoints):
            keep = orthonormal(np.stack([self.u, sample[:, j].mean(axis=0)], axis=1))
            more, left = leading_directions(sample[:, j], keep, max(1, size - keep.shape[1]))
            bases.append(np.concatenate([keep, more], axis=1))
            needed = max(needed, keep.shape[1] + 1 + int((left > _LEAVE).sum()))
        began = time.perf_counter()
        self.index.extend(np.stack(bases)[:, :, : max(_FEWEST, needed)])
        self._pass_seconds = time.perf_counter() - began

    def _grow(self, request: Request) -> None:
        """Add the running sum's rest and what the rows compared lately have in common, when that will pay.

        It pays when comparing has cost as much as the pass over the store that growing takes, and would cost
        as much again at its present rate: at worst twice the best that hindsight could do. Both are measured,
        in seconds, so that a store far away is asked for single rows or for all of them as that is worth.
        """
        cost = self._pass_seconds
        if not self._spent or sum(self._spent) < cost or np.mean(self._spent[-8:]) * request.left < cost:
            return
        if self.index.size >= self.rows.dim:
            return
        size = min(_DRIFT, self.rows.dim - self.index.size)
        began = time.perf_counter()
        self.index.extend(self.index.drift(request.steps[-1].sums, self.cache.lately(BATCH), size))
        self._spent, self._pass_seconds = [], time.perf_counter() - began

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
