"""Text to tokens: one encoder for extraction, retraining and evaluation, with targets that say where loss lies.

A document becomes `tokens` and, at the same positions, `targets`: the token that the state at that position
has to predict, or IGNORE. Causal models read right-padded batches without an attention mask: padding comes
after every real token, so no real state can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import UserError
from engine.spec import LossScope, Task

IGNORE = -100
"""Target of a position that carries no loss (the convention of torch's cross_entropy)."""

PENDING = -1
"""Target of the last prompt token in classification: the label, filled in once it is known."""


@dataclass(frozen=True)
class Ragged:
    """n documents one after the other: tokens, targets (total,) int32; offsets (n + 1,) int64."""

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, (n,)."""
        return np.diff(self.offsets)

    def with_labels(self, label_tokens: npt.NDArray[np.int32]) -> Ragged:
        """The same documents with PENDING targets replaced by the given label token of each, (n,) int32."""
        targets = self.targets.copy()
        last = self.offsets[1:] - 1
        targets[last] = np.where(targets[last] == PENDING, label_tokens, targets[last])
        return Ragged(self.tokens, targets, self.offsets)

    def silenced(self, positions: Sequence[int]) -> Ragged:
        """The same documents with no loss on those at the given positions, so that no batch holds them."""
        targets = self.targets.copy()
        for i in positions:
            targets[self.offsets[i] : self.offsets[i + 1]] = IGNORE
        return Ragged(self.tokens, targets, self.offsets)


@dataclass(frozen=True)
class Batch:
    """Right-padded documents: input_ids, targets (docs, length) int64; lengths (docs,) int64."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.input_ids.to(device), self.targets.to(device), self.lengths.to(device))


class Encoder:
    """Turns documents into `Ragged` token sequences for one tokenizer and one task.

    Classification: the text is cut to `task.max_tokens` tokens, put into the template, and the prompt encoded
    without a trailing space or an end mark; the last prompt token's state predicts the label, which is never
    fed in. Language modelling: the text is its own label under the loss scope.

    Args:
        tokenizer: a Hugging Face tokenizer of the model family.
        task: the task section of the spec.
        scope: the resolved loss scope (`RunSpec.loss_scope`).

    Raises:
        UserError: label words that are not distinct single tokens; the message names them.
    """

    def __init__(self, tokenizer: Any, task: Task, scope: LossScope) -> None:
        self.tokenizer, self.task, self.scope = tokenizer, task, scope
        tokenizer.truncation_side = "right"  # some tokenizers come with "left"
        self.label_ids: list[int] = label_token_ids(tokenizer, task.labels) if task.labels else []

    def encode(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Ragged:
        """Encode documents.

        Args:
            texts: n documents; with `prompts`, the responses alone.
            prompts: n prompts that carry no loss (loss scope response), or None.

        Returns:
            n documents. One that yields no loss token (empty, or a single token in language modelling) has
            no target other than IGNORE; callers quarantine it.
        """
        if self.task.kind == "classification":
            return self._classification(texts)
        return self._language_model(texts, prompts)

    def _classification(self, texts: Sequence[str]) -> Ragged:
        before, after = self.task.template.split("{text}", 1)
        prompts = [before + cut + after for cut in self._cut(texts)]
        documents = self._ids(prompts, special=True)
        targets = [np.full(len(ids), IGNORE, np.int32) for ids in documents]
        for target in targets:
            target[-1:] = PENDING
        return _ragged(documents, targets)

    def _language_model(self, texts: Sequence[str], prompts: Sequence[str] | None) -> Ragged:
        limit = self.task.max_tokens
        if prompts is None:
            documents = self._ids(texts, special=True, limit=limit)
            starts = [1] * len(documents)
        else:
            heads = self._ids(prompts, special=True, limit=limit)
            tails = self._ids(texts, special=False, limit=limit)
            documents = [
                np.concatenate([head, tail])[:limit] for head, tail in zip(heads, tails, strict=True)
            ]
            starts = [max(1, len(head)) if self.scope == "response" else 1 for head in heads]
        targets = [_next_tokens(ids, start, self.scope) for ids, start in zip(documents, starts, strict=True)]
        return _ragged(documents, targets)

    def _cut(self, texts: Sequence[str]) -> list[str]:
        """Texts cut at the end of their `max_tokens`-th token."""
        if not texts:
            return []
        limit = self.task.max_tokens
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=True,
            max_length=limit + 1,
        )
        pieces = []
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
            pieces.append(text if len(offsets) <= limit else text[: offsets[limit - 1][1]])
        return pieces

    def _ids(
        self, texts: Sequence[str], special: bool, limit: int | None = None
    ) -> list[npt.NDArray[np.int32]]:
        """Token ids, at most `limit`, without an end mark that the tokenizer adds by itself."""
        if not texts:
            return []
        # One token more than the limit: the tokenizer makes room for the end mark, which goes.
        cut = {} if limit is None else {"truncation": True, "max_length": limit + 1}
        encoded = self.tokenizer(list(texts), add_special_tokens=special, **cut)["input_ids"]
        end = self.tokenizer.eos_token_id if special else None
        documents = []
        for ids in encoded:
            array = np.asarray(ids, np.int32)
            if len(array) > 1 and array[-1] == end:
                array = array[:-1]
            documents.append(array[:limit])
        return documents


def label_token_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The sole token of ``" " + word`` for every label word.

    Raises:
        UserError: a word is several tokens, or two words share one; the message names them.
    """
    ids: dict[int, str] = {}
    for word in labels:
        tokens = tokenizer.encode(" " + word, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(
                f"task.labels: {word!r} is {len(tokens)} tokens for this tokenizer, not one: "
                "use another word or a letter, and task.display_names for its name."
            )
        if tokens[0] in ids:
            raise UserError(
                f"task.labels: {ids[tokens[0]]!r} and {word!r} are the same token: use distinct words."
            )
        ids[tokens[0]] = word
    return list(ids)


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
    """The given documents as one right-padded batch."""
    lengths = ragged.lengths[members]
    width = int(lengths.max()) if len(lengths) else 0
    columns = np.arange(width)
    real = columns[None, :] < lengths[:, None]
    source = np.where(real, ragged.offsets[members][:, None] + columns[None, :], 0)
    input_ids = np.where(real, ragged.tokens[source], pad_id).astype(np.int64)
    targets = np.where(real, ragged.targets[source], IGNORE).astype(np.int64)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(targets), torch.from_numpy(lengths))


def _next_tokens(ids: npt.NDArray[np.int32], start: int, scope: LossScope) -> npt.NDArray[np.int32]:
    """targets[t] = ids[t + 1] where token t + 1 carries loss: from `start` on, or the last one alone."""
    targets = np.full(len(ids), IGNORE, np.int32)
    first = len(ids) - 1 if scope == "last_token" else start
    if first >= 1:
        targets[first - 1 : len(ids) - 1] = ids[first:]
    return targets


def _ragged(documents: list[npt.NDArray[np.int32]], targets: list[npt.NDArray[np.int32]]) -> Ragged:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids in documents], out=offsets[1:])
    empty = [np.zeros(0, np.int32)]
    return Ragged(np.concatenate(documents or empty), np.concatenate(targets or empty), offsets)
