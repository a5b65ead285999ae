"""A GPU computes what the CPU computes: gradients, labels, training, checkpoints, judgement."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from cluster.single_stepper import SingleStepper
from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.evaluate.task import TestSet, evaluate_model
from engine.gradients import GradientEngine, PartitionGradients
from engine.models import load_model, load_tokenizer
from engine.padding import pad
from engine.plain_stepper import train_plain
from engine.soft import soft_labels
from engine.spec import Retrain, RunSpec, Task
from engine.target import choose_target

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

CLASSIFY = {"kind": "classification", "labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24}
MODEL = {"kind": "language_modelling", "max_tokens": 24, "loss_scope": "all_tokens"}
TEXTS = [text for text, _ in tiny.sentences(200, seed=3)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.save_model(folder / "base", tied=False)
    return base, tiny.save_model(folder / "finetuned", tied=False, perturb=0.05)


def gradients(
    pair: tuple[str, str], device: str, task: dict[str, Any], **changes: Any
) -> tuple[PartitionGradients, np.ndarray]:
    """A partition's result on a device, and its rows (checkpoints, docs, dim) in float64."""
    spec = RunSpec.from_dict(
        {
            "models": {"base": pair[0], "finetuned": pair[1]},
            "corpus": {"paths": ["unused"]},
            "task": task,
            "gradients": {"dtype": "float32", "dim": 256, "checkpoints": 2, **changes},
        }
    )
    endpoints = Endpoints(*pair)
    encoder = Encoder(load_tokenizer(pair[0]), spec.task, spec.loss_scope)
    target = choose_target(spec, endpoints, encoder.label_ids)
    engine = GradientEngine(endpoints, encoder, target, spec, device)
    found = engine.run(encoder.encode(TEXTS))
    return found, found.features.astype(np.float64) * found.scale[..., None]


@pytest.mark.parametrize("layers", ["last", "all_linear"])
@pytest.mark.parametrize("projector", ["exact", "tensorsketch", "rademacher"])
@pytest.mark.parametrize("task", [CLASSIFY, MODEL], ids=["classification", "language_modelling"])
def test_gradients_agree(pair: tuple[str, str], task: dict[str, Any], projector: str, layers: str) -> None:
    here, on_cpu = gradients(pair, "cpu", task, projector=projector, layers=layers)
    there, on_gpu = gradients(pair, "cuda", task, projector=projector, layers=layers)
    assert not here.problems
    assert not there.problems
    np.testing.assert_array_equal(there.label, here.label)
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert np.abs(mine - theirs).max() <= 2e-3 * np.abs(theirs).max()
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(there.norm, here.norm, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(there.confidence, here.confidence, rtol=1e-3)
    scale = np.abs(here.alignment).max()
    np.testing.assert_allclose(there.alignment, here.alignment, atol=2e-3 * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", [CLASSIFY, MODEL], ids=["classification", "language_modelling"])
def test_a_gpu_gives_the_same_bytes_again(pair: tuple[str, str], task: dict[str, Any], dtype: str) -> None:
    (one, _), (other, _) = (gradients(pair, "cuda", task, dtype=dtype) for _ in range(2))
    for field in dataclasses.fields(PartitionGradients):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, np.ndarray):
            assert first.tobytes() == second.tobytes(), field.name


def classify(base: str) -> Encoder:
    return Encoder(load_tokenizer(base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": True},
        {"freeze_below": 1, "cache_frozen": True},
        {"activation_checkpointing": True},
        {"labels": "soft"},
        {"optimizer": "sgd", "schedule": "cosine"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_training_agrees(pair: tuple[str, str], changes: dict[str, Any]) -> None:
    retrain = Retrain(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", **changes})
    encoder = classify(pair[0])
    examples, validation = tiny.examples(encoder, 37, 0), tiny.examples(encoder, 11, 1)
    curves = []
    for device in ("cpu", "cuda"):
        given = examples
        if retrain.labels == "soft":
            teacher = load_model(pair[1], torch.float32, device)
            given = dataclasses.replace(
                examples, soft=soft_labels(teacher, examples, encoder.label_ids, 8, 470)
            )
        model = load_model(pair[0], torch.float32, device)
        curves.append(train_plain(model, given, retrain, 3, encoder.label_ids, validation)["curve"])
        assert all(parameter.device.type == device for parameter in model.parameters())
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_from_one_device_to_the_other(
    pair: tuple[str, str], tmp_path: Path, dtype: str
) -> None:
    retrain, encoder = Retrain(dtype=dtype), classify(pair[0])
    saved = SingleStepper(pair[0], retrain, encoder.label_ids, torch.device("cuda"), 0)
    padded = pad(tiny.examples(encoder, 8, 0), np.arange(8)).to(saved.device)
    for _ in range(2):
        saved.backward(saved.scores(padded)[0].mean())
        saved.step(1e-3)
    saved.save(str(tmp_path))
    for device in ("cpu", "cuda"):
        loaded = SingleStepper(pair[0], retrain, encoder.label_ids, torch.device(device), 0)
        loaded.load(str(tmp_path))
        for one, other in zip(loaded.masters, saved.masters, strict=True):
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0)
        loaded.backward(loaded.scores(padded.to(loaded.device))[0].mean())
        loaded.step(1e-3)
        assert all(torch.isfinite(master).all() for master in loaded.masters)
        loaded.close()


@pytest.mark.parametrize("below", [0, 1])
def test_judgements_agree(pair: tuple[str, str], below: int) -> None:
    encoder = classify(pair[0])
    texts, labels = zip(*tiny.sentences(80, 5), strict=True)
    test = TestSet(list(texts), np.array(labels, np.int64))
    here, there = (
        evaluate_model(load_model(pair[1], torch.float32, device), encoder, test, 512, "restricted", below)
        for device in ("cpu", "cuda")
    )
    assert here["confusion"] == there["confusion"]
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-3)
