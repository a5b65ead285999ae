"""The strategies that need no running sum: by alignment alone, by loss, or at random."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select.objective import Bools, Floats, Ints, RowKind, rank, stream_scores, unit_target


def quotas(label: npt.NDArray[np.int32], size: int) -> dict[int, int]:
    """Equal shares of `size` per label; what a short label cannot use goes to the others.

    Args:
        label: labels of the eligible rows, all >= 0, at least `size` of them.

    Returns:
        label -> rows of it to select, `size` in sum; a remainder goes to the lowest labels with rows left.
    """
    values, counts = np.unique(label, return_counts=True)
    quota = np.zeros_like(counts)
    while (left := size - int(quota.sum())) > 0:
        open_labels = np.flatnonzero(quota < counts)
        share = max(1, left // open_labels.size)
        for index in open_labels[:left]:
            quota[index] += min(share, counts[index] - quota[index])
    return dict(zip(values.tolist(), quota.tolist(), strict=True))


def alignment(rows: Rows, kind: RowKind, eligible: Bools) -> Floats:
    """mean_j cos(g_ij, Delta) of every row, (N,): f of one-row sets; -inf where not eligible."""
    nothing = np.zeros((rows.n_checkpoints, rows.dim))
    return stream_scores(rows, kind, nothing, unit_target(rows.target), eligible)


def by_score(score: Floats, eligible: Bools, size: int, label: npt.NDArray[np.int32] | None = None) -> Ints:
    """The `size` eligible rows of largest score, with `label` under equal quotas; best first, then lowest."""
    candidates = np.flatnonzero(eligible)
    if label is None:
        return rank(score[candidates], candidates, size)
    parts = []
    for value, quota in quotas(label[candidates], size).items():
        of_label = candidates[label[candidates] == value]
        parts.append(rank(score[of_label], of_label, quota))
    union = np.concatenate(parts)
    return rank(score[union], union, size)


CONFIDENT = 0.99
"""Probability of a label from which on the fine-tuned model counts as sure of it (docs/results.md says why so high)."""


def confident(confidence: npt.NDArray[np.float32], eligible: Bools, size: int) -> Bools:
    """The eligible rows of `CONFIDENT` or more, (N,); of fewer than `size`, the `size` rows of largest confidence."""
    largest = np.sort(confidence[eligible])[-size]
    return eligible & (confidence >= min(np.float32(CONFIDENT), largest))


def at_random(eligible: Bools, size: int, seed: int, label: npt.NDArray[np.int32] | None = None) -> Ints:
    """`size` eligible rows in a seeded random order, with `label` under equal quotas.

    Without quotas the first rows of a larger selection are the smaller one.
    """
    order = np.random.default_rng(seed).permutation(eligible.size)
    return by_score(-order.astype(np.float64), eligible, size, label)
