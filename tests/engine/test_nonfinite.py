"""Gradients that are not finite: the document is quarantined, its batch is not, and a broken model is said to be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.errors import UserError
from engine.gradients import GradientEngine, PartitionGradients
from engine.models import load_tokenizer
from engine.spec import RunSpec
from engine.target import choose_target

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models whose input embedding is their own: a broken row of it reaches only documents with that token."""
    folder = tmp_path_factory.mktemp("untied")
    return (
        tiny.save_model(folder / "base", tied=False),
        tiny.save_model(folder / "finetuned", tied=False, perturb=0.02),
    )


def broken(model: str, folder: Path, change: Any) -> str:
    """A copy of a model with something changed in its weights."""
    copy = Path(shutil.copytree(model, folder))
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def make_engine(models: tuple[str, str], **sections: dict[str, Any]) -> tuple[GradientEngine, Encoder]:
    spec = RunSpec.from_dict(
        {
            "models": {"base": models[0], "finetuned": models[1]},
            "corpus": {"paths": ["x.jsonl"]},
            "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
            **sections,
            "gradients": {"dtype": "float32", "dim": 64, **sections.get("gradients", {})},
        }
    )
    endpoints = Endpoints(*models)
    encoder = Encoder(load_tokenizer(models[0]), spec.task, spec.loss_scope)
    target = choose_target(spec, endpoints, encoder.label_ids)
    return GradientEngine(endpoints, encoder, target, spec, tiny.DEVICE), encoder


def run(models: tuple[str, str], texts: list[str], **sections: dict[str, Any]) -> PartitionGradients:
    engine, encoder = make_engine(models, **sections)
    return engine.run(encoder.encode(texts))


LANGUAGE = {"task": {"kind": "language_modelling", "max_tokens": 24}}


@pytest.mark.parametrize(
    "sections",
    [
        {"gradients": {"projector": "exact"}},
        {"gradients": {"projector": "tensorsketch", "checkpoints": 2}},
        {"gradients": {"projector": "rademacher"}},
        {"gradients": {"projector": "tensorsketch", "layers": "all_linear"}},
        {"gradients": {"projector": "rademacher", "layers": "mlp"}},
        {"gradients": {"projector": "tensorsketch"}, **LANGUAGE},
        {"gradients": {"projector": "tensorsketch", "layers": "all_linear"}, **LANGUAGE},
    ],
    ids=str,
)
def test_a_document_whose_gradient_is_not_finite_costs_no_other_a_bit(
    sections: dict[str, Any], untied: tuple[str, str], tmp_path: Path
) -> None:
    """The broken row is that of a token some documents have; all share batches, and all others keep their bytes."""
    texts = [text for text, _ in tiny.sentences(60, 2)]
    token = load_tokenizer(untied[0])(" striker", add_special_tokens=False)["input_ids"][0]
    hit = [i for i, text in enumerate(texts) if " striker" in text]
    assert 1 < len(hit) < 30

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights[EMBEDDING][token, 3] = float("nan")

    sound = run(untied, texts, **sections)
    poisoned = run((untied[0], broken(untied[1], tmp_path / "nan", poison)), texts, **sections)
    assert poisoned.problems == dict.fromkeys(hit, "non-finite gradient")
    assert not sound.problems
    good = [i for i in range(60) if i not in hit]
    for name in ("features", "scale", "loss"):
        np.testing.assert_array_equal(getattr(poisoned, name)[:, good], getattr(sound, name)[:, good], name)
    np.testing.assert_array_equal(poisoned.label[good], sound.label[good])
    assert (poisoned.features[:, hit] == 0).all()
    assert (poisoned.scale[:, hit] == 0).all()
    assert np.isfinite(poisoned.confidence).all()


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1e38), ("float16", 1e6)])
def test_infinite_logits_are_quarantined(
    dtype: str, factor: float, untied: tuple[str, str], tmp_path: Path
) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] *= factor
        weights["lm_head.weight"] *= factor

    models = (untied[0], broken(untied[1], tmp_path / "large", enlarge))
    texts = [text for text, _ in tiny.sentences(8)]
    found = run(models, texts, gradients={"dtype": dtype})
    assert found.problems == dict.fromkeys(range(8), "non-finite gradient")


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_on_the_chosen_layers_are_named(
    side: int, value: float, untied: tuple[str, str], tmp_path: Path
) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][7:9, 3] = value

    models = list(untied)
    models[side] = broken(untied[side], tmp_path / "broken", poison)
    engine, _ = make_engine((models[0], models[1]), gradients={"projector": "tensorsketch"}, **LANGUAGE)
    with pytest.raises(UserError, match=r"^lm_head.weight of .*broken holds 2 weights that are not finite"):
        engine.target.project(engine.endpoints)
