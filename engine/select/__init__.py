"""Selection: which rows of a store, added up, point the way the fine-tuned model went (docs/method.md, step 5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.extend import load
from engine.rows import Rows
from engine.select.baselines import alignment, at_random, by_score, confident
from engine.select.external import open_features
from engine.select.greedy import Greedy, LocalShards, Pick, Shards, verify
from engine.select.journal import Journal, digest
from engine.select.objective import Bools, Floats, Ints, unit_target
from engine.select.selection import Certificate, Columns, RandomPath, Selection, random_path, walk
from engine.select.shard import Shard
from engine.select.view import View, view_of
from engine.select.weights import nnls_weights
from engine.spec import Select
from engine.storage import Folder

__all__ = [
    "Certificate",
    "Columns",
    "RandomPath",
    "Selection",
    "View",
    "described",
    "open_features",
    "recheck",
    "select",
    "view_of",
]

Progress = Callable[[int, int], None]
Labels = npt.NDArray[np.int32]
ShardFactory = Callable[[Rows, Select, Bools, Labels | None], Shards]


def select(
    rows: Rows,
    columns: Columns,
    spec: Select,
    progress: Progress | None = None,
    *,
    journal: Folder | None = None,
    shards: ShardFactory | None = None,
    on_pick: Callable[[Pick], None] | None = None,
) -> Selection:
    """Choose `spec.size` rows by `spec.strategy`.

    Args:
        rows: the store, or the `view_of` it that `spec` asks for (made here if it is not one yet).
        columns: labels, losses and the like, for the strategies and filters that need them.
        progress: called with (picks done, picks in all).
        journal: folder that keeps the picks of greedy strategies while they are made; a selection that was
            killed goes on from it, to the same bytes.
        shards: makes the index shards of greedy strategies; default: one in this process.
        on_pick: called with each pick of a greedy strategy, but not with those of the journal.

    Raises:
        UserError: fewer eligible rows than `spec.size`, a column that the strategy needs is absent, the
            target is zero, or the journal is another selection's.
    """
    rows = view_of(rows, spec)
    eligible, label, restart = _rules(rows, columns, spec)
    certificate, checked = None, list[int]()
    if spec.rule.startswith("greedy"):
        book = None if journal is None else Journal(journal, _inputs(rows, spec, eligible, label))
        greedy = Greedy(rows, eligible, spec.size, spec.rows, restart, label)
        order, certificate = greedy.run(
            lambda: (shards or local_shards)(rows, spec, eligible, label), book, progress, on_pick
        )
        checked = verify(rows, eligible, spec.rows, restart, label, order, spec.verify, spec.seed)
    else:
        order = _order(rows, columns, spec, eligible, label)
    return _described(rows, spec, eligible, order, certificate, checked)


def recheck(rows: Rows, columns: Columns, spec: Select, order: Ints) -> list[int]:
    """Check `spec.verify` random picks of an earlier greedy selection against a full scan; which were checked.

    Args:
        order: (k,) all of its picks, those past the peak included.

    Raises:
        UserError: one of them is not the best row.
    """
    rows = view_of(rows, spec)
    eligible, label, restart = _rules(rows, columns, spec)
    try:
        return verify(rows, eligible, spec.rows, restart, label, order, spec.verify, spec.seed)
    except RuntimeError as error:
        raise UserError(
            f"{error}: the store or the selection has changed; unbake verify says which."
        ) from None


def _rules(rows: Rows, columns: Columns, spec: Select) -> tuple[Bools, Labels | None, int]:
    """Which rows may be picked (N,), their labels where quotas count them, and picks between two restarts."""
    label = _labels(columns, spec) if spec.rule.endswith("_balanced") else None
    return _eligible(rows, columns, spec), label, spec.batch_size if spec.strategy == "greedy_batched" else 0


def described(rows: Rows, columns: Columns, spec: Select, order: Ints) -> Selection:
    """A selection of rows that were chosen elsewhere, (k,) in pick order, with its path of f and its weights."""
    rows = view_of(rows, spec)
    return _described(rows, spec, _eligible(rows, columns, spec), order, None, [])


def local_shards(rows: Rows, spec: Select, eligible: Bools, label: Labels | None) -> Shards:
    """All rows as one shard in this process."""
    u, budgets, threads = (
        unit_target(rows.target),
        (spec.index_memory_mb, spec.cache_memory_mb),
        os.cpu_count(),
    )
    return LocalShards([Shard(rows, 0, rows.n_rows, spec.rows, u, eligible, label, *budgets, threads or 1)])


def _described(
    rows: Rows,
    spec: Select,
    eligible: Bools,
    order: Ints,
    certificate: Certificate | None,
    checked: list[int],
) -> Selection:
    path = walk(rows, order, spec.rows)
    peak = int(np.argmax(path.objective)) + 1
    kept = peak if spec.stop == "at_peak" else order.size
    beside = random_path(rows, eligible, order.size, spec.rows, spec.seed)
    objective = path.objective[:kept]
    return Selection(
        strategy=spec.strategy,
        size=kept,
        rows=order[:kept],
        objective=objective,
        gain=np.diff(objective, prepend=0.0),
        norm=path.norm[:kept],
        weight=_weights(rows, spec, order[:kept]),
        path=path.objective,
        peak_size=peak,
        peak_value=float(path.objective[peak - 1]),
        random_path=beside,
        certificate=certificate,
        summary={
            "strategy": spec.strategy,
            "rows": spec.rows,
            "target": spec.target,
            "documents": rows.n_rows,
            "eligible": int(eligible.sum()),
            "selected": kept,
            "objective": float(objective[-1]),
            "peak_size": peak,
            "peak_objective": float(path.objective[peak - 1]),
            "random_objective_mean": float(beside.mean[-1]),
            "random_objective_std": float(beside.std[-1]),
            "certificate": None if certificate is None else _summary(certificate, checked),
        },
    )


def _summary(certificate: Certificate, checked: list[int]) -> dict[str, Any]:
    slack = certificate.score - certificate.bound
    return {
        "picks": int(certificate.score.size),
        "least_slack": float(slack.min()) if np.isfinite(slack.min()) else None,
        "rows_compared_mean": float(certificate.compared.mean()),
        "rows_compared_max": int(certificate.compared.max()),
        "rows_read": int(certificate.rows_read.sum()),
        "bytes_read": int(certificate.bytes_read.sum()),
        "picks_verified": checked,
    }


def _inputs(rows: Rows, spec: Select, eligible: Bools, label: Labels | None) -> dict[str, Any]:
    """All that greedy picks depend on, but for the rows themselves, which resuming compares."""
    fields = ["strategy", "size", "rows", "precondition", "checkpoints"]
    fields += ["batch_size"] if spec.strategy == "greedy_batched" else []
    return {
        **{name: getattr(spec, name) for name in fields},
        "shape": [rows.n_checkpoints, rows.n_rows, rows.dim],
        "target": digest(rows.target),
        "eligible": digest(eligible),
        "label": digest(label),
    }


def _eligible(rows: Rows, columns: Columns, spec: Select) -> Bools:
    eligible, what = rows.valid, "valid documents"
    if spec.rule.endswith("_balanced"):
        eligible, what = eligible & (_labels(columns, spec) >= 0), "valid documents with a label"
    if spec.rule.startswith("loss_"):
        eligible, what = eligible & np.isfinite(_losses(columns, spec)), "valid documents with a finite loss"
    if spec.min_confidence > 0:
        what += f" that the fine-tuned model is at least {spec.min_confidence:g} sure of"
        eligible = eligible & (_confidences(columns, spec) >= spec.min_confidence)
    if columns.repeats is not None:
        eligible, what = eligible & ~columns.repeats, f"{what} that repeat none"
    count = int(eligible.sum())
    if spec.size > count:
        raise UserError(
            f"select.size is {spec.size}, but the store has only {count} {what}: choose a smaller size."
        )
    return eligible


def _order(rows: Rows, columns: Columns, spec: Select, eligible: Bools, label: Labels | None) -> Ints:
    """Rows in pick order, of the strategies without a running sum."""
    match spec.rule:
        case "random" | "random_balanced":
            return at_random(eligible, spec.size, spec.seed, label)
        case "random_confident":
            return at_random(
                confident(_confidences(columns, spec), eligible, spec.size), spec.size, spec.seed
            )
        case "loss_min" | "loss_max":
            sign = -1.0 if spec.strategy == "loss_min" else 1.0
            return by_score(sign * _losses(columns, spec).astype(np.float64), eligible, spec.size)
        case "topk" | "topk_balanced":
            return by_score(alignment(rows, spec.rows, eligible), eligible, spec.size, label)
        case "bottomk":
            return by_score(-alignment(rows, spec.rows, eligible), eligible, spec.size)
        case _:
            return _own_order(rows, columns, spec, eligible)


def _own_order(rows: Rows, columns: Columns, spec: Select, eligible: Bools) -> Ints:
    """Rows in pick order by a strategy of somebody else's, `strategy(rows, columns, spec, eligible)`."""
    found = np.asarray(load(spec.strategy, "select.strategy")(rows, columns, spec, eligible))
    if (
        found.shape != (spec.size,)
        or found.dtype.kind not in "iu"
        or not (0 <= found.min() <= found.max() < rows.n_rows)
    ):
        raise UserError(f"{spec.strategy} must return {spec.size} row numbers, the best first.")
    if np.unique(found).size != found.size or not eligible[found].all():
        raise UserError(
            f"{spec.strategy} returned a row twice, or one that may not be selected (`eligible`)."
        )
    return found.astype(np.int64)


def _labels(columns: Columns, spec: Select) -> Labels:
    if columns.label is None:
        raise UserError(f"select.strategy={spec.strategy} balances labels, but the store has none.")
    return columns.label


def _confidences(columns: Columns, spec: Select) -> npt.NDArray[np.float32]:
    if columns.confidence is None:
        asks = "select.min_confidence" if spec.min_confidence else f"select.strategy={spec.strategy}"
        raise UserError(f"{asks} needs the confidence of each document, and the store has none.")
    return columns.confidence


def _weights(rows: Rows, spec: Select, order: Ints) -> Floats:
    return np.ones(order.size) if spec.weights == "equal" else nnls_weights(rows, order, spec.rows)


def _losses(columns: Columns, spec: Select) -> npt.NDArray[np.float32]:
    if columns.loss is None:
        raise UserError(f"select.strategy={spec.strategy} ranks by loss, but the store has no losses.")
    return columns.loss
