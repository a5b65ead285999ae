"""Recipes: each is a valid spec, its DeepSpeed configuration can be derived, and its text follows its fields."""

from __future__ import annotations

from pathlib import Path

import pytest

import jobs
from cluster.deepspeed_config import deepspeed_config
from engine.recipe import passes_per_step
from engine.spec import RunSpec

FOLDER = Path(jobs.__file__).parent / "recipes"
RECIPES = [FOLDER / "gpt2-medium-classification.yaml", *sorted(FOLDER.glob("*-sft.yaml"))]
PARAMETERS = {"gpt2-medium": 0.355e9, "llama-3.2-1b": 1.24e9, "llama-3.2-3b": 3.21e9, "llama-3.1-8b": 8.03e9}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_spec_that_replays(path: Path) -> None:
    spec = RunSpec.from_yaml(path.read_text(), str(path))
    assert RunSpec.from_yaml(spec.to_yaml()) == spec
    workers = spec.retrain.workers_max or spec.retrain.workers
    passes = passes_per_step(10**6, spec.retrain, workers)
    assert passes[0] * passes[1] * workers == spec.retrain.batch_size, "no worker computes a document in vain"
    config = deepspeed_config(spec.retrain, passes, "bfloat16")
    assert config["zero_optimization"]["stage"] == spec.retrain.zero_stage


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("gpt2-medium-classification", "6.4 GB"),
        ("llama-3.2-1b-sft", "22.3 GB"),
        ("llama-3.2-3b-sft", "17.7 GB"),
        ("llama-3.1-8b-sft", "16.1 GB"),
    ],
)
def test_the_memory_in_its_text_is_what_its_fields_mean(name: str, held: str) -> None:
    (path,) = (path for path in RECIPES if path.stem == name)
    retrain = RunSpec.from_yaml(path.read_text()).retrain
    parameters = next(count for model, count in PARAMETERS.items() if name.startswith(model))
    workers = retrain.workers_max or retrain.workers
    bytes_each = {1: 18.0, 2: 2 + 14 / workers, 3: 16 / workers}[
        retrain.zero_stage if retrain.needs_deepspeed else 1
    ]
    assert f"{bytes_each * parameters / 1e9:.1f} GB" == held
    assert held in path.read_text()
