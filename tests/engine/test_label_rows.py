"""Under a softmax over labels alone the output layer's other rows never move: leaving them out trains the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from cluster.single_stepper import SingleStepper
from engine import plain_stepper
from engine.encode import Encoder
from engine.models import load_model, load_tokenizer
from engine.padding import pad
from engine.plain_stepper import PlainStepper, train_plain
from engine.ragged import Ragged
from engine.recipe import prepare
from engine.spec import Retrain, Task

HEAD = {True: "model.embed_tokens.weight", False: "lm_head.weight"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_model(tmp_path_factory.mktemp("m") / "base", tied=False)


def recipe(**changes: Any) -> Retrain:
    return Retrain(
        **{
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "freeze_below": 1,
            **changes,
        }
    )


def documents(base: str) -> tuple[Ragged, list[int]]:
    encoder = Encoder(load_tokenizer(base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")
    return tiny.examples(encoder, 29, 0), encoder.label_ids


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "learning_rate": 1e-3},
        {"optimizer": "adam", "micro_batch_size": 3},
        {"optimizer": "sgd", "momentum": 0.9, "max_grad_norm": 0},
        {"freeze_body": True, "freeze_below": 0, "early_stopping": True},
    ],
    ids=lambda changes: "-".join(changes) or "adamw",
)
@pytest.mark.parametrize("tied", [True, False])
def test_training_the_labels_rows_is_training_all_of_them(
    tiny_base: str, untied: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], tied: bool
) -> None:
    base, retrain = tiny_base if tied else untied, recipe(**changes)
    examples, ids = documents(base)
    dtype = torch.bfloat16 if retrain.dtype == "bfloat16" else torch.float32
    curves, weights = [], []
    for few in (True, False):
        if not few:
            monkeypatch.setattr(plain_stepper, "_moving_rows", lambda *_: None)
        model = load_model(base, dtype)
        before = model.state_dict()[HEAD[tied]].clone()
        curves.append([loss for _, loss in train_plain(model, examples, retrain, 2, ids, examples)["curve"]])
        weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        moved = (model.state_dict()[HEAD[tied]] != before).any(1)
        assert set(torch.nonzero(moved).flatten().tolist()) == set(ids)
    coarse = dtype == torch.bfloat16
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-2 if coarse else 1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(
            weight, weights[1][name], rtol=2e-2 if coarse else 1e-4, atol=2e-3 if coarse else 1e-6
        )


def test_all_rows_train_where_all_may_move(tiny_base: str, untied: str) -> None:
    """A softmax over the vocabulary, decay, or an embedding that is trained from its other side too."""
    _, ids = documents(tiny_base)

    def rows(base: str, retrain: Retrain, label_ids: list[int] | None) -> list[int]:
        stepper = PlainStepper(prepare(load_model(base, torch.float32), retrain), retrain, label_ids)
        return [len(rows) for rows in stepper.rows if rows is not None]

    assert rows(untied, recipe(freeze_below=0), ids) == [len(ids)]
    assert rows(tiny_base, recipe(), ids) == [len(ids)]
    assert rows(tiny_base, recipe(freeze_below=0), ids) == []
    assert rows(untied, recipe(), None) == []
    assert rows(untied, recipe(weight_decay=0.1), ids) == []
    assert rows(untied, recipe(freeze_head=True), ids) == []


def test_a_checkpoint_holds_the_rows_and_goes_on_from_them(untied: str, tmp_path: Path) -> None:
    examples, ids = documents(untied)
    batches = [pad(examples, np.arange(start, start + 8)) for start in (0, 8, 16)]

    def stepper() -> SingleStepper:
        return SingleStepper(untied, recipe(), ids, torch.device("cpu"), 0)

    def train(on: SingleStepper, batches: list[Any]) -> None:
        for batch in batches:
            on.backward(on.scores(batch)[0].mean())
            on.step(1e-2)

    whole, first, second = stepper(), stepper(), stepper()
    train(whole, batches)
    train(first, batches[:2])
    first.save(str(tmp_path))
    second.load(str(tmp_path))
    for name, weight in first.gathered().items():
        torch.testing.assert_close(second.gathered()[name], weight, rtol=0, atol=0)
    train(second, batches[2:])
    for name, weight in whole.gathered().items():
        torch.testing.assert_close(second.gathered()[name], weight, rtol=0, atol=0)
