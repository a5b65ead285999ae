"""Encoded documents one after the other: their tokens, and at each position the target that carries loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE = -100
"""Target of a position that carries no loss (the convention of torch's cross_entropy)."""

PENDING = -1
"""Target of the last prompt token in classification: the label, filled in once it is known."""


@dataclass(frozen=True)
class Soft:
    """Target distributions of n loss tokens, truncated to K tokens each; what lacks to 1 lies on all others.

    tokens: (n, K) int32, distinct in a row. probs: (n, K) float32.
    """

    tokens: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ragged:
    """n documents one after the other: tokens, targets (total,) int32; offsets (n + 1,) int64.

    weights: (n,) float32, what each document's loss counts in training, or None for 1. soft: the target
    distributions of the loss tokens in order, or None where the targets alone are. problems: position -> why
    a document could not be encoded; it then has no tokens.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None = None
    soft: Soft | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, (n,)."""
        return np.diff(self.offsets)

    @cached_property
    def loss_offsets(self) -> npt.NDArray[np.int64]:
        """Loss tokens before each document, (n + 1,): where its rows of `soft` begin."""
        carries = np.zeros(len(self.targets) + 1, np.int64)
        np.cumsum(self.targets != IGNORE, out=carries[1:])
        return carries[self.offsets]

    def with_labels(self, label_tokens: npt.NDArray[np.int32]) -> Ragged:
        """The same documents with PENDING targets replaced by the given label token of each, (n,) int32."""
        targets = self.targets.copy()
        last = self.offsets[1:] - 1
        targets[last] = np.where(targets[last] == PENDING, label_tokens, targets[last])
        return replace(self, targets=targets)

    def silenced(self, positions: Sequence[int]) -> Ragged:
        """The same documents with no loss on those at the given positions, so that no batch holds them."""
        assert self.soft is None, "soft targets are made for documents that carry loss"
        targets = self.targets.copy()
        for i in positions:
            targets[self.offsets[i] : self.offsets[i + 1]] = IGNORE
        return replace(self, targets=targets)

    def take(self, members: npt.NDArray[np.int64]) -> Ragged:
        """The documents at the given positions alone, in that order."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in members]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[members])]).astype(np.int64)
        soft = None
        if self.soft is not None:
            losses = [slice(self.loss_offsets[i], self.loss_offsets[i + 1]) for i in members]
            width = self.soft.tokens.shape[1]
            soft = Soft(
                _joined([self.soft.tokens[span] for span in losses], np.zeros((0, width), np.int32)),
                _joined([self.soft.probs[span] for span in losses], np.zeros((0, width), np.float32)),
            )
        return Ragged(
            _joined([self.tokens[span] for span in spans], np.zeros(0, np.int32)),
            _joined([self.targets[span] for span in spans], np.zeros(0, np.int32)),
            offsets,
            None if self.weights is None else self.weights[members],
            soft,
        )


def joined(parts: Sequence[Ragged]) -> Ragged:
    """The documents of several, one after the other; all have weights and soft targets, or none has."""
    lengths: npt.NDArray[np.int64] = np.concatenate([part.lengths for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    softs = [part.soft for part in parts if part.soft is not None]
    assert len(weights) in (0, len(parts)), "weights for some"
    assert len(softs) in (0, len(parts)), "soft targets for some"
    return Ragged(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(weights) if weights else None,
        Soft(np.concatenate([s.tokens for s in softs]), np.concatenate([s.probs for s in softs]))
        if softs
        else None,
    )


def ragged(documents: list[npt.NDArray[np.int32]], targets: list[npt.NDArray[np.int32]]) -> Ragged:
    """Documents and their targets, each (tokens,), one after the other."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids in documents], out=offsets[1:])
    nothing = np.zeros(0, np.int32)
    return Ragged(_joined(documents, nothing), _joined(targets, nothing), offsets)


def _joined(pieces: list[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(pieces) if pieces else nothing
