"""Certified greedy: the picks of exact greedy, at every step, from an index in memory and a few exact rows.

The driver of one or more shards. It keeps the running sum and the runners-up of the last pick; the best of
those with the new sum is its guess for the next pick, and the guess's score a floor that spares the shards
work. Where round trips cost something it guesses several picks ahead: the shards certify guess after guess
up to the first that one of them can beat. Guesses change the work, never the picks.
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
from engine.select.shard import Found, Request, Shard, Step

_POOL = 32  # runners-up kept for guesses


class Shards(Protocol):
    """Rows of a store, split among searchers that answer together."""

    @property
    def ahead(self) -> int:
        """Picks that one request may ask for at most: more where a round trip costs something."""

    def answer(self, request: Request) -> list[list[Found]]:
        """Every shard's answers, step by step, in shard order."""


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

    def __init__(self, shards: list[Shard], ahead: int = 1) -> None:
        self._shards, self.ahead = shards, ahead

    def answer(self, request: Request) -> list[list[Found]]:
        """See `Shards.answer`."""
        return [shard.answer(request) for shard in self._shards]


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
        self._pool: dict[int, Floats] = {}  # runners-up of the last pick
        self._ahead = 1

    def run(
        self,
        make_shards: Callable[[], Shards],
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_pick: Callable[[Pick], None] | None = None,
    ) -> tuple[Ints, Certificate]:
        """All picks, those of the journal first; shards are made only if a pick is missing.

        Args:
            on_pick: called with each new pick.

        Returns:
            rows (size,) in pick order and their certificate.
        """
        if journal is not None:
            self._restore(journal)
        shards = make_shards() if len(self.picks) < self.size else None
        while shards is not None and len(self.picks) < self.size:
            for pick in self._round(shards):
                if journal is not None:
                    journal.append(asdict(pick))
                if on_pick is not None:
                    on_pick(pick)
                if progress is not None:
                    progress(len(self.picks), self.size)
        if journal is not None:
            journal.flush()
        return self._result()

    def _round(self, shards: Shards) -> list[Pick]:
        """One round trip: the picks of all steps up to the first whose guess was not the best row."""
        steps = self._steps(min(self._ahead, shards.ahead))
        closed = np.array(self._closed_rows, np.int64), tuple(self._closed_labels)
        self._closed_rows, self._closed_labels = [], []
        answers = shards.answer(Request(steps, *closed, left=self.size - len(self.picks)))
        picks: list[Pick] = []
        for number, step in enumerate(steps):
            picks.append(self._accept(step, [answer[number] for answer in answers]))
            if picks[-1].row != step.guess:
                break
        self._ahead = 2 * len(picks) if len(picks) == len(steps) else max(1, len(picks))
        return picks

    def _steps(self, ahead: int) -> list[Step]:
        """The present sum with the best row of the pool as guess, then the sum with that row added, and so on."""
        steps: list[Step] = []
        pool, sums, done = dict(self._pool), self.sums, len(self.picks)
        quota = dict(self.quota)
        while len(steps) < ahead and done + len(steps) < self.size:
            if self.restart and (done + len(steps)) % self.restart == 0:
                sums = np.zeros_like(sums)
            if not pool:
                return steps or [Step(sums, -1, -np.inf)]
            rows = np.array(sorted(pool))
            score = scores(sums, np.stack([pool[row] for row in rows.tolist()]), self.u)
            best = int(np.argmax(score))
            steps.append(Step(sums, int(rows[best]), float(score[best])))
            sums = sums + pool.pop(int(rows[best]))
            if self.label is not None:
                of = int(self.label[rows[best]])
                quota[of] -= 1
                if quota[of] == 0:  # the next step would have to close a label
                    break
        return steps

    def _accept(self, step: Step, found: list[Found]) -> Pick:
        """The best row of all shards, added to the sum."""
        kept = {
            row: (-score, row, vector)
            for answer in found
            for row, score, vector in zip(
                answer.rows.tolist(), answer.score.tolist(), answer.vectors, strict=True
            )
        }
        ranked = sorted(kept.values(), key=lambda item: item[:2])
        negative, row, vector = ranked[0]
        bound = max(answer.bound for answer in found)
        if not bound < -negative:
            raise RuntimeError(f"pick {len(self.picks)} is not certified: bound {bound}, score {-negative}")
        self._pool = {other: g for _, other, g in ranked[1 : _POOL + 1]}
        self.sums = step.sums + vector
        pick = Pick(
            row,
            -negative,
            bound if np.isfinite(bound) else None,
            sum(answer.compared for answer in found),
            sum(answer.rows_read for answer in found),
            sum(answer.bytes_read for answer in found),
        )
        self._take(pick)
        return pick

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
        return column("row"), Certificate(column("row"), column("score"), bound, *work)


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
