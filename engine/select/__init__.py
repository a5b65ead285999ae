"""Selection: which rows of a store, added up, point the way the fine-tuned model went (METHOD section 5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.rows import Rows
from engine.select.baselines import alignment, at_random, by_score
from engine.select.exact import exact_greedy
from engine.select.external import open_features
from engine.select.objective import Bools, Ints, valid_rows
from engine.select.selection import Certificate, Columns, RandomPath, Selection, random_path, walk
from engine.spec import Select

__all__ = ["Certificate", "Columns", "RandomPath", "Selection", "open_features", "select"]

Progress = Callable[[int, int], None]


def select(rows: Rows, columns: Columns, spec: Select, progress: Progress | None = None) -> Selection:
    """Choose `spec.size` rows by `spec.strategy`.

    Args:
        rows: the store.
        columns: labels and losses, for the strategies that need them.
        progress: called with (picks done, picks in all).

    Raises:
        UserError: fewer eligible rows than `spec.size`, a column that the strategy needs is absent, or the
            target is zero.
    """
    eligible = _eligible(rows, columns, spec)
    order = _order(rows, columns, spec, eligible, progress)
    objective, norm, _ = walk(rows, order, spec.rows)
    peak = int(np.argmax(objective)) + 1
    kept = peak if spec.stop == "at_peak" else order.size
    beside = random_path(rows, eligible, order.size, spec.rows, spec.seed)
    return Selection(
        strategy=spec.strategy,
        size=kept,
        rows=order[:kept],
        objective=objective[:kept],
        gain=np.diff(objective[:kept], prepend=0.0),
        norm=norm[:kept],
        path=objective,
        peak_size=peak,
        peak_value=float(objective[peak - 1]),
        random_path=beside,
        summary={
            "strategy": spec.strategy,
            "rows": spec.rows,
            "documents": rows.n_rows,
            "eligible": int(eligible.sum()),
            "selected": kept,
            "objective": float(objective[kept - 1]),
            "peak_size": peak,
            "peak_objective": float(objective[peak - 1]),
            "random_objective_mean": float(beside.mean[-1]),
            "random_objective_std": float(beside.std[-1]),
        },
    )


def _eligible(rows: Rows, columns: Columns, spec: Select) -> Bools:
    eligible, what = valid_rows(rows), "valid documents"
    if spec.strategy.endswith("_balanced"):
        eligible, what = eligible & (_labels(columns, spec) >= 0), "valid documents with a label"
    if spec.strategy.startswith("loss_"):
        eligible, what = eligible & np.isfinite(_losses(columns, spec)), "valid documents with a finite loss"
    count = int(eligible.sum())
    if spec.size > count:
        raise UserError(
            f"select.size is {spec.size}, but the store has only {count} {what}: choose a smaller size."
        )
    return eligible


def _order(rows: Rows, columns: Columns, spec: Select, eligible: Bools, progress: Progress | None) -> Ints:
    balanced = spec.strategy.endswith("_balanced")
    label = _labels(columns, spec) if balanced else None
    match spec.strategy:
        case "random" | "random_balanced":
            return at_random(eligible, spec.size, spec.seed, label)
        case "loss_min" | "loss_max":
            sign = -1.0 if spec.strategy == "loss_min" else 1.0
            return by_score(sign * _losses(columns, spec).astype(np.float64), eligible, spec.size)
        case "topk" | "topk_balanced":
            return by_score(alignment(rows, spec.rows, eligible), eligible, spec.size, label)
        case "bottomk":
            return by_score(-alignment(rows, spec.rows, eligible), eligible, spec.size)
        case "greedy" | "greedy_batched" | "greedy_balanced":
            restart = spec.batch_size if spec.strategy == "greedy_batched" else 0
            return exact_greedy(rows, eligible, spec.size, spec.rows, restart, label, progress)[0]


def _labels(columns: Columns, spec: Select) -> npt.NDArray[np.int32]:
    if columns.label is None:
        raise UserError(f"select.strategy={spec.strategy} balances labels, but the store has none.")
    return columns.label


def _losses(columns: Columns, spec: Select) -> npt.NDArray[np.float32]:
    if columns.loss is None:
        raise UserError(f"select.strategy={spec.strategy} ranks by loss, but the store has no losses.")
    return columns.loss
