"""What a selection takes and gives: columns beside the rows, the result, and the path of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select.objective import Bools, Floats, Ints, RowKind, norms, scores, unit_target, vectors

_TAKEN_NUMBERS = 1 << 21  # numbers of picked rows held in float64 at once


@dataclass(frozen=True)
class Columns:
    """Per-row columns of the store. label: (N,) int32, -1 for none; loss: (N,) float32 at theta_f; confidence:
    (N,) float32; repeats: (N,) bool, rows that repeat an earlier one."""

    label: npt.NDArray[np.int32] | None = None
    loss: npt.NDArray[np.float32] | None = None
    confidence: npt.NDArray[np.float32] | None = None
    repeats: Bools | None = None


@dataclass(frozen=True)
class Certificate:
    """Why each pick is the argmax over all rows (certified strategies only); not part of the result's bytes.

    Arrays over picks, (k,), those past the peak included: row: the winner; score: its exact score, in the sum
    it was picked for (greedy_batched: of its batch); bound: the largest upper bound among candidates never
    compared exactly (-inf if none), always below score; compared: candidates whose exact row was compared;
    rows_read, bytes_read: what came from the store, cached rows excluded, whole chunks counted.
    """

    row: Ints
    score: Floats
    bound: Floats
    compared: Ints
    rows_read: Ints
    bytes_read: Ints


@dataclass(frozen=True)
class RandomPath:
    """f of random sets: sizes (m,) ascending up to k; mean and std (m,) over `sets` seeded nested sets."""

    sizes: Ints
    mean: Floats
    std: Floats
    sets: int


@dataclass(frozen=True)
class Selection:
    """The selected rows in pick order, and how good they are.

    rows: (k,) int64. objective: (k,) f of the set after each pick. gain: (k,) its increments, from
    f(empty) = 0. norm: (k,) norm of each raw gradient, mean over checkpoints. weight: (k,) of each document in
    the loss of a retraining, mean 1. path: objective of the whole
    path, longer than `objective` when the selection was cut at the peak. peak_size, peak_value: the shortest
    prefix with the largest f. summary: JSON-able numbers for the report.
    """

    strategy: str
    size: int
    rows: Ints
    objective: Floats
    gain: Floats
    norm: Floats
    weight: Floats
    path: Floats
    peak_size: int
    peak_value: float
    random_path: RandomPath
    certificate: Certificate | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """Rows added one by one. objective, score, norm: (k,), f of all rows so far, f in the sum that each was
    picked for (they differ where that sum restarts), norm of each raw row (mean over checkpoints); sums:
    (P, d), the running sum at the end."""

    objective: Floats
    score: Floats
    norm: Floats
    sums: Floats


def walk(rows: Rows, order: Ints, kind: RowKind, restart: int = 0) -> Walk:
    """Add rows in the given order.

    Args:
        order: (k,) distinct rows.
        restart: the running sum starts anew every so many rows (greedy_batched); 0: never.
    """
    u = unit_target(rows.target)
    total, running = np.zeros((2, rows.n_checkpoints, rows.dim))
    objective, score, norm = np.empty((3, order.size))
    step = max(1, _TAKEN_NUMBERS // (rows.n_checkpoints * rows.dim))
    for start in range(0, order.size, step):
        part = order[start : start + step]
        ascending = np.argsort(part)
        place = np.empty_like(ascending)
        place[ascending] = np.arange(part.size)
        block = rows.take(part[ascending])
        g = vectors(block, kind)[place]
        raw = g if kind == "raw" else vectors(block, "raw")[place]
        norm[start : start + step] = norms(raw).mean(axis=1)
        for i in range(part.size):
            if restart and (start + i) % restart == 0:
                running = np.zeros_like(running)
            objective[start + i] = scores(total, g[i : i + 1], u)[0]
            score[start + i] = scores(running, g[i : i + 1], u)[0] if restart else objective[start + i]
            total, running = total + g[i], running + g[i]
    return Walk(objective, score, norm, running)


def random_path(
    rows: Rows, eligible: Bools, size: int, kind: RowKind, seed: int, sets: int = 5, sizes: int = 32
) -> RandomPath:
    """f of nested random sets of up to `sizes` sizes from 1 to `size`: mean and spread over `sets` of them.

    The rows of all sets are read in one ascending pass that touches each chunk at most once; the sums are
    kept per set and step of size, so memory does not grow with `size`.
    """
    u = unit_target(rows.target)
    grid = np.unique(np.geomspace(1, size, sizes).round().astype(np.int64))
    pool = np.flatnonzero(eligible)
    # copied, so that no permutation of the whole corpus is kept for the few rows of it
    chosen = [np.random.default_rng([seed, s]).permutation(pool)[:size].copy() for s in range(sets)]
    steps = np.searchsorted(grid, np.arange(size), side="right")  # the step of size that each position enters
    row = np.concatenate(chosen)
    bucket = np.concatenate([s * grid.size + steps for s in range(sets)])
    by_row = np.argsort(row, kind="stable")
    row, bucket = row[by_row], bucket[by_row]
    sums = np.zeros((sets * grid.size, rows.n_checkpoints, rows.dim))
    limit = max(1, _TAKEN_NUMBERS // (rows.n_checkpoints * rows.dim))
    start = 0
    while start < row.size:
        end_of_block = (row[start] // rows.block_rows + 1) * rows.block_rows
        stop = min(start + limit, int(np.searchsorted(row, end_of_block)))
        distinct, inverse = np.unique(row[start:stop], return_inverse=True)
        g = vectors(rows.take(distinct), kind)
        for i, b in zip(inverse, bucket[start:stop], strict=True):
            sums[b] += g[i]
        start = stop
    nested = np.cumsum(sums.reshape(sets, grid.size, rows.n_checkpoints, rows.dim), axis=1)
    zero = np.zeros((rows.n_checkpoints, rows.dim))
    f = np.stack([scores(zero, nested[s], u) for s in range(sets)])
    return RandomPath(grid, f.mean(axis=0), f.std(axis=0), sets)
