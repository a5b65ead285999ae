"""Packing: a packed batch has the loss and the gradient of the unpacked one, or the model is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.losses import document_losses
from engine.models import load_model, load_tokenizer
from engine.padding import pack, pad
from engine.plain_stepper import train_plain
from engine.ragged import IGNORE, Ragged
from engine.spec import Retrain, Task


@pytest.fixture(scope="module")
def families(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {"llama": tiny_base, "gpt2": tiny.save_model(folder / "gpt2", "gpt2")}


@pytest.fixture(scope="module")
def examples(tiny_base: str) -> Ragged:
    task = Task(kind="language_modelling", max_tokens=32)
    encoder = Encoder(load_tokenizer(tiny_base), task, "all_tokens")
    weights = np.linspace(0.5, 1.5, 13, dtype=np.float32)
    return load_examples(
        pa.table({"text": [text for text, _ in tiny.sentences(13)], "weight": weights}), encoder
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_batch_has_the_losses_and_the_gradient_of_the_unpacked_one(
    families: dict[str, str], examples: Ragged, family: str
) -> None:
    members = np.arange(13)
    unpacked, packed = pad(examples, members), pack(examples, members, 32)
    assert len(packed.input_ids) < len(unpacked.input_ids), "several documents to a row"
    assert packed.input_ids.numel() < unpacked.input_ids.numel(), "less padding"
    results = []
    for batch in (unpacked, packed):
        model = load_model(families[family], torch.float32)
        losses = document_losses(model, batch)
        (losses * batch.weights).mean().backward()
        results.append((losses.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0].sort().values, results[1][0].sort().values)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_training_on_packed_documents_follows_the_unpacked_training(tiny_base: str, examples: Ragged) -> None:
    curves = []
    for packing in (False, True):
        model = load_model(tiny_base, torch.float32)
        recipe = Retrain(
            epochs=2, batch_size=6, micro_batch_size=4, learning_rate=1e-2, dtype="float32", packing=packing
        )
        curves.append(train_plain(model, examples, recipe, 0)["curve"])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_model_in_which_packed_documents_see_each_other_is_refused(
    tiny_base: str, examples: Ragged
) -> None:
    """One that takes no notice of position ids, and one that does not know them."""
    recipe = Retrain(epochs=1, batch_size=6, dtype="float32", packing=True)
    for forward, message in [
        (lambda given: {k: v for k, v in given.items() if k != "position_ids"}, "see each other"),
        (lambda given: {**given, "unheard_of": given["position_ids"]}, None),
    ]:
        model = load_model(tiny_base, torch.float32)
        inner = model.base_model.forward
        if message is None:

            def refuses(input_ids: torch.Tensor, use_cache: bool, inner: object = inner) -> object:
                return inner(input_ids=input_ids, use_cache=use_cache)  # type: ignore[operator]

            model.base_model.forward, message = refuses, "takes no position ids"
        else:

            def deaf(inner: object = inner, forward: object = forward, **given: object) -> object:
                return inner(**forward(given))  # type: ignore[operator]

            model.base_model.forward = deaf
        with pytest.raises(UserError, match=f"packing.*{message}"):
            train_plain(model, examples, recipe, 0)


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@given(lengths, st.integers(1, 40), st.data())
@settings(deadline=None)
def test_packing_keeps_every_token_of_every_document_once_and_counts_positions_anew(
    lengths: list[int], length: int, data: st.DataObject
) -> None:
    total = sum(lengths)
    tokens = np.arange(1, total + 1, dtype=np.int32)
    targets = np.where(np.arange(total) % 3 == 1, IGNORE, tokens + 1000).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    ragged = Ragged(tokens, targets, offsets, np.arange(len(lengths), dtype=np.float32))
    members = np.array(data.draw(st.permutations(range(len(lengths)))), np.int64)
    batch = pack(ragged, members, length)
    real = batch.input_ids > 0
    assert sorted(batch.input_ids[real].tolist()) == tokens.tolist()
    assert (batch.targets[~real] == IGNORE).all()
    assert batch.input_ids.shape[1] <= max(length, *lengths)
    assert batch.position_ids is not None
    seen = []
    for row, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        starts = [c for c, (token, at) in enumerate(zip(row, positions, strict=True)) if token and at == 0]
        for start in starts:
            document = int(np.searchsorted(offsets, row[start] - 1, "right")) - 1
            stop = start + lengths[document]
            assert row[start:stop] == tokens[offsets[document] : offsets[document + 1]].tolist()
            assert positions[start:stop] == list(range(lengths[document]))
            seen.append(document)
    assert sorted(seen) == list(range(len(lengths)))
    assert batch.weights.tolist() == [float(d) for d in seen], "documents are counted along the rows"
    assert batch.lengths.tolist() == [lengths[d] for d in seen]
    kept = [int((targets[offsets[d] : offsets[d + 1]] != IGNORE).sum()) for d in seen]
    assert batch.counts.tolist() == kept
