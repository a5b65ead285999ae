"""Subspace index: a few numbers per row that bound every candidate's score without reading the row.

Per row and checkpoint, with ``h = g / ||g||``: ``nu = ||g||``, ``alpha = h.u``, and a low-precision copy zq
of ``z = Q^T h``. With ``e = h - Q zq``, s the unit running sum, ``w = Q^T s``, ``s' = s - Q w``, for any Q::

    h.s = zq.w + (Q^T e).w + e.s'   so   |h.s - zq.w| <= q ||w|| + rho ||s'||,   q >= ||Q^T e||, rho >= ||e||

Bounds are sharpened in stages. The *stale* stage uses zq.w and its radius as they were for an earlier sum s0,
each row's own: with ``s = a s0 + b``, h.s differs from a (h.s0) by at most ||b||, a few operations per row
whatever Q's size. The *fresh* stage computes zq.w for the rows that the stale one leaves, and for all rows when
those become many. What is left then is compared exactly, and a row once in memory also *learns* its coordinates
along the columns that were added to Q since it was last looked at, such as the rest of the running sum: so Q
follows the sum without a pass over the store, and each row is bounded with the columns that it knows. A pass
teaches all rows all columns.
Everything is bounded on unit vectors, so norms of any size are harmless. Rounding is covered as
docs/selection.md says; it assumes that a matrix product is a sum of products in some order, with or without
FMA, in the precision of its operands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.rows import RowBlock, Rows
from engine.select.objective import Floats, Ints, RowKind, norms, stream

T = TypeVar("T")

ROW_BYTES = 33
"""Bytes per row and checkpoint beside the coordinates: nu, alpha, q, rho, the stale cosine and radius, and (once
per row) the sum that these are of and the columns that the row knows."""

_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53  # unit roundoffs
_BOUND_ROWS = 1 << 15  # rows bounded at once, so that their numbers stay in the core's cache
_FRESH_ROWS = 1 << 13  # of them where each has coordinates to multiply, so that threads end together
_COORDS = 1 << 17  # coordinates converted to float32 at once, likewise
_UNIT = 2.0**-15  # of the coordinates zq, kept as int16
_STALE_SHARE = 4  # a row gathered costs about as much as this many rows in sequence
_SUMS = 64  # earlier sums that stale bounds may refer to
_TAUGHT = 32  # columns added in memory, of which one is replaced rather than one that all rows know
_LEAST = 1e-6  # a direction of which Q leaves less is not worth a column


@dataclass(frozen=True)
class Query:
    """A running sum as the index sees it, per checkpoint.

    unit: (P, d) s; norm: (P,) of the sum itself; cosine: cos(s, u); weights: (P, r) float32, Q^T s in zq's
    unit; inside, slack: (P,), ||w|| and the rounding of zq.w; outside: (P, 1 + lessons), ||s'|| for a row that
    knows so many of the columns added in memory; turn, drift: (P, sums), a and ||b|| of the stale stage.
    """

    unit: Floats
    norm: Floats
    cosine: Floats
    weights: npt.NDArray[np.float32]
    inside: Floats
    outside: Floats
    slack: Floats
    turn: Floats
    drift: Floats


class SubspaceIndex:
    """The index of rows start..stop-1 of a store; its row i is row start + i of the store.

    Args:
        rows: the store; each `extend` streams it once.
        u: (d,), unit target.
        capacity: directions (columns of Q) that memory is set aside for.
        threads: that share a pass; each row is one thread's, so their number changes no bit.
    """

    def __init__(
        self, rows: Rows, start: int, stop: int, kind: RowKind, u: Floats, capacity: int, threads: int = 1
    ) -> None:
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._at_once = threads
        self.rows, self.start, self.stop, self.kind, self.u = rows, start, stop, kind, u
        p, n = rows.n_checkpoints, stop - start
        self.size, self.capacity = 0, min(capacity, rows.dim)
        self.basis = np.zeros((p, self.capacity, rows.dim))  # Q^T
        self.skew = np.zeros(p)  # ||Q^T Q - I||
        self._weights = np.zeros((p, self.capacity))  # Q^T s of the last query
        self._nu = np.zeros((p, n))
        self._coords = np.zeros((p, n, self.capacity), np.int16)
        self._alpha, self._q, self._rho, self._stale, self._radius = np.zeros((5, p, n), np.float32)
        self._sums = np.zeros((p, 0, rows.dim))  # that stale bounds are of
        self._sum_of = np.zeros(n, np.uint8)
        self._gathered = 0
        self.lessons = 0  # columns ever added in memory
        self._lesson = np.zeros(
            self.capacity, np.int32
        )  # by which a column came; 0: a pass, all rows know it
        self._knows = np.zeros(n, np.int32)  # a row knows the columns of lessons up to this
        self._wrong2 = np.zeros(p)  # ||Q^T Q - I||^2 in Frobenius's norm, as measured
        # Covers every float64 error on unit quantities: sums of d products and a few operations after them.
        self.margin = 2 * _DOUBLE * (rows.dim + 64)

    @property
    def row_bytes(self) -> int:
        """Bytes per row, all checkpoints."""
        return self.rows.n_checkpoints * (ROW_BYTES + 2 * self.capacity)

    def extend(self, directions: Floats) -> None:
        """Add columns to Q by one streaming pass; where capacity ends they replace those that s uses least.

        The pass also gives every row its coordinates along the columns that were added in memory.

        Args:
            directions: (P, d, m), orthonormal to one another and to Q's columns (`complement`); at most a
                quarter of the capacity is replaced, the rest of them is left out.
        """
        free = self.capacity - self.size
        directions = directions[:, :, : max(free, self.capacity // 4, 1)]
        surplus = max(0, directions.shape[2] - free)
        used = (self._weights[:, : self.size] ** 2).sum(axis=0)
        replaced = np.argsort(used, kind="stable")[:surplus]
        columns = np.concatenate([replaced, np.arange(self.size, self.size + directions.shape[2] - surplus)])
        first = self.size == 0
        self.lessons += 1
        wrong = self._place(columns, directions, self.lessons)
        columns = np.flatnonzero(self._lesson)
        taught = self._lesson[columns]

        def add(piece: tuple[slice, RowBlock]) -> None:
            at, block = piece
            part = slice(at.start - self.start, at.stop - self.start)
            known = taught <= self._knows[part, None]
            for j in range(self.rows.n_checkpoints):
                z = self._project(block, j, part, self.basis[j, columns].T, first)
                z[known] = 0
                self._coords[j][part, columns] += self._settle(j, part, z, float(wrong[j]))

        pieces = stream(self.rows, self.start, self.stop)
        while together := list(itertools.islice(pieces, self._at_once)):
            self._each(add, together)
        self._lesson[:] = self._knows[:] = self.lessons = 0
        self._sums = self._sums[:, :0]

    def follow(self, sums: Floats) -> None:
        """Add to Q what it leaves of the running sum (P, d), for rows to `learn`; where capacity ends, in place
        of the column that the sum uses least: one added so while there are some, for those few rows know."""
        rest = self._outside(self._outside(self.query(sums).unit[:, :, None]))
        length = np.linalg.norm(rest, axis=1, keepdims=True)
        if not (length > _LEAST).all():
            return
        added = np.flatnonzero(self._lesson) if self.size == self.capacity else np.array([self.size])
        if added.size < _TAUGHT and self.size == self.capacity:
            added = np.arange(self.size)
        least = added[[int(np.argmin((self._weights[:, added] ** 2).sum(axis=0)))]]
        self.lessons += 1
        self._place(least, self._outside(rest / length), self.lessons)

    def learn(self, rows: Ints, vectors: Floats) -> None:
        """Give rows (m,) of vectors (m, P, d) their coordinates along the columns that they do not know."""
        behind = self._knows[rows] < self.lessons
        if not behind.any():
            return
        rows, vectors = rows[behind], vectors[behind]
        columns = np.flatnonzero(self._lesson > self._knows[rows].min())
        known = self._lesson[columns] <= self._knows[rows][:, None]
        wrong, at = self._wrong(), np.ix_(rows, columns)
        for j in range(self.rows.n_checkpoints):
            length = np.linalg.norm(vectors[:, j], axis=1, keepdims=True)
            z = vectors[:, j] @ self.basis[j, columns].T
            z = np.divide(z, length, out=np.zeros_like(z), where=(length > 0) & ~known)
            self._coords[j][at] += self._settle(j, rows, z, float(wrong[j]))
        self._knows[rows] = self.lessons

    def _place(self, columns: Ints, directions: Floats, lesson: int) -> Floats:
        """Make directions (P, d, m) Q's columns; what rows knew along the columns that were there is given back.

        Returns:
            (P,): bounds the error of a coordinate and the skew of Q, before and after.
        """
        before, replaced = self._wrong(), columns[columns < self.size]
        if replaced.size:
            give = lambda low: self._give_back(low, replaced, before)  # noqa: E731
            self._each(give, range(0, self._knows.size, _BOUND_ROWS))
        self.basis[:, columns] = directions.transpose(0, 2, 1)
        self._lesson[columns] = lesson
        self.size = max(self.size, int(columns.max()) + 1)
        gram = directions.transpose(0, 2, 1) @ self.basis[:, : self.size].transpose(0, 2, 1)
        gram[:, np.arange(columns.size), columns] -= 1
        self._wrong2 += 2 * (gram**2).sum(axis=(1, 2))
        self.skew = np.sqrt(self._wrong2) + self.margin * self.size
        return np.maximum(before, self._wrong())

    def _wrong(self) -> Floats:
        return np.asarray(self.skew + self.margin * math.sqrt(self.size))

    def _give_back(self, low: int, columns: Ints, wrong: Floats) -> None:
        """The parts of some rows along columns that are to be replaced belong to e again.

        With e' = e + c zq_c: ||e'||^2 <= rho^2 + 2 q |zq_c| + |zq_c|^2 ||c||^2, and the other columns see zq_c
        as far as c is not orthogonal to them, by no more than `wrong` (P,). Rows that know none of the columns
        have nothing along them.
        """
        part = np.flatnonzero(self._knows[low : low + _BOUND_ROWS] >= self._lesson[columns].min()) + low
        at = np.ix_(part, columns)
        for j in range(self._nu.shape[0]):
            q, rho = self._q[j, part].astype(np.float64), self._rho[j, part].astype(np.float64)
            old = self._coords[j][at] * _UNIT
            back = np.sqrt(np.einsum("nr,nr->n", old, old))
            self._rho[j, part] = _up(np.sqrt(rho * rho + back * (2 * q + (1 + wrong[j]) * back)))
            self._q[j, part] = _up(q + wrong[j] * back)
            self._coords[j][at] = 0

    def _each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """work(item) for every item, by all threads."""
        for _ in map(work, items) if self._threads is None else self._threads.map(work, items):
            pass

    def _project(self, block: RowBlock, j: int, part: slice, directions: Floats, first: bool) -> Floats:
        """z = directions^T h of a block (b, m), in float64; the first pass also fills in nu and alpha."""
        features = block.features[j].astype(np.float64)
        features[~block.valid] = 0
        length = np.sqrt(np.einsum("nd,nd->n", features, features))
        scale = block.scale[j].astype(np.float64) if self.kind == "raw" else (block.scale[j] != 0) * 1.0
        live = (length > 0) & (scale != 0)
        if first:
            directions = np.concatenate([directions, self.u[:, None]], axis=1)
        z = features @ directions
        z *= np.divide(np.sign(scale), length, out=np.zeros_like(length), where=live)[:, None]
        if first:
            nu = length * np.abs(scale) if self.kind == "raw" else live * 1.0
            self._nu[j, part], self._alpha[j, part], self._rho[j, part] = nu, z[:, -1], live
            z = z[:, :-1]
        return z

    def _settle(self, j: int, part: slice | Ints, z: Floats, wrong: float) -> npt.NDArray[np.int16]:
        """Update q and rho for coordinates z (b, m) along new columns; returns them as they are kept.

        Exactly, e loses Q z and keeps what rounding z to int16 lost. `wrong` bounds the error of z and the skew
        of Q, each of which enters a square a few times at most.
        """
        q, rho = self._q[j, part].astype(np.float64), self._rho[j, part].astype(np.float64)
        live = self._nu[j, part] > 0
        coords = np.clip(np.rint(z / _UNIT), -32767, 32767).astype(np.int16)
        lost = z - coords * _UNIT
        lost2 = np.einsum("nr,nr->n", lost, lost)
        rho2 = np.maximum(rho * rho - np.einsum("nr,nr->n", z, z) + lost2, 0)
        self._q[j, part] = _up((np.sqrt(q * q + lost2) + 2 * wrong) * live)
        self._rho[j, part] = _up(np.sqrt(rho2 + 16 * wrong) * live)
        return coords

    def query(self, sums: Floats) -> Query:
        """Prepare bounds for candidates added to sums (P, d)."""
        norm = norms(sums)
        unit = np.divide(sums, norm[:, None], out=np.zeros_like(sums), where=norm[:, None] > 0)
        w = np.stack([np.einsum("rd,d->r", q, s) for q, s in zip(self.basis, unit, strict=True)])
        self._weights, inside = w, _length(w)
        # float32: w rounded, r products summed in any order; float64: w itself. ||zq|| <= 1.001.
        wrong = self.margin * math.sqrt(self.size)
        slack = 1.05 * ((self.size + 8) * _SINGLE * inside + wrong) + 2 * self.margin
        # ||s'||^2 = ||s||^2 - 2 w.(Q^T s) + ||Q w||^2 over the columns that are known, and ||s|| is 1 or 0.
        known = np.stack([np.bincount(self._lesson, row * row, self.lessons + 1).cumsum() for row in w])
        loose = 4 * wrong + 2 * self.skew
        outside = np.sqrt(np.maximum((norm > 0)[:, None] - known, 0) + loose[:, None])
        # ||b||^2 = 1 - a^2 for s and s0 of norm 1; no more than that where one is zero.
        turn = np.einsum("prd,pd->pr", self._sums, unit)
        drift = np.sqrt(np.maximum(1 - turn * turn, 0) + 8 * self.margin) + 4 * _SINGLE
        weights = w.astype(np.float32) * np.float32(_UNIT)
        return Query(unit, norm, unit @ self.u, weights, inside + wrong, outside, slack, turn, drift)

    def stale(self, query: Query) -> Floats | None:
        """Upper bounds of all rows (n,) from the last `fresh` of all; None when a fresh one is due."""
        if not 0 < self._sums.shape[1] < _SUMS or self._gathered * _STALE_SHARE > self.stop - self.start:
            return None
        return self._bounds(query, None, fresh=False)

    def fresh(self, query: Query, rows: Ints | None = None) -> Floats:
        """Upper bounds on the canonical score, of the given rows (m,) or of all (n,), at the present sum."""
        if rows is None:
            self._sums, self._gathered = self._sums[:, :0], 0
        else:
            self._gathered += rows.size
        self._sums = np.concatenate([self._sums, query.unit[:, None]], axis=1)
        return self._bounds(query, rows, fresh=True)

    def _bounds(self, query: Query, rows: Ints | None, fresh: bool) -> Floats:
        out = np.empty(self._nu.shape[1] if rows is None else rows.size)
        step = _FRESH_ROWS if fresh else _BOUND_ROWS

        def bound(low: int) -> None:
            at = slice(low, min(low + step, out.size))
            part = at if rows is None else rows[at]
            total = np.zeros(at.stop - low)
            for j in range(self._nu.shape[0]):
                if fresh:
                    along, radius = self._fresh_cosine(query, j, part)
                    self._stale[j, part], self._radius[j, part] = along, _up(radius)
                else:
                    turn, drift = query.turn[j][self._sum_of[part]], query.drift[j][self._sum_of[part]]
                    along = self._stale[j, part] * turn
                    radius = self._radius[j, part] * np.abs(turn) + drift
                total += self._score_bound(query, j, part, along, radius)
            out[at] = total / self._nu.shape[0] + self.margin
            if fresh:
                self._sum_of[part] = self._sums.shape[1] - 1

        self._each(bound, range(0, out.size, step))
        return out

    def _fresh_cosine(self, query: Query, j: int, part: slice | Ints) -> tuple[Floats, Floats]:
        """h.s_j of some rows and the radius within which it is certain."""
        coords = self._coords[j][part]  # a view of a slice, a copy of chosen rows
        coords, weights = coords[:, : self.size], query.weights[j, : self.size]
        along, step = np.empty(coords.shape[0]), max(1, _COORDS // self.size)
        # einsum and not BLAS, whose threads, woken for every small product, wait on one another.
        single = np.empty((min(step, along.size), self.size), np.float32)
        for low in range(0, along.size, step):
            piece = single[: min(step, along.size - low)]
            piece[...] = coords[low : low + step]
            along[low : low + step] = np.einsum("nr,r->n", piece, weights)
        q, rho = self._q[j, part].astype(np.float64), self._rho[j, part].astype(np.float64)
        outside = query.outside[j][self._knows[part]]
        return along, q * query.inside[j] + rho * outside + query.slack[j]

    def _score_bound(self, query: Query, j: int, part: slice | Ints, along: Floats, radius: Floats) -> Floats:
        """Upper bounds on cos(s_j + g_ij, u) when h.s is along +- radius.

        With q = ||g|| / (||s|| + ||g||) and p = 1 - q the score is
        ``(p cos(s, u) + q alpha) / sqrt(1 - 2 p q (1 - h.s))``, which no norm over- or underflows.
        """
        cosine, norm, nu = query.cosine[j], query.norm[j], self._nu[j, part]
        q = nu / (nu + norm) if norm > 0 else (nu > 0).astype(np.float64)
        numerator = (self._alpha[j, part].astype(np.float64) + (_SINGLE - cosine)) * q + (
            cosine + self.margin
        )
        # The smallest denominator bounds a score that is positive, the largest one that is negative.
        worst = np.clip(along - np.copysign(radius, numerator), -1, 1)
        square = 1 + (worst - 1) * (2 * q * (1 - q)) - np.copysign(self.margin, numerator)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = numerator / np.sqrt(square)
        return np.where(square > 0, np.minimum(score, 1.0), 1.0)

    def complement(self, directions: Floats) -> Floats:
        """Orthonormal directions (P, d, m) outside Q's span, of what Q leaves of the given ones; m <= d - r.

        A direction that Q spans already is replaced by a random one.
        """
        noise = np.random.default_rng(0).normal(size=directions.shape)
        x = np.concatenate([_unit_columns(directions), noise], axis=2)
        x = self._outside(self._outside(x))
        lost = np.linalg.norm(x[:, :, : noise.shape[2]], axis=1, keepdims=True) < 1e-6
        x = np.where(lost, x[:, :, noise.shape[2] :], x[:, :, : noise.shape[2]])
        return _unit_columns(self._outside(np.linalg.qr(_unit_columns(x))[0]))

    def drift(self, sums: Floats, sample: Floats, size: int) -> Floats:
        """`size` directions (P, d, size) worth adding to Q: what it leaves of the running sum (P, d), and the
        leading directions of what it leaves of a sample (m, P, d), by two steps of a block power iteration."""
        rest = self._outside(sample.transpose(1, 2, 0))
        guess = np.random.default_rng(1).normal(size=(rest.shape[0], rest.shape[1], size - 1))
        for _ in range(2):
            guess = _unit_columns(rest @ (rest.transpose(0, 2, 1) @ guess))
        return self.complement(np.concatenate([sums[:, :, None], guess], axis=2))

    def _outside(self, columns: Floats) -> Floats:
        """columns (P, d, m) less their projections on Q."""
        q = self.basis[:, : self.size]
        return np.asarray(columns - q.transpose(0, 2, 1) @ (q @ columns))


def _unit_columns(x: Floats) -> Floats:
    """Columns (P, d, m) scaled to norm 1; zero ones stay."""
    x = x / np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-300)  # their squares could underflow
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300))


def _length(x: Floats) -> Floats:
    """Norms over the last axis, no smaller than the true ones."""
    return np.asarray(np.sqrt(np.einsum("pd,pd->p", x, x)) * (1 + 1e-9))


def _up(x: Floats) -> npt.NDArray[np.float32]:
    """float32 numbers no smaller than x."""
    return np.asarray((x * (1 + 4 * _SINGLE) + 1e-30 * (x > 0)).astype(np.float32))


def leading_directions(sample: Floats, keep: Floats, size: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Leading principal directions of what `keep` leaves of a sample, orthonormal to it and one another.

    One step of randomised subspace iteration (Halko, Martinsson & Tropp 2011); the directions only have to be
    good, never exact: bounds hold for any basis.

    Args:
        sample: (m, d). keep: (d, r0), orthonormal columns.

    Returns:
        (d, size) directions, random ones where the sample does not determine them; and (size,) the share of
        the sample's squares that is left after each.
    """
    x = (sample - (sample @ keep) @ keep.T).astype(np.float32)
    dim = sample.shape[1]
    guess = np.random.default_rng(seed).normal(size=(dim, min(size + 8, dim))).astype(np.float32)
    for _ in range(2):
        guess = np.linalg.qr(x.T @ (x @ guess) + np.float32(1e-12) * guess)[0]
    values, vectors = np.linalg.eigh((x @ guess).T @ (x @ guess))
    leading = guess @ vectors[:, ::-1][:, :size]
    full = np.linalg.qr(np.concatenate([keep, leading.astype(np.float64)], axis=1))[0]
    squares = float(np.einsum("nd,nd->", sample, sample)) or 1.0
    left = (float(np.einsum("nd,nd->", x, x)) - np.cumsum(values[::-1][:size])) / squares
    return np.asarray(full[:, keep.shape[1] :]), left


def orthonormal(columns: Floats) -> Floats:
    """Orthonormal columns that span the given ones (d, m), m' <= min(d, m) of them."""
    return np.asarray(np.linalg.qr(columns / np.maximum(norms(columns.T), 1e-300))[0])
