"""LoRA: only the adapters train, and both exports have the trained model's logits."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import tiny
import torch

from engine.adapters import save_trained_adapter
from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.sources import resolve
from engine.spec import Lora, Retrain, Task

TASK = Task(labels=tiny.LABELS, max_tokens=32)
PROBE = torch.arange(20)[None]


def recipe(**changes: object) -> Retrain:
    lora = {"rank": 4, "alpha": 8.0, **changes.pop("lora", {})}
    return Retrain(
        **{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", "lora": lora, **changes}
    )


def trained(base: str, retrain: Retrain) -> tuple[torch.nn.Module, dict]:
    encoder = Encoder(load_tokenizer(base), TASK, "last_token")
    texts, labels = zip(*tiny.sentences(24), strict=True)
    examples = load_examples(pa.table({"text": list(texts), "label": list(labels)}), encoder)
    model = load_model(base, torch.float32)
    return model, train_plain(model, examples, retrain, 3, encoder.label_ids)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_the_export_has_the_trained_models_logits(family: str, export: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", family)
    retrain = recipe(lora={"export": export})
    model, result = trained(base, retrain)
    assert result["curve"][-1][1] < result["curve"][0][1], "it learns"
    target = str(tmp_path / "model")
    save_trained_adapter(model, retrain, base, target, model.state_dict(), {"training.json": "{}"})
    if export == "adapter":
        described = json.loads(Path(target, "adapter_config.json").read_text())
        assert described["r"] == 4
        assert described["base_model_name_or_path"] == base
        assert not Path(target, "config.json").exists()
    whole = resolve(target, str(tmp_path / "resolved"), base)
    assert (logits(load_model(whole, torch.float32)) - logits(model)).abs().max() < 1e-4
    assert (logits(load_model(base, torch.float32)) - logits(model)).abs().max() > 1e-2
    assert Path(target, "training.json").exists()


def test_only_adapters_train_and_none_below_freeze_below_or_off_the_target_modules(tiny_base: str) -> None:
    model, _ = trained(tiny_base, recipe(freeze_below=1, lora={"target_modules": ["q_proj", "down_proj"]}))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in names} == {"1"}
    assert {name.split(".")[4] for name in names} == {"q_proj", "down_proj"}
    assert all("lora_" in name for name in names)
    before = load_model(tiny_base, torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


def test_the_first_weights_depend_on_the_seed_alone(tiny_base: str) -> None:
    curves = []
    for _ in range(2):
        torch.rand(1)  # whatever else drew from the generator
        curves.append(trained(tiny_base, recipe())[1]["curve"])
    assert curves[0] == curves[1]


def test_a_layer_that_the_model_lacks_is_one_sentence(tiny_base: str) -> None:
    with pytest.raises(UserError, match=r"^retrain.lora does not fit the model: .*no_such_layer"):
        trained(tiny_base, recipe(lora={"target_modules": ["no_such_layer"]}))


def test_fields_that_contradict_lora_are_refused() -> None:
    for more in ({"freeze_head": True}, {"freeze_body": True}):
        with pytest.raises(ValueError, match="lora freezes all but its adapters"):
            Retrain(lora=Lora(rank=2), **more)
    with pytest.raises(ValueError, match=r"lora\.dropout needs retrain\.dropout"):
        Retrain(lora=Lora(rank=2, dropout=0.1))
