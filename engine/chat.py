"""Chats: lists of messages as canonical text, rendered by the tokenizer's own template, with who said what.

A chat travels as one JSON text from the corpus to the selection, like any other document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

Message = dict[str, str]
"""role and content, both strings."""

ASSISTANT = "assistant"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def dump_chat(value: object, name: str) -> tuple[str | None, str | None]:
    """(canonical text, problem) of a corpus value: one of the two is None.

    Args:
        value: a list of {role, content, ...}, or JSON text of one. Keys other than these two are left out.
        name: of the column, for the problem.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None, f"{name}: text that is not JSON"
    if not isinstance(value, list) or not value:
        return None, f"{name} is no list of messages"
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return None, f"{name}: message {i} is of type {type(message).__name__}, not {{role, content}}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                there = ", ".join(map(str, message)) or "nothing"
                return None, f"{name}: message {i} has no {key} that is a string (it has {there[:100]})"
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        return None, f"{name}: no message of the role {ASSISTANT} says anything"
    text = chat_text(messages)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return None, f"{name} cannot be encoded as UTF-8 (character {error.start})"
    return text, None


def load_chat(text: str) -> list[Message]:
    """The messages of a canonical text; none for an empty one (a quarantined document)."""
    return list(json.loads(text)) if text else []


def chat_text(messages: Sequence[Message]) -> str:
    """Canonical text: equal chats give equal texts."""
    return json.dumps(list(messages), ensure_ascii=False)


def cut_chat(text: str, limit: int) -> str:
    """The canonical text with the contents cut to `limit` characters in all: whole messages, then a part."""
    kept: list[Message] = []
    for message in load_chat(text):
        kept.append({**message, "content": message["content"][:limit]})
        limit -= len(message["content"])
        if limit <= 0:
            break
    return chat_text(kept)


def readable(text: str) -> str:
    """A canonical text for people, a paragraph a message; any other text as it is."""
    if not text.startswith('[{"role":'):
        return text
    try:
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in load_chat(text))
    except (ValueError, TypeError, KeyError):
        return text


@dataclass(frozen=True)
class Turns:
    """A rendered chat; spans: [start, stop) characters that the assistant said, ascending."""

    text: str
    spans: list[tuple[int, int]]

    def said_by_assistant(self, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
        """Which tokens, given by their [start, stop) characters, overlap a span; (tokens,)."""
        said = np.zeros(len(offsets), np.bool_)
        start, stop = np.array(offsets, np.int64).reshape(-1, 2).T
        for a, b in self.spans:
            said |= (start < b) & (stop > a) & (stop > start)
        return said


def render(tokenizer: Any, messages: list[Message]) -> tuple[Turns, str | None]:
    """(rendered chat, problem); with a problem the chat is empty.

    The spans are the template's own `{% generation %}` blocks if it has any. Otherwise a turn is what the
    rendering gains when it is added to the messages before it and the prompt for it: the template must not
    change what it wrote before. White space after a turn's end mark is not part of it.
    """
    nothing = Turns("", [])
    if not messages:
        return nothing, None
    by = _by_markers if _GENERATION.search(_template(tokenizer)) else _by_prefixes
    try:
        turns = by(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        return nothing, f"the chat template refuses the chat ({str(error).splitlines()[0][:200]})"
    if turns is None:
        return nothing, (
            "the chat template writes a turn differently once another follows, and has no {% generation %} markers"
        )
    return turns, None


def _template(tokenizer: Any) -> str:
    """The template that a chat without tools is rendered by; some tokenizers have several, by name."""
    return str(tokenizer.get_chat_template())


def _rendered(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _by_markers(tokenizer: Any, messages: list[Message]) -> Turns | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, indices = render_jinja_template(
        conversations=[messages],
        chat_template=_template(tokenizer),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return Turns(texts[0], [(int(a), int(b)) for a, b in indices[0]])


def _by_prefixes(tokenizer: Any, messages: list[Message]) -> Turns | None:
    whole = _rendered(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(tokenizer, messages[:i], prompt=True)
        after = _rendered(tokenizer, messages[: i + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            return None
        spans.append((len(before), len(after.rstrip())))
    return Turns(whole, spans)
