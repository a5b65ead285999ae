"""Promises of engine.evaluate: metrics equal the naive computation, splits and comparisons the arithmetic."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from engine.encode import Encoder
from engine.errors import UserError
from engine.evaluate import task as task_module
from engine.evaluate.comparison import behind, compare, metrics
from engine.evaluate.task import TestSet, evaluate_model, match_labels, split_validation
from engine.models import load_model, load_tokenizer
from engine.spec import Task
from jobs.table import print_table

CLASSIFY = Task(labels=tiny.LABELS, max_tokens=12, display_names=["World", "Sports", "Business", "Sci/Tech"])
MODEL = Task(kind="language_modelling", max_tokens=16)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_model(tmp_path_factory.mktemp("m") / request.param, family=request.param, seed=3)


def labelled(n: int = 40, seed: int = 1) -> TestSet:
    documents = tiny.sentences(n, seed)
    return TestSet([text for text, _ in documents], np.array([label for _, label in documents], np.int64))


def naive_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def cross_entropy(logits: np.ndarray, target: int) -> float:
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


@pytest.mark.parametrize("softmax", ["restricted", "full"])
def test_accuracy_and_loss_equal_a_document_at_a_time(folder: str, softmax: Any) -> None:
    model, tokenizer, test = load_model(folder, torch.float32), load_tokenizer(folder), labelled()
    ids = [tokenizer.encode(" " + word)[0] for word in CLASSIFY.labels]
    right, losses, confusion = 0, [], np.zeros((4, 4), int)
    for text, label in zip(test.texts, test.labels, strict=True):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        cut = text if len(offsets) <= 12 else text[: offsets[11][1]]
        logits = naive_logits(model, tokenizer.encode(f"{cut}\nTopic:"))[-1]
        guess = int(logits[ids].argmax())
        right += guess == label
        confusion[label, guess] += 1
        restricted = cross_entropy(logits[ids], label)
        losses.append(restricted if softmax == "restricted" else cross_entropy(logits, ids[label]))
    got = evaluate_model(model, Encoder(tokenizer, CLASSIFY, "last_token"), test, 256, softmax)
    assert got["accuracy"] == right / len(test)
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert got["confusion"] == confusion.tolist()
    assert got["documents"] == len(test)
    assert got["per_label"] == [confusion[i, i] / confusion[i].sum() for i in range(4)]
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("scope", ["all_tokens", "last_token", "response"])
def test_perplexity_equals_a_document_at_a_time(folder: str, scope: Any) -> None:
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    texts = [text for text, _ in tiny.sentences(30, 2)]
    prompts = [f"Say {i}:" for i in range(30)] if scope == "response" else None
    total, n = 0.0, 0
    for i, text in enumerate(texts):
        head = tokenizer.encode(prompts[i]) if prompts else []
        ids = (head + tokenizer.encode(text))[:16]
        logits = naive_logits(model, ids)
        first = {"all_tokens": 1, "last_token": len(ids) - 1, "response": len(head)}[scope]
        for position in range(max(1, first), len(ids)):
            total, n = total + cross_entropy(logits[position - 1], ids[position]), n + 1
    got = evaluate_model(model, Encoder(tokenizer, MODEL, scope), TestSet(texts, None, prompts), 200)
    assert got["tokens"] == n
    assert got["loss"] == pytest.approx(total / n, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)


def test_the_batch_budget_changes_nothing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, test = load_model(folder, torch.float32), load_tokenizer(folder), labelled(60)
    classify, model_text = Encoder(tokenizer, CLASSIFY, "last_token"), Encoder(tokenizer, MODEL, "all_tokens")
    before = [evaluate_model(model, e, test, 1, "full") for e in (classify, model_text)]
    monkeypatch.setattr(task_module, "CHUNK_LOGITS", 3 * len(tokenizer))
    after = [evaluate_model(model, e, test, 100_000, "full") for e in (classify, model_text)]
    assert before[0]["confusion"] == after[0]["confusion"]
    assert before[0]["loss"] == pytest.approx(after[0]["loss"], rel=1e-5)
    assert before[1]["perplexity"] == pytest.approx(after[1]["perplexity"], rel=1e-5)


def test_documents_without_loss_tokens_are_skipped_and_training_mode_is_kept(folder: str) -> None:
    model, tokenizer = load_model(folder, torch.float32).train(), load_tokenizer(folder)
    encoder = Encoder(tokenizer, MODEL, "all_tokens")
    got = evaluate_model(model, encoder, TestSet(["", "a", "goal striker coach"]), 64)
    alone = evaluate_model(model, encoder, TestSet(["goal striker coach"]), 64)
    assert (got["documents"], got["skipped"], got["perplexity"]) == (1, 2, alone["perplexity"])
    assert model.training
    with pytest.raises(UserError, match="no document"):
        evaluate_model(model, encoder, TestSet(["", ""]), 64)
    with pytest.raises(UserError, match=r"evaluate\.label"):
        evaluate_model(model, Encoder(tokenizer, CLASSIFY, "last_token"), TestSet(["x"]), 64)


def test_a_model_with_nan_weights_has_no_metric(folder: str) -> None:
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    with torch.no_grad():
        next(model.base_model.parameters())[:] = float("nan")
    classified = evaluate_model(model, Encoder(tokenizer, CLASSIFY, "last_token"), labelled(5), 64)
    modelled = evaluate_model(model, Encoder(tokenizer, MODEL, "all_tokens"), labelled(5), 64)
    assert (classified["accuracy"], classified["loss"], classified["non_finite"]) == (None, None, 5)
    assert modelled["perplexity"] is None
    json.dumps([classified, modelled], allow_nan=False)


def test_label_columns_of_every_kind_are_understood() -> None:
    want = [0, 3, 2]
    for column in (
        [0, 3, 2],
        ["0", "3", "2"],
        [0.0, 3.0, np.float32(2)],
        [np.int64(0), np.int8(3), np.uint16(2)],
        ["world", "SCIENCE", " Business "],
        ["World", "sci/tech", "business"],
        ["world", 3, "2"],
    ):
        assert match_labels(column, CLASSIFY).tolist() == want
    for bad in (4, -1, "politics", None, 1.5, float("nan"), ""):
        with pytest.raises(UserError, match="document 1"):
            match_labels([0, bad], CLASSIFY)


def test_digits_as_label_words_are_read_as_words() -> None:
    stars = Task(labels=["1", "2", "3"])
    assert match_labels(["3", "1", 2], stars).tolist() == [2, 0, 1]
    assert match_labels([0, 1, 2], stars).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=3), max_size=40),
    st.floats(0, 0.99),
    st.randoms(use_true_random=False),
)
def test_the_validation_split_does_not_depend_on_order(
    texts: list[str], share: float, rng: random.Random
) -> None:
    validation, test = split_validation(texts, share)
    assert sorted([*validation, *test]) == list(range(len(texts)))
    first = {texts[i] for i in validation}
    assert not first & {texts[i] for i in test}
    if share > 0 and len(set(texts)) > 1:
        assert len(validation)
        assert len(test)
    if share == 0:
        assert not len(validation)
    if len(set(texts)) == len(texts) > 2 and 1 <= round(share * len(texts)) < len(texts):
        assert len(validation) == round(share * len(texts))
    shuffled = texts[:]
    rng.shuffle(shuffled)
    again, _ = split_validation(shuffled, share)
    assert sorted(shuffled[i] for i in again) == sorted(texts[i] for i in validation)


def test_a_test_set_is_cut_by_hash_and_stays_aligned() -> None:
    test = labelled(50)
    few = test.at_most(20)
    pairs = set(zip(test.texts, test.labels.tolist(), strict=True))
    assert len(few) == 20
    assert set(zip(few.texts, few.labels.tolist(), strict=True)) <= pairs
    assert set(test.take(np.arange(50)[::-1]).at_most(20).texts) == set(few.texts)
    assert test.at_most(None) is test
    prompted = TestSet(["x"] * 6, None, list("abcdef"))
    validation, rest = prompted.split(0.5)
    assert sorted(validation.prompts + rest.prompts) == list("abcdef")
    assert len(validation) == 3


Run = tuple[str, int, float | None]


def results(base: float | None, finetuned: float | None, runs: list[Run]) -> dict[str, Any]:
    entries = [{"strategy": strategy, "seed": seed, "metric": metric} for strategy, seed, metric in runs]
    return {"base": base, "finetuned": finetuned, "runs": entries}


def test_gap_closed_equals_the_hand_calculation() -> None:
    runs = [
        ("random", 0, 0.70),
        ("random", 1, 0.74),
        ("greedy", 0, 0.80),
        ("greedy", 1, 0.82),
        ("topk", 1, 0.64),
    ]
    got = compare(results(0.25, 0.92, runs), True)
    rows = {row["strategy"]: row for row in got["strategies"]}
    assert rows["greedy"]["mean"] == pytest.approx(0.81)
    assert rows["greedy"]["spread"] == pytest.approx(0.01 * math.sqrt(2))
    # g = (0.81 - 0.72) / (0.92 - 0.72) = 0.45; residuals +-(0.01 - 0.55 * 0.02) / 0.2 = +-0.005
    assert rows["greedy"]["gap_closed"] == pytest.approx(0.45)
    assert rows["greedy"]["gap_spread"] == pytest.approx(0.005 * math.sqrt(2))
    assert rows["greedy"]["gap_stderr"] == pytest.approx(0.005)
    # topk shares seed 1 alone with random: (0.64 - 0.74) / (0.92 - 0.74)
    assert rows["topk"]["gap_closed"] == pytest.approx(-0.1 / 0.18)
    assert (rows["topk"]["spread"], rows["topk"]["gap_spread"], rows["topk"]["gap_n"]) == (None, None, 1)
    assert rows["random"]["gap_closed"] == 0
    assert got["warnings"] == []


def test_lower_is_better_for_perplexity() -> None:
    runs = [("random", 0, 3.31), ("greedy", 0, 2.30), ("greedy_batched", 0, 4.0)]
    got = compare(results(9.0, 2.0, runs), False)
    rows = {row["strategy"]: row for row in got["strategies"]}
    assert rows["greedy"]["gap_closed"] == pytest.approx((2.30 - 3.31) / (2.0 - 3.31))
    assert rows["greedy_batched"]["gap_closed"] < 0
    assert [w for w in got["warnings"] if w.startswith("greedy_batched is worse than random by 0.69")]
    assert not [w for w in got["warnings"] if w.startswith("greedy is")]


@pytest.mark.parametrize(
    ("finetuned", "runs"),
    [
        (0.7, [("random", 0, 0.7), ("greedy", 0, 0.8)]),
        (0.6, [("random", 0, 0.7), ("greedy", 0, 0.8)]),
        (0.9, [("greedy", 0, 0.8)]),
        (0.9, [("random", 1, 0.7), ("greedy", 0, 0.8)]),
        (None, [("random", 0, 0.7), ("greedy", 0, 0.8)]),
        (0.9, [("random", 0, None), ("greedy", 0, 0.8)]),
    ],
)
def test_an_undefined_gap_is_none(finetuned: float | None, runs: list[Run]) -> None:
    got = compare(results(0.2, finetuned, runs), True)
    assert [row["gap_closed"] for row in got["strategies"] if row["strategy"] == "greedy"] == [None]


@pytest.mark.parametrize("higher", [True, False])
def test_behind_names_who_is_ahead_over_the_seeds_of_both(higher: bool) -> None:
    sign = 1.0 if higher else -1.0
    runs = [("random", 0, 5.0), ("random", 1, 6.0), ("random_confident", 0, 9.0), ("topk", 0, 20.0)]
    runs += [("greedy", 0, 7.0), ("greedy", 1, 8.0), ("greedy", 2, 0.0)]
    table = compare(results(0.0, None, [(name, seed, sign * value) for name, seed, value in runs]), higher)
    known = table | {"higher_is_better": higher}
    assert behind(known, "greedy") == {"random_confident": 2.0}
    assert behind(known, "random") == {"random_confident": 4.0}
    assert behind(known, "greedy_batched") == {}


def test_warnings_name_what_a_reader_must_not_overlook() -> None:
    def warn(base: float, runs: list[Run]) -> str:
        return " ".join(compare(results(base, 0.9, runs), True)["warnings"])

    two = [("random", 0, 0.7), ("random", 1, 0.75)]
    assert "worse than random" in warn(0.2, [*two, ("greedy", 0, 0.6), ("greedy", 1, 0.7)])
    sure = [("random_confident", 0, 0.75), ("random_confident", 1, 0.85)]
    behind = warn(0.2, [*two, *sure, ("greedy", 0, 0.76), ("greedy", 1, 0.80)])
    assert (
        "greedy is worse than random_confident by 0.02: documents that the fine-tuned model is sure of"
        in behind
    )
    assert "worse than" not in warn(0.2, [*two, *sure, ("greedy", 0, 0.80), ("greedy", 1, 0.90)])
    assert "less than its spread" in warn(0.2, [*two, ("greedy", 0, 0.8), ("greedy", 1, 0.7)])
    assert "One seed only" in warn(0.2, [("random", 0, 0.7), ("greedy", 0, 0.8)])
    assert "not better than the base" in warn(0.95, two)
    assert "no gap to close" in warn(0.2, [("random", 0, 0.95), ("random", 1, 0.95)])
    assert warn(0.2, [*two, ("greedy", 0, 0.85), ("greedy", 1, 0.9)]) == ""


def test_metrics_json_and_the_terminal_table_agree(tmp_path: Path) -> None:
    def judged(model: str, strategy: str | None, seed: int | None, accuracy: float) -> dict[str, Any]:
        test = {"accuracy": accuracy, "documents": 700, "tokens": 9000}
        return {"model": model, "strategy": strategy, "seed": seed, "validation": None, "test": test}

    entries = [judged("base", None, None, 0.266), judged("finetuned", None, None, 0.872)]
    entries += [judged("retrained", "random", s, a) for s, a in ((0, 0.75), (1, 0.756))]
    entries += [judged("retrained", "greedy", s, a) for s, a in ((0, 0.83), (1, 0.834))]
    got = metrics(entries, "accuracy", 12.5)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["measured"] == {"validation": None, "test": {"documents": 700, "tokens": 9000}}
    assert (got["base"], got["finetuned"], got["models"]) == (0.266, 0.872, entries)
    console = Console(file=io.StringIO(), width=100)
    print_table(got, console)
    text = console.file.getvalue()
    for number in ("26.6%", "75.3 ± 0.4%", "83.2 ± 0.3%", "87.2%", "66 ± 1%", "700 test documents"):
        assert number in text
