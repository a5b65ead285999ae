"""Text to tokens: one encoder for extraction, retraining and evaluation, with targets that say where loss lies.

A document becomes `tokens` and, at the same positions, `targets`: the token that the state at that position
has to predict, or IGNORE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.chat import Turns, load_chat, render
from engine.errors import UserError
from engine.models import load_config, load_tokenizer
from engine.ragged import IGNORE, PENDING, Ragged, ragged
from engine.spec import LossScope, RunSpec, Task


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
        return ragged(documents, targets)

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
        return ragged(documents, targets)

    def _chats(self, texts: Sequence[str]) -> Ragged:
        problems: dict[int, str] = {}
        rendered: list[Turns] = []
        for i, text in enumerate(texts):
            turns, problem = render(self.tokenizer, load_chat(text))
            rendered.append(turns)
            if problem is not None:
                problems[i] = problem
        if not rendered:
            return ragged([], [])
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
        return replace(ragged(documents, targets), problems=problems)

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


def _next_tokens(ids: npt.NDArray[np.int32], start: int, scope: LossScope) -> npt.NDArray[np.int32]:
    """targets[t] = ids[t + 1] where token t + 1 carries loss: from `start` on, or the last one alone."""
    targets = np.full(len(ids), IGNORE, np.int32)
    first = len(ids) - 1 if scope == "last_token" else start
    if first >= 1:
        targets[first - 1 : len(ids) - 1] = ids[first:]
    return targets
