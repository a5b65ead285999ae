"""Endpoints and synthetic checkpoints: models that do not match are refused; theta_j never depends on the way."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import Endpoints, added_tokens
from engine.errors import UserError
from engine.models import load_model, load_tokenizer
from engine.target import rounding_noise


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def copy(source: str, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.fixture
def pair(tiny_base: str, tiny_finetuned: str, tmp_path: Path) -> tuple[Path, Path]:
    return copy(tiny_base, tmp_path / "base"), copy(tiny_finetuned, tmp_path / "finetuned")


def refusal(base: Path, finetuned: Path) -> str:
    with pytest.raises(UserError) as caught:
        Endpoints(str(base), str(finetuned))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_refused_by_the_field_that_differs(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "gpt2", "gpt2")
    assert "model_type is llama" in refusal(pair[0], tmp_path / "gpt2")
    tiny.save_model(tmp_path / "wide", hidden=48)
    assert "hidden_size is 32" in refusal(pair[0], tmp_path / "wide")


def test_another_tokenizer_is_refused_by_its_first_token(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    path.write_text(json.dumps(tokenizer))
    assert "their tokenizers differ (2 tokens, the first '!'" in refusal(*pair)


def test_weights_without_a_tokenizer_use_the_base_models(pair: tuple[Path, Path]) -> None:
    for file in pair[1].glob("tokenizer*"):
        file.unlink()
    assert Endpoints(str(pair[0]), str(pair[1])).vocab == len(tiny.tokenizer())


def test_another_shape_or_a_missing_tensor_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, file, {"format": "pt"})
    assert f"{name} has shape" in refusal(*pair)
    save_file({n: w for n, w in weights.items() if n != name}, file, {"format": "pt"})
    message = refusal(*pair)
    assert f"only {pair[0]} has the tensor {name}" in message


def test_quantised_tensors_are_refused_by_name(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} .* is stored as I8 \(quantised\)"):
        list(Endpoints(str(pair[0]), str(pair[1])).delta(name))


def test_added_tokens_are_tolerated_and_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(str(pair[1]), torch.float32)
    tokenizer = load_tokenizer(str(pair[1]))
    tokenizer.add_tokens(["<|user|>", "<|bot|>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    endpoints = Endpoints(str(pair[0]), str(tmp_path / "chat"))
    n = len(tiny.tokenizer())
    assert endpoints.vocab == n
    assert added_tokens(str(pair[0]), str(tmp_path / "chat")) == ["<|user|>", "<|bot|>"]
    name = "model.embed_tokens.weight"
    delta = torch.cat([chunk for _, chunk in endpoints.delta(name)])
    theta_0, theta_f = (load_file(Path(p) / "model.safetensors")[name] for p in (pair[0], tmp_path / "chat"))
    torch.testing.assert_close(delta, theta_0 - theta_f[:n], rtol=0, atol=0)
    working = load_model(str(tmp_path / "chat"), torch.float32)
    endpoints.interpolate(working, 0.0)
    weight = working.get_input_embeddings().weight
    torch.testing.assert_close(weight[:n], theta_0, rtol=0, atol=0)
    torch.testing.assert_close(weight[n:], theta_f[n:], rtol=0, atol=0)


def test_a_tied_base_and_an_untied_finetuned_model_are_compared_head_to_head(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "untied", tied=False, seed=3)
    endpoints = Endpoints(str(pair[0]), str(tmp_path / "untied"))
    tied = load_file(pair[0] / "model.safetensors")["model.embed_tokens.weight"]
    head = load_file(tmp_path / "untied/model.safetensors")["lm_head.weight"]
    delta = torch.cat([c for _, c in endpoints.delta("lm_head.weight", "model.embed_tokens.weight")])
    torch.testing.assert_close(delta, tied - head, rtol=0, atol=0)
    model = load_model(str(tmp_path / "untied"), torch.float32)
    endpoints.interpolate(model, 0.5)
    torch.testing.assert_close(model.lm_head.weight, (tied + head) / 2)
    torch.testing.assert_close(endpoints_at(endpoints, model, 0.0)["lm_head.weight"], tied, rtol=0, atol=0)


def test_an_untied_base_and_a_tied_finetuned_model_do_not_match(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "untied", tied=False)
    assert "ties it to the input embedding" in refusal(tmp_path / "untied", pair[1])


def test_changed_layers_come_with_their_share_largest_first(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "model.safetensors"
    weights = load_file(pair[0] / "model.safetensors")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    for name, share in zip(names, (0.1, 0.5), strict=True):
        weights[name] = weights[name] * (1 + share)
    save_file(weights, file, {"format": "pt"})
    changed = Endpoints(str(pair[0]), str(pair[1])).changed()
    assert list(changed) == names[::-1]
    assert list(changed.values()) == pytest.approx([0.5, 0.1], rel=1e-5)


@pytest.mark.parametrize("levels", [16, 256])
def test_the_noise_of_quantised_weights_is_estimated_from_their_grid(levels: int) -> None:
    """Rounded block by block to a grid as GGUF's Q4_1 (16 levels) and Q8_0 do, the error has the norm expected."""
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = weights.reshape(-1, 32)
    low, high = blocks.min(1, keepdim=True).values, blocks.max(1, keepdim=True).values
    step = ((high - low) / (levels - 1)).half().double()
    rounded = (((blocks - low) / step).round() * step + low.half()).float().reshape(256, 256)
    error = float((rounded.double() - weights).square().sum())
    assert rounding_noise(rounded) == pytest.approx(error, rel=0.25 if levels == 16 else 1)
    assert rounding_noise(weights.float()) < 0.01 * error or levels == 256


def endpoints_at(endpoints: Endpoints, model: Any, fraction: float) -> dict[str, torch.Tensor]:
    endpoints.interpolate(model, fraction)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_the_same_bits_whatever_was_there_before(
    pair: tuple[Path, Path], dtype: torch.dtype
) -> None:
    endpoints = Endpoints(str(pair[0]), str(pair[1]))
    model = load_model(str(pair[1]), dtype)
    fractions = (1.0, 0.25, 0.75, 0.0)
    first = {f: endpoints_at(endpoints, model, f) for f in fractions}
    for order in itertools.permutations(fractions):
        for f in order:
            for name, value in endpoints_at(endpoints, model, f).items():
                assert torch.equal(value, first[f][name]), (name, f, order)
    ends = [load_model(str(path), dtype).state_dict() for path in pair]
    for f, end in zip((0.0, 1.0), ends, strict=True):
        assert all(torch.equal(first[f][name], end[name]) for name in end)


MEMORY = """
import sys, threading, torch
sys.path.insert(0, {tests!r})
import engine.checkpoints as c
from engine.models import load_model
torch.set_num_threads(1)
c.CHUNK_BYTES = 1 << 20
endpoints = c.Endpoints({base!r}, {finetuned!r})
model = load_model({finetuned!r}, torch.float32)
for p in model.parameters():
    p.data = p.data.clone()  # the loaded ones are pages of the file until they are written to

def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

before, peak, stop = private(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, private())
watcher = threading.Thread(target=watch); watcher.start()
for fraction in (0.75, 0.5, 0.25, 0.0, 1.0):
    endpoints.interpolate(model, fraction)
stop.set(); watcher.join()
print(sum(p.numel() for p in model.parameters()) * 4, peak - before)
"""


def test_interpolation_never_holds_a_second_model(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", hidden=896)
    finetuned = tiny.save_model(tmp_path / "finetuned", hidden=896, perturb=0.01)
    code = MEMORY.format(tests=str(Path(tiny.__file__).parent), base=base, finetuned=finetuned)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    size, more = map(int, done.stdout.split())
    assert size > 50e6
    assert more < 0.25 * size
