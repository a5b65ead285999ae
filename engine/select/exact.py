"""Plain exact greedy: every candidate scored anew for every pick, one full scan of the store a pick.

Slow and obviously right: the oracle that certified greedy (engine.select.greedy) is tested against.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select.baselines import quotas
from engine.select.objective import Bools, Floats, Ints, RowKind, stream_scores, unit_target, vectors


def exact_greedy(
    rows: Rows,
    eligible: Bools,
    size: int,
    kind: RowKind = "raw",
    restart: int = 0,
    label: npt.NDArray[np.int32] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Ints, Floats]:
    """argmax_i f(S + i), `size` times; ties break to the lowest row.

    Args:
        eligible: (N,) bool, at least `size` of them.
        restart: the sum that candidates are added to starts anew every so many picks; 0: never.
        label: (N,) labels for equal quotas (greedy_balanced).

    Returns:
        rows (size,) in pick order and the score (size,) each had when picked.
    """
    u = unit_target(rows.target)
    sums = np.zeros((rows.n_checkpoints, rows.dim))
    left = eligible.copy()
    quota = {} if label is None else quotas(label[eligible], size)
    if label is not None:
        left &= np.isin(label, [of for of, most in quota.items() if most])
    picked, score = np.empty(size, np.int64), np.empty(size)
    for t in range(size):
        if restart and t % restart == 0:
            sums = np.zeros_like(sums)
        every = stream_scores(rows, kind, sums, u, left)
        best = int(np.argmax(every))
        picked[t], score[t] = best, every[best]
        left[best] = False
        sums = sums + vectors(rows.take(picked[t : t + 1]), kind)[0]
        if label is not None:
            quota[int(label[best])] -= 1
            if quota[int(label[best])] == 0:
                left &= label != label[best]
        if progress is not None:
            progress(t + 1, size)
    return picked, score
