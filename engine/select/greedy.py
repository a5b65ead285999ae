"""Certified greedy: the picks of exact greedy, at every step, from an index in memory and a few exact rows.

The driver of one or more shards. It keeps the running sum, asks all shards for their best in one round trip
a pick, and sets them a floor: the best score that the last round's runners-up reach with the new sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.rows import Rows
from engine.select.baselines import quotas
from engine.select.journal import Journal
from engine.select.objective import Bools, Floats, Ints, RowKind, scores, stream, unit_target, vectors
from engine.select.selection import Certificate, walk
from engine.select.shard import Found, Request, Shard


class Shards(Protocol):
    """Rows of a store, split among searchers that answer together."""

    def search(self, request: Request) -> list[Found]:
        """Every shard's answer, in shard order."""


@dataclass(frozen=True)
class Pick:
    """One pick and its certificate; see `Certificate`. bound is None when every candidate was compared."""

    row: int
    score: float
    bound: float | None
    compared: int
    rows_read: int
    bytes_read: int


class LocalShards:
    """Shards in this process."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards

    def search(self, request: Request) -> list[Found]:
        """See `Shards.search`."""
        return [shard.search(request) for shard in self._shards]


class Greedy:
    """Greedy picks from shards.

    Args:
        rows: the store, of which only the target and, when resuming, the picked rows are read here.
        eligible: (N,) bool. restart, label: as in `exact_greedy`.
    """

    def __init__(
        self,
        rows: Rows,
        eligible: Bools,
        size: int,
        kind: RowKind,
        restart: int,
        label: npt.NDArray[np.int32] | None,
    ) -> None:
        self.rows, self.size, self.kind, self.restart, self.label = rows, size, kind, restart, label
        self.u = unit_target(rows.target)
        self.quota = {} if label is None else quotas(label[eligible], size)
        self.sums = np.zeros((rows.n_checkpoints, rows.dim))
        self.picks: list[Pick] = []
        self._closed_rows: list[int] = []
        self._closed_labels = [of for of, most in self.quota.items() if most == 0]
        self._pool: dict[int, Floats] = {}

    def run(
        self,
        make_shards: Callable[[], Shards],
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Ints, Certificate]:
        """All picks, those of the journal first; shards are made only if a pick is missing.

        Returns:
            rows (size,) in pick order and their certificate.
        """
        if journal is not None:
            self._restore(journal)
        shards = make_shards() if len(self.picks) < self.size else None
        while shards is not None and len(self.picks) < self.size:
            pick = self._next(shards)
            if journal is not None:
                journal.append(asdict(pick))
            if progress is not None:
                progress(len(self.picks), self.size)
        if journal is not None:
            journal.flush()
        return self._result()

    def _next(self, shards: Shards) -> Pick:
        if self.restart and len(self.picks) % self.restart == 0:
            self.sums = np.zeros_like(self.sums)
        request = Request(
            sums=self.sums,
            floor=self._floor(),
            closed_rows=np.array(self._closed_rows, np.int64),
            closed_labels=tuple(self._closed_labels),
            left=self.size - len(self.picks),
        )
        answers = shards.search(request)
        self._closed_rows, self._closed_labels = [], []
        found = [
            (-score, row, vector)
            for answer in answers
            for row, score, vector in zip(
                answer.rows.tolist(), answer.score.tolist(), answer.vectors, strict=True
            )
        ]
        negative, row, vector = min(found, key=lambda item: item[:2])
        bound = max(answer.bound for answer in answers)
        if not bound < -negative:
            raise RuntimeError(f"pick {len(self.picks)} is not certified: bound {bound}, score {-negative}")
        self._pool = {other: kept for _, other, kept in found if other != row}
        self.sums = self.sums + vector
        pick = Pick(
            row,
            -negative,
            bound if np.isfinite(bound) else None,
            sum(answer.compared for answer in answers),
            sum(answer.rows_read for answer in answers),
            sum(answer.bytes_read for answer in answers),
        )
        self._take(pick)
        return pick

    def _floor(self) -> float:
        """The best score that a runner-up of the last round, still open, reaches with the present sum."""
        if not self._pool:
            return -np.inf
        return float(scores(self.sums, np.stack(list(self._pool.values())), self.u).max())

    def _take(self, pick: Pick) -> None:
        self.picks.append(pick)
        self._closed_rows.append(pick.row)
        if self.label is None:
            return
        of = int(self.label[pick.row])
        self.quota[of] -= 1
        if self.quota[of] == 0:
            self._closed_labels.append(of)
            self._pool = {row: g for row, g in self._pool.items() if self.label[row] != of}

    def _restore(self, journal: Journal) -> None:
        order = journal.rows[: self.size]
        path = walk(self.rows, order, self.kind, self.restart)
        for pick, score in zip(journal.restored, path.score.tolist(), strict=False):
            if pick["score"] != score:
                raise UserError(
                    f"the journal's pick {len(self.picks)} (row {pick['row']}) scored {pick['score']}, but now "
                    f"scores {score}: the store has changed; remove the journal to start over."
                )
            self._take(Pick(**pick))
        self.sums = path.sums

    def _result(self) -> tuple[Ints, Certificate]:
        def column(name: str) -> npt.NDArray[Any]:
            return np.array([getattr(pick, name) for pick in self.picks])

        bound = np.array([-np.inf if pick.bound is None else pick.bound for pick in self.picks])
        work = (column(name) for name in ("compared", "rows_read", "bytes_read"))
        return column("row"), Certificate(column("score"), bound, *work)


def verify(
    rows: Rows,
    eligible: Bools,
    kind: RowKind,
    restart: int,
    label: npt.NDArray[np.int32] | None,
    order: Ints,
    count: int,
    seed: int = 0,
) -> list[int]:
    """Check `count` random picks against a full scan of the store, all in one pass.

    Returns:
        The picks that were checked, ascending.

    Raises:
        RuntimeError: a pick is not the argmax: a defect of this program.
    """
    u = unit_target(rows.target)
    checked = np.sort(np.random.default_rng(seed).permutation(order.size)[:count])
    sums = [walk(rows, order[t - t % restart if restart else 0 : t], kind).sums for t in checked.tolist()]
    quota = {} if label is None else quotas(label[eligible], order.size)
    closed = [] if label is None else [_closed(order[:t], label, quota) for t in checked]
    best = [(np.inf, -1)] * checked.size
    for part, piece in stream(rows):
        if not eligible[part].any():
            continue
        g = vectors(piece, kind)
        for c, t in enumerate(checked.tolist()):
            left = eligible[part] & ~np.isin(np.arange(part.start, part.stop), order[:t])
            if label is not None:
                left &= ~np.isin(label[part], closed[c])
            if left.any():
                score = np.where(left, scores(sums[c], g, u), -np.inf)
                top = int(np.argmax(score))
                best[c] = min(best[c], (-float(score[top]), part.start + top))
    for t, (_, row) in zip(checked.tolist(), best, strict=True):
        if row != order[t]:
            raise RuntimeError(f"pick {t} is row {order[t]}, but a full scan finds row {row}")
    return [int(t) for t in checked]


def _closed(before: Ints, label: npt.NDArray[np.int32], quota: dict[int, int]) -> list[int]:
    """Labels whose quota the picks before have filled."""
    return [of for of, most in quota.items() if int((label[before] == of).sum()) >= most]
