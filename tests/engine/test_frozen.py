"""Kept states of frozen blocks: the same training and the same judgement, or a refusal that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from engine import frozen
from engine.encode import Encoder
from engine.errors import UserError
from engine.evaluate.task import TestSet, evaluate_model
from engine.experiment.base import changed_base
from engine.experiment.grid import Base
from engine.frozen import frozen_states
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.recipe import prepare
from engine.spec import Retrain, Task

TASK = Task(labels=tiny.LABELS, max_tokens=32)
TEXTS = Task(kind="language_modelling", max_tokens=32)


def recipe(**changes: Any) -> Retrain:
    fields = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", "freeze_below": 1}
    return Retrain(**{**fields, **changes})


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_model(tmp_path_factory.mktemp("m") / "base", tied=False)


@pytest.fixture(scope="module")
def encoder(untied: str) -> Encoder:
    return Encoder(load_tokenizer(untied), TASK, "last_token")


@pytest.mark.parametrize("task", [TASK, TEXTS], ids=["classification", "language_modelling"])
def test_training_on_kept_states_is_training(untied: str, encoder: Encoder, task: Task) -> None:
    scope = "last_token" if task is TASK else "all_tokens"
    coder = Encoder(encoder.tokenizer, task, scope)
    examples, validation = tiny.examples(coder, 37, 0), tiny.examples(coder, 11, 1)
    ids = coder.label_ids or None
    curves, weights, judged = [], [], []
    for keep in (False, True):
        model = load_model(untied, torch.float32)
        retrain = recipe(cache_frozen=keep, eval_steps=3)
        found = train_plain(model, examples, retrain, 3, ids, validation)
        curves.append(found["curve"])
        judged.append([row["loss"] for row in found["validation"]])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(judged[1], judged[0], rtol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_judgement_is_the_same_and_the_next_model_finds_the_states(
    untied: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels = zip(*tiny.sentences(40, 5), strict=True)
    test = TestSet(list(texts), np.array(labels, np.int64))
    computed = []
    real = frozen._computed
    monkeypatch.setattr(frozen, "_computed", lambda *args: computed.append(1) or real(*args))
    for change in (0.0, 0.3):  # another upper block, another head: the lower states are the same
        model = load_model(untied, torch.float32)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(change)
            model.lm_head.weight.mul_(1 + change)
        plain = evaluate_model(model, encoder, test, 200)
        assert evaluate_model(model, encoder, test, 200, frozen_below=1) == plain
    assert computed == [1]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)
    assert evaluate_model(model, encoder, test, 200, frozen_below=1) == evaluate_model(
        model, encoder, test, 200
    )
    assert computed == [1, 1]


def test_states_depend_on_the_documents_alone_and_the_last_sets_are_kept(
    untied: str, encoder: Encoder
) -> None:
    model = load_model(untied, torch.float32)
    one = frozen_states(model, 1, tiny.examples(encoder, 20, 7))
    assert (
        frozen_states(prepare(load_model(untied, torch.float32), recipe()), 1, tiny.examples(encoder, 20, 7))
        is one
    )
    for seed in range(frozen.KEPT):
        frozen_states(model, 1, tiny.examples(encoder, 5, 100 + seed))
    again = frozen_states(model, 1, tiny.examples(encoder, 20, 7))
    assert again is not one
    assert torch.equal(again.states, one.states)


def test_what_is_not_constant_or_cannot_be_parted_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    examples = tiny.examples(encoder, 9, 0)
    tied = load_model(tiny.save_model(tmp_path / "tied"), torch.float32)
    with pytest.raises(UserError, match="untie the base model"):
        train_plain(tied, examples, recipe(cache_frozen=True), 0)
    train_plain(tied, examples, recipe(cache_frozen=True, freeze_head=True, epochs=1), 0)
    gpt2 = load_model(tiny.save_model(tmp_path / "gpt2", "gpt2", tied=False), torch.float32)
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be run from block 1 on"):
        train_plain(gpt2, examples, recipe(cache_frozen=True), 0)
    with pytest.raises(UserError, match="blocks 0 to 1"):
        train_plain(tied, examples, recipe(cache_frozen=True, freeze_head=True, freeze_below=2), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_below": 0}, "needs freeze_below"),
        ({"packing": True}, "does not go with packing"),
        ({"dropout": True}, "does not go with dropout"),
        ({"lora": {"rank": 2}}, "does not go with lora"),
        ({"workers": 2}, "does not go with workers"),
    ],
)
def test_recipes_that_cannot_keep_states_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(cache_frozen=True, **changes)


def test_an_experiments_base_is_rounded_and_untied_once(tmp_path: Path, tiny_base: str) -> None:
    assert changed_base(Base(), tiny_base, str(tmp_path / "same")) == tiny_base
    target = changed_base(Base(dtype="bfloat16", untie=True), tiny_base, str(tmp_path / "made"))
    before, after = load_model(tiny_base, torch.float32), load_model(target, torch.float32)
    head, embedding = after.get_output_embeddings().weight, after.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    assert torch.equal(embedding, before.get_input_embeddings().weight.bfloat16().float())
    stamp = (tmp_path / "made/config.json").stat().st_mtime_ns
    assert changed_base(Base(dtype="bfloat16", untie=True), tiny_base, target) == target
    assert (tmp_path / "made/config.json").stat().st_mtime_ns == stamp
