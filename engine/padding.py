"""Documents as the rows of a forward pass: right-padded, or packed several to a row, in groups of like length.

Causal models read right-padded batches without an attention mask: padding comes after every real token, so no
real state can see it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from engine.ragged import IGNORE, Ragged

if TYPE_CHECKING:
    from engine.frozen import Entering


@dataclass(frozen=True)
class Batch:
    """Right-padded documents: input_ids, targets (rows, length) int64; lengths, counts (docs,) int64.

    A row is a document, or with position_ids (rows, length) several that follow each other without seeing
    each other. Documents are counted along the rows. counts: loss tokens of each; weights: (docs,) float32;
    soft_tokens, soft_probs: (loss tokens, K) in the order of `targets`, or None. entering: what the model's
    frozen lower blocks give for these documents, where that is kept (`engine.frozen`).
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    weights: torch.Tensor
    position_ids: torch.Tensor | None = None
    soft_tokens: torch.Tensor | None = None
    soft_probs: torch.Tensor | None = None
    entering: Entering | None = None

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})


def length_batches(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Group documents of like length: each group's padded size stays within `tokens_per_batch`.

    Deterministic: sorted by length, ties by position. A document longer than the budget is alone.

    Returns:
        index arrays into `lengths`, longest documents first, so that memory peaks in the first batch.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    groups: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, tokens_per_batch // longest)
        groups.append(order[start:stop])
        start = stop
    return groups


def pad(ragged: Ragged, members: npt.NDArray[np.int64], pad_id: int = 0) -> Batch:
    """The given documents as one right-padded batch, a row each."""
    part = ragged.take(members)
    return _batch(part, [[i] for i in range(len(part))], pad_id)


def pack(ragged: Ragged, members: npt.NDArray[np.int64], length: int, pad_id: int = 0) -> Batch:
    """The given documents in rows of up to `length` tokens, several to a row, first fit by falling length.

    Position ids begin anew at each document; transformers takes that as the sign not to let attention cross.
    The documents of the batch are those of `members` in another order.
    """
    part = ragged.take(members[np.argsort(-ragged.lengths[members], kind="stable")])
    rows: list[list[int]] = []
    room: list[int] = []
    for i, needed in enumerate(part.lengths.tolist()):
        row = next((r for r, left in enumerate(room) if left >= needed), None)
        if row is None:
            rows.append([])
            room.append(max(length, needed))
            row = -1
        rows[row].append(i)
        room[row] -= needed
    part = part.take(np.array([i for row in rows for i in row], np.int64))
    first = np.cumsum([0, *map(len, rows)])
    rows = [list(range(start, stop)) for start, stop in itertools.pairwise(first)]
    return _batch(part, rows, pad_id, positions=True)


def _batch(part: Ragged, rows: list[list[int]], pad_id: int, positions: bool = False) -> Batch:
    """Documents 0.. in rows that hold consecutive ones."""
    edges = [(part.offsets[row[0]], part.offsets[row[-1] + 1]) for row in rows]
    start = np.array([a for a, _ in edges], np.int64)
    size = np.array([b - a for a, b in edges], np.int64)
    columns = np.arange(size.max(initial=0))
    real = columns[None, :] < size[:, None]
    source = np.where(real, start[:, None] + columns[None, :], 0)
    empty = not part.tokens.size
    input_ids = np.full(real.shape, pad_id) if empty else np.where(real, part.tokens[source], pad_id)
    targets = np.full(real.shape, IGNORE) if empty else np.where(real, part.targets[source], IGNORE)
    position_ids = None
    if positions:
        begins = np.repeat(part.offsets[:-1], part.lengths)  # of the document that each token is in
        # padding goes on counting: it belongs to the last document, which does not look ahead
        last = np.array([part.offsets[row[-1]] for row in rows], np.int64)
        at = np.where(real, source - begins[source], start[:, None] + columns[None, :] - last[:, None])
        position_ids = torch.from_numpy(at)
    soft = part.soft
    return Batch(
        torch.from_numpy(input_ids.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(part.lengths),
        torch.from_numpy(np.diff(part.loss_offsets)),
        torch.ones(len(part)) if part.weights is None else torch.from_numpy(part.weights),
        position_ids,
        None if soft is None else torch.from_numpy(soft.tokens.astype(np.int64)),
        None if soft is None else torch.from_numpy(soft.probs),
    )
