"""Encoding: where the text is cut, which tokens carry loss, and how ragged documents become padded batches."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from engine.encode import Encoder, label_token_ids
from engine.errors import UserError
from engine.padding import length_batches, pad
from engine.ragged import IGNORE, PENDING, Ragged
from engine.spec import Task

TOKENIZER = tiny.tokenizer()
LONG = " ".join(tiny.WORDS["sports"] * 20)


def classifier(
    max_tokens: int = 12, template: str = "{text} topic:", tokenizer: object = TOKENIZER
) -> Encoder:
    task = Task(kind="classification", labels=tiny.LABELS, template=template, max_tokens=max_tokens)
    return Encoder(tokenizer, task, "last_token")


def language_model(scope: str, max_tokens: int = 12, tokenizer: object = TOKENIZER) -> Encoder:
    return Encoder(tokenizer, Task(kind="language_modelling", max_tokens=max_tokens), scope)  # type: ignore[arg-type]


def with_marks(bos: bool = True, eos: bool = True, truncation_side: str = "right") -> object:
    """The tiny tokenizer, adding a begin mark before and an end mark after every text, as LLaMA's or T5's do."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    marks = [("<|begin|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    single = f"{'<|begin|> ' if bos else ''}$A{' <|end|>' if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=marks)
    tokenizer.truncation_side = truncation_side
    return tokenizer


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_is_cut_before_the_template_is_applied(side: str) -> None:
    ragged = classifier(5, tokenizer=with_marks(False, False, side)).encode([LONG])
    cut = TOKENIZER.decode(ids(LONG)[:5])
    assert ragged.tokens.tolist() == ids(cut + " topic:")


def test_text_on_both_sides_of_the_document_is_kept_whole() -> None:
    ragged = classifier(4, "new: {text} says").encode([LONG, "a goal"])
    assert ragged.tokens[: ragged.offsets[1]].tolist() == ids(
        "new: " + TOKENIZER.decode(ids(LONG)[:4]) + " says"
    )
    assert ragged.tokens[ragged.offsets[1] :].tolist() == ids("new: a goal says")


def test_braces_in_a_document_are_text() -> None:
    assert classifier().encode(["{text} {0}"]).tokens.tolist() == ids("{text} {0} topic:")


def test_the_last_prompt_token_predicts_the_label_and_the_label_is_not_fed_in() -> None:
    encoder = classifier()
    ragged = encoder.encode(["a goal", LONG])
    last = ragged.offsets[1:] - 1
    assert (ragged.targets[last] == PENDING).all()
    assert (np.delete(ragged.targets, last) == IGNORE).all()
    labelled = ragged.with_labels(np.array(encoder.label_ids[:2], np.int32))
    np.testing.assert_array_equal(labelled.tokens, ragged.tokens)
    assert labelled.targets[last].tolist() == encoder.label_ids[:2]


def test_begin_marks_stay_and_end_marks_go() -> None:
    marked = with_marks()
    begin = [marked.bos_token_id]
    assert classifier(tokenizer=marked).encode(["a goal"]).tokens.tolist() == begin + ids("a goal topic:")
    ragged = language_model("all_tokens", tokenizer=marked).encode(["a goal", LONG])
    assert ragged.tokens[: ragged.offsets[1]].tolist() == begin + ids("a goal")
    assert ragged.tokens[ragged.offsets[1] :].tolist() == begin + ids(LONG)[:11]
    both = language_model("response", tokenizer=marked).encode([" a goal"], ["says"])
    assert both.tokens.tolist() == begin + ids("says") + ids(" a goal")


def test_all_tokens_but_the_first_carry_loss() -> None:
    ragged = language_model("all_tokens").encode([LONG])
    assert len(ragged.tokens) == 12
    assert ragged.targets.tolist() == [*ragged.tokens[1:].tolist(), IGNORE]


def test_last_token_alone_carries_loss() -> None:
    ragged = language_model("last_token").encode([LONG])
    assert ragged.targets[:-2].tolist() == [IGNORE] * 10
    assert ragged.targets[-2:].tolist() == [ragged.tokens[-1], IGNORE]


def test_response_tokens_alone_carry_loss() -> None:
    prompt, response = "the coach says", " a goal"
    ragged = language_model("response").encode([response], [prompt])
    n = len(ids(prompt))
    assert ragged.tokens.tolist() == ids(prompt) + ids(response)
    assert ragged.targets.tolist() == [IGNORE] * (n - 1) + ids(response) + [IGNORE]


def test_prompts_carry_loss_when_all_tokens_do() -> None:
    ragged = language_model("all_tokens").encode([" a goal"], ["the coach says"])
    assert ragged.targets.tolist() == [*ragged.tokens[1:].tolist(), IGNORE]


def test_a_long_response_is_cut_and_a_long_prompt_leaves_no_loss() -> None:
    encoder = language_model("response", 8)
    ragged = encoder.encode([LONG, " a goal"], ["the coach", LONG])
    assert ragged.lengths.tolist() == [8, 8]
    first, second = ragged.targets[:8], ragged.targets[8:]
    n = len(ids("the coach"))
    assert first.tolist() == [IGNORE] * (n - 1) + ids(LONG)[: 8 - n] + [IGNORE]
    assert (second == IGNORE).all()


@pytest.mark.parametrize("scope", ["all_tokens", "last_token"])
def test_documents_without_a_second_token_carry_no_loss(scope: str) -> None:
    ragged = language_model(scope).encode(["", " sports", "a goal"])
    per_document = np.split(ragged.targets != IGNORE, ragged.offsets[1:-1])
    assert [bool(d.any()) for d in per_document] == [False, False, True]


def test_no_documents_are_no_tokens() -> None:
    assert len(classifier().encode([])) == 0
    assert len(language_model("all_tokens").encode([])) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["sports", "quantitative easing"], "'quantitative easing' is .* tokens"),
        (["sports", "sports"], "same token"),
    ],
)
def test_label_words_that_are_not_distinct_single_tokens_are_refused_by_name(
    labels: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        label_token_ids(TOKENIZER, labels)


documents = st.lists(st.lists(st.integers(0, 500), max_size=20), min_size=1, max_size=30)


def ragged_of(rows: list[list[int]]) -> Ragged:
    flat = np.array([token for row in rows for token in row], np.int32)
    return Ragged(flat, (flat + 1).astype(np.int32), np.cumsum([0, *map(len, rows)]).astype(np.int64))


@settings(deadline=None)
@given(documents, st.integers(1, 60))
def test_batches_hold_every_document_once_within_the_budget(rows: list[list[int]], budget: int) -> None:
    lengths = ragged_of(rows).lengths
    groups = length_batches(lengths, budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= budget or lengths[group].max() == 0
    assert (np.diff([lengths[group].max() for group in groups]) <= 0).all()


@settings(deadline=None)
@given(documents, st.data())
def test_padding_moves_no_token(rows: list[list[int]], data: st.DataObject) -> None:
    members = np.array(data.draw(st.permutations(range(len(rows)))), np.int64)
    batch = pad(ragged_of(rows), members, pad_id=7)
    assert batch.input_ids.shape == batch.targets.shape == (len(rows), max(map(len, rows)))
    for row, tokens, targets in zip(members, batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        n = len(rows[row])
        assert tokens == rows[row] + [7] * (len(tokens) - n)
        assert targets == [t + 1 for t in rows[row]] + [IGNORE] * (len(tokens) - n)
    assert batch.lengths.tolist() == [len(rows[i]) for i in members]


@settings(deadline=None)
@given(documents, st.data())
def test_silenced_documents_keep_their_place_and_lose_their_loss(
    rows: list[list[int]], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    before = ragged_of(rows)
    after = before.silenced(chosen)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    for i in range(len(rows)):
        part = slice(before.offsets[i], before.offsets[i + 1])
        expected = np.full(len(rows[i]), IGNORE) if i in chosen else before.targets[part]
        np.testing.assert_array_equal(after.targets[part], expected)
