"""Trajectory fidelity: gradients are those of autograd on the whole loss, and a straight run follows the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.errors import UserError
from engine.evaluate.trajectory import mean_gradient, trajectory
from engine.examples import load_examples
from engine.losses import document_losses, label_rows
from engine.model_files import save
from engine.models import load_model, load_tokenizer
from engine.padding import pad
from engine.spec import RunSpec
from engine.target import choose_target


def spec(base: str, finetuned: str, **gradients: object) -> RunSpec:
    return RunSpec.from_dict(
        {
            "models": {"base": base, "finetuned": finetuned},
            "corpus": {"paths": ["none"]},
            "task": {"labels": tiny.LABELS, "max_tokens": 32},
            "gradients": gradients,
        }
    )


@pytest.fixture(scope="module")
def examples(tiny_base: str):
    encoder = Encoder(load_tokenizer(tiny_base), spec("a", "b").task, "last_token")
    texts, labels = zip(*tiny.sentences(12), strict=True)
    return encoder, load_examples(pa.table({"text": list(texts), "label": list(labels)}), encoder)


@pytest.mark.parametrize("layers", ["last", "all_linear"])
def test_the_mean_gradient_is_autograds_of_the_whole_loss(
    layers: str, tiny_base: str, tiny_finetuned: str, examples, tmp_path: Path
) -> None:
    untied = tiny.save_model(tmp_path / "untied", tied=False)
    other = tiny.save_model(tmp_path / "other", tied=False, perturb=0.02)
    encoder, documents = examples
    settings = spec(untied, other, layers=layers)
    target = choose_target(settings, Endpoints(untied, other), encoder.label_ids)
    model = load_model(untied, torch.float32)
    found = mean_gradient(model, documents, target, label_rows(encoder), tokens_per_batch=64)
    model = load_model(untied, torch.float32)
    document_losses(model, pad(documents, np.arange(12)), label_rows(encoder)).mean().backward()
    assert len(found) == len(target.layers)
    for layer in target.layers:
        whole = model.get_parameter(layer.name).grad
        expected = whole[encoder.label_ids] if layer.name == target.head else whole
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-4, atol=1e-7)


def test_a_tied_heads_gradient_is_of_its_output_side_alone(
    tiny_base: str, tiny_finetuned: str, examples
) -> None:
    encoder, documents = examples
    target = choose_target(
        spec(tiny_base, tiny_finetuned), Endpoints(tiny_base, tiny_finetuned), encoder.label_ids
    )
    model = load_model(tiny_base, torch.float32)
    found = mean_gradient(model, documents, target, label_rows(encoder), tokens_per_batch=4096)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        states = model.base_model(input_ids=pad(documents, np.arange(12)).input_ids).last_hidden_state
    last = states[torch.arange(12), torch.from_numpy(documents.lengths) - 1]
    logits = last @ head[encoder.label_ids].T
    wanted = torch.tensor([label for _, label in tiny.sentences(12)])
    error = (torch.softmax(logits, 1) - torch.nn.functional.one_hot(wanted, 4)) / 12
    torch.testing.assert_close(found[target.head], (error.T @ last).detach(), rtol=1e-4, atol=1e-7)


def test_recorded_points_of_the_straight_line_are_the_synthetic_checkpoints(
    tiny_base: str, tiny_finetuned: str, examples, tmp_path: Path
) -> None:
    encoder, documents = examples
    endpoints = Endpoints(tiny_base, tiny_finetuned)
    target = choose_target(spec(tiny_base, tiny_finetuned), endpoints, encoder.label_ids)
    model = load_model(tiny_base, torch.float32)
    for fraction in (0.25, 0.75):
        endpoints.interpolate(model, fraction)
        save(model, load_tokenizer(tiny_base), str(tmp_path / f"step-{fraction}"))
    recorded = [str(tmp_path / "step-0.25"), str(tmp_path / "step-0.75"), tiny_finetuned]
    found = trajectory(endpoints, recorded, target, documents, label_rows(encoder), 4096)
    assert [row["way"] for row in found["recorded"]] == pytest.approx([0.25, 0.75, 1.0], abs=1e-5)
    assert [row["direction"] for row in found["recorded"]] == pytest.approx([1, 1, 1], abs=1e-5)
    synthetic = {row["fraction"]: row["cosine"] for row in found["synthetic"]}
    for row, fraction in zip(found["recorded"], (0.25, 0.75, 1.0), strict=True):
        assert row["cosine"] == pytest.approx(synthetic[fraction], abs=1e-4)
    assert [*synthetic] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_recorded_model_of_another_shape_is_refused(
    tiny_base: str, tiny_finetuned: str, examples, tmp_path: Path
) -> None:
    encoder, documents = examples
    wide = tiny.save_model(tmp_path / "wide", hidden=64)
    endpoints = Endpoints(tiny_base, tiny_finetuned)
    target = choose_target(spec(tiny_base, tiny_finetuned), endpoints, encoder.label_ids)
    with pytest.raises(UserError, match="wide does not fit"):
        trajectory(endpoints, [wide], target, documents, label_rows(encoder), 4096)
