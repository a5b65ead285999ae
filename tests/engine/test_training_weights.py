"""Weighted documents: a weight is how often a document counts, and odd weights are refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.ragged import Ragged
from engine.spec import Retrain, Task

SENTENCES = tiny.sentences(4)


@pytest.fixture(scope="module")
def encoder(tiny_base: str) -> Encoder:
    return Encoder(load_tokenizer(tiny_base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")


def examples(encoder: Encoder, members: list[int], weights: list[float] | None = None) -> Ragged:
    texts, labels = zip(*(SENTENCES[i] for i in members), strict=True)
    columns = {"text": list(texts), "label": list(labels)}
    return load_examples(pa.table(columns if weights is None else {**columns, "weight": weights}), encoder)


def trained(base: str, encoder: Encoder, documents: Ragged) -> dict[str, torch.Tensor]:
    model = load_model(base, torch.float32)
    recipe = Retrain(
        epochs=4, batch_size=8, learning_rate=0.1, dtype="float32", optimizer="sgd", max_grad_norm=0
    )
    train_plain(model, documents, recipe, seed=0, label_ids=encoder.label_ids)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_document_of_twice_the_weight_counts_like_two_copies(tiny_base: str, encoder: Encoder) -> None:
    copies = trained(tiny_base, encoder, examples(encoder, [0, 1, 1, 2]))
    weighted = trained(tiny_base, encoder, examples(encoder, [0, 1, 2], [0.75, 1.5, 0.75]))
    torch.testing.assert_close(weighted, copies, rtol=1e-4, atol=1e-6)
    equal = trained(tiny_base, encoder, examples(encoder, [0, 1, 2]))
    assert any(not torch.allclose(weighted[name], equal[name], rtol=1e-3) for name in equal)


def test_a_document_of_no_weight_teaches_nothing(tiny_base: str, encoder: Encoder) -> None:
    without = trained(tiny_base, encoder, examples(encoder, [0, 1]))
    weighted = trained(tiny_base, encoder, examples(encoder, [0, 1, 3], [1.5, 1.5, 0.0]))
    torch.testing.assert_close(weighted, without, rtol=1e-4, atol=1e-6)


def test_weights_of_one_are_no_weights_and_stay_with_their_documents(encoder: Encoder) -> None:
    assert examples(encoder, [0, 1], [1.0, 1.0]).weights is None
    table = pa.table({"text": [SENTENCES[0][0], SENTENCES[1][0]], "label": [0, 1], "weight": [0.5, 1.5]})
    language = Encoder(encoder.tokenizer, Task(kind="language_modelling", max_tokens=32), "all_tokens")
    emptied = table.set_column(0, "text", [["", SENTENCES[1][0]]])  # the first document yields no loss token
    kept = load_examples(emptied, language)
    assert kept.weights is not None
    assert np.array_equal(kept.weights, np.array([1.5], np.float32))


@pytest.mark.parametrize("weights", [[1.0, -0.5], [float("nan"), 1.0], [0.0, 0.0]])
def test_weights_that_mean_nothing_are_refused(encoder: Encoder, weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"weights (must be finite|are all 0)"):
        examples(encoder, [0, 1], weights)
