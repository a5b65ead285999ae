"""A strategy of one's own, in one file: documents whose gradients agree with Delta in most signs.

PYTHONPATH=examples unbake select run.yaml --strategy sign_agreement:select
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select import Columns
from engine.select.baselines import by_score
from engine.spec import Select


def select(
    rows: Rows, columns: Columns, spec: Select, eligible: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """`spec.size` rows among `eligible`, the best first.

    Args:
        rows: the store; `read` streams it block by block, (P, n, dim) at a time.
        columns: labels and losses.
        eligible: (N,) rows that may be selected.
    """
    towards = np.sign(rows.target)
    score = np.zeros(rows.n_rows)
    for start in range(0, rows.n_rows, rows.block_rows):
        block = rows.read(start, start + rows.block_rows)
        score[start : start + rows.block_rows] = (np.sign(block.features) @ towards).mean(axis=0)
    return by_score(score, eligible, spec.size)
