"""Text to tokens: one encoder for extraction, retraining and evaluation, with targets that say where loss lies.

A document becomes `tokens` and, at the same positions, `targets`: the token that the state at that position
has to predict, or IGNORE. Causal models read right-padded batches without an attention mask: padding comes
after every real token, so no real state can see it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.chat import Turns, load_chat, render
from engine.errors import UserError
from engine.models import load_config, load_tokenizer
from engine.spec import LossScope, RunSpec, Task

if TYPE_CHECKING:
    from engine.frozen import Entering

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


class Encoder:
    """Turns documents into `Ragged` token sequences for one tokenizer and one task.

    Classification: the text is cut to `task.max_tokens` tokens, put into the template, and the prompt encoded
    without a trailing space or an end mark; the last prompt token's state predicts the label, which is never
    fed in. Language modelling: the text is its own label under the loss scope. A chat is a text that
    `engine.chat.dump_chat` made, rendered by the tokenizer's own template; scope response is then what the
    assistant says, each turn with its end mark.

    Args:
        tokenizer: a Hugging Face tokenizer of the model family.
        task: the task section of the spec.
        scope: the resolved loss scope (`RunSpec.loss_scope`).
        chat: texts are chats.

    Raises:
        UserError: label words that are not distinct single tokens (the message names them), or chats for a
            tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, task: Task, scope: LossScope, chat: bool = False) -> None:
        self.tokenizer, self.task, self.scope, self.chat = tokenizer, task, scope, chat
        if chat and not tokenizer.chat_template:
            raise UserError(
                f"corpus.messages needs a chat template, and the tokenizer in {tokenizer.name_or_path} has none: "
                "put a chat_template.jinja into the folder of models.base or models.finetuned."
            )
        tokenizer.truncation_side = "right"  # some tokenizers come with "left"
        self.label_ids: list[int] = label_token_ids(tokenizer, task.labels) if task.labels else []

    def encode(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Ragged:
        """Encode documents.

        Args:
            texts: n documents; with `prompts`, the responses alone.
            prompts: n prompts that carry no loss (loss scope response), or None.

        Returns:
            n documents. One that yields no loss token (empty, or a single token in language modelling) has
            no target other than IGNORE; callers quarantine it. `Ragged.problems` says what is wrong with chats
            that cannot be rendered.
        """
        if self.task.kind == "classification":
            return self._classification(texts)
        if self.chat:
            return self._chats(texts)
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

    def _chats(self, texts: Sequence[str]) -> Ragged:
        problems: dict[int, str] = {}
        rendered: list[Turns] = []
        for i, text in enumerate(texts):
            turns, problem = render(self.tokenizer, load_chat(text))
            rendered.append(turns)
            if problem is not None:
                problems[i] = problem
        if not rendered:
            return _ragged([], [])
        encoded = self.tokenizer(
            [turns.text for turns in rendered],
            add_special_tokens=False,  # the template writes them
            return_offsets_mapping=True,
            truncation=True,
            max_length=self.task.max_tokens,
        )
        documents = [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        targets = []
        for ids, offsets, turns in zip(documents, encoded["offset_mapping"], rendered, strict=True):
            target = _next_tokens(ids, 1, self.scope)
            if self.scope == "response" and len(ids):
                target[:-1][~turns.said_by_assistant(offsets)[1:]] = IGNORE
            targets.append(target)
        return replace(_ragged(documents, targets), problems=problems)

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


def spec_encoder(spec: RunSpec, base: str, finetuned: str) -> Encoder:
    """The encoder of a run, on the base model's tokenizer; folders of both models, see `load_tokenizer`.

    Raises:
        UserError: no usable tokenizer, or documents may be longer than the model has positions for.
    """
    template_of = finetuned if spec.corpus.messages is not None else None
    tokenizer = load_tokenizer(base, spec.models.trust_remote_code, template_of)
    around = 0
    if spec.task.kind == "classification":
        around = len(tokenizer(spec.task.template.replace("{text}", ""))["input_ids"])
    _check_positions(spec, base, around)
    return Encoder(tokenizer, spec.task, spec.loss_scope, spec.corpus.messages is not None)


def _check_positions(spec: RunSpec, base: str, around: int) -> None:
    """Refuse documents beyond a table of learned positions (GPT-2, OPT); rotary ones have no end."""
    config = load_config(base, spec.models.trust_remote_code).get_text_config()
    positions, limit = getattr(config, "max_position_embeddings", None), spec.task.max_tokens
    if positions is None or getattr(config, "rope_parameters", None) or limit + around <= positions:
        return
    beside = f", and with the {around} tokens around a text" if around else ""
    raise UserError(
        f"task.max_tokens is {limit:,}{beside} that is more than the {positions:,} positions that {base} has: set it "
        f"to {positions - around:,} or fewer."
    )


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


def _next_tokens(ids: npt.NDArray[np.int32], start: int, scope: LossScope) -> npt.NDArray[np.int32]:
    """targets[t] = ids[t + 1] where token t + 1 carries loss: from `start` on, or the last one alone."""
    targets = np.full(len(ids), IGNORE, np.int32)
    first = len(ids) - 1 if scope == "last_token" else start
    if first >= 1:
        targets[first - 1 : len(ids) - 1] = ids[first:]
    return targets


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


def _ragged(documents: list[npt.NDArray[np.int32]], targets: list[npt.NDArray[np.int32]]) -> Ragged:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids in documents], out=offsets[1:])
    nothing = np.zeros(0, np.int32)
    return Ragged(_joined(documents, nothing), _joined(targets, nothing), offsets)


def _joined(pieces: list[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(pieces) if pieces else nothing
