"""Spread and packed models give the gradients that plain ones give, at every checkpoint, on a CPU's devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from engine import placement, sources
from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.errors import UserError
from engine.gradients import GradientEngine, PartitionGradients
from engine.model_files import save
from engine.models import load_model, load_tokenizer
from engine.placement import loading_options, packing_error
from engine.sources import is_quantised, resolve
from engine.spec import RunSpec
from engine.target import choose_target

TEXTS = [text for text, _ in tiny.sentences(12, seed=3)]
HALF = dict.fromkeys("model.embed_tokens model.rotary_emb model.layers.0 model.norm lm_head".split(), "cpu")
ON_DISK = {**HALF, "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    return (
        tiny.save_model(folder / "base", tied=False, hidden=64),
        tiny.save_model(folder / "finetuned", tied=False, hidden=64, perturb=0.02),
    )


def make_engine(
    pair: tuple[str, str], device: Any = "cpu", load_in: str = "none", **gradients: Any
) -> GradientEngine:
    spec = RunSpec.from_dict(
        {
            "models": {"base": pair[0], "finetuned": pair[1], "load_in": load_in},
            "corpus": {"paths": ["unused"]},
            "task": {"kind": "language_modelling", "max_tokens": 24},
            "gradients": {"dtype": "float32", "projector": "tensorsketch", "dim": 512, **gradients},
        }
    )
    endpoints = Endpoints(*pair)
    encoder = Encoder(load_tokenizer(pair[0]), spec.task, spec.loss_scope)
    return GradientEngine(endpoints, encoder, choose_target(spec, endpoints, []), spec, device)


def run(engine: GradientEngine) -> PartitionGradients:
    return engine.run(engine.encoder.encode(TEXTS))


@pytest.mark.parametrize("layers", ["last", "all_linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_spread_by_accelerate_gives_the_same_bytes(
    pair: tuple[str, str], layers: str, dtype: str
) -> None:
    fields: dict[str, Any] = {"layers": layers, "dtype": dtype, "checkpoints": [0.5, 1.0]}
    for device, alone in ((placement.SPREAD, tiny.DEVICE), ({"": "cpu"}, "cpu")):
        plain = run(make_engine(pair, alone, **fields))
        spread = run(make_engine(pair, device, **fields))
        np.testing.assert_array_equal(spread.features, plain.features)
        np.testing.assert_array_equal(spread.scale, plain.scale)
        assert np.isfinite(plain.features).all()
        assert (plain.scale > 0).all()


@pytest.mark.parametrize("layers", ["last", "all_linear"])
def test_weights_that_accelerate_brings_in_for_a_pass_give_the_same_bytes(
    pair: tuple[str, str], layers: str
) -> None:
    engine = make_engine(pair, ON_DISK, layers=layers)
    assert next(engine.model.model.layers[1].parameters()).is_meta  # not in memory between passes
    plain, spread = run(make_engine(pair, layers=layers)), run(engine)
    np.testing.assert_array_equal(spread.features, plain.features)
    np.testing.assert_array_equal(spread.scale, plain.scale)


def test_checkpoints_of_weights_on_disk_are_refused_by_name(pair: tuple[str, str]) -> None:
    engine = make_engine(pair, ON_DISK, checkpoints=2)
    with pytest.raises(UserError, match=r"model\.layers\.1\..* lies on disk.*gradients\.checkpoints=1"):
        run(engine)


@pytest.mark.parametrize(("load_in", "near"), [("8bit", 0.2), ("4bit", 1e-3)])
@pytest.mark.parametrize("layers", ["last", "all_linear"])
def test_packed_models_give_the_gradients_of_their_own_weights(
    pair: tuple[str, str], tmp_path: Path, load_in: str, near: float, layers: str
) -> None:
    """4 bits: the plain model of the dequantised weights; 8 bits round what enters a layer, too."""
    pytest.importorskip("bitsandbytes")
    engine = make_engine(pair, load_in=load_in, layers=layers)
    packed = [name for name, p in engine.model.named_parameters() if placement.is_packed(p)]
    assert len(packed) == 14
    assert "lm_head.weight" not in packed
    found = run(engine)
    assert not found.problems
    model = engine.model.dequantize(dtype=torch.float32)
    sources._forget_quantisation(model)
    save(model, load_tokenizer(pair[0]), str(tmp_path / "plain"))
    plain = run(make_engine((pair[0], str(tmp_path / "plain")), layers=layers))
    rows = [r.features[0].astype(np.float64) * r.scale[0][:, None] for r in (found, plain)]
    assert np.linalg.norm(rows[0] - rows[1]) <= near * np.linalg.norm(rows[1])


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_packed_checkpoints_are_those_of_the_weights_between(pair: tuple[str, str], load_in: str) -> None:
    """theta_j is interpolated first and packed then; going back gives the packed model that was loaded."""
    pytest.importorskip("bitsandbytes")
    model = load_model(pair[1], torch.float32, load_in=load_in)
    ids = torch.arange(24).reshape(2, 12) * 17 % 300
    with torch.no_grad():
        before = model(input_ids=ids).logits
        endpoints = Endpoints(*pair)
        endpoints.interpolate(model, 0.0)
        base = load_model(pair[0], torch.float32, load_in=load_in)
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-3
        endpoints.interpolate(model, 1.0)
        torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_the_share_of_packing_noise_is_what_packing_changes(pair: tuple[str, str]) -> None:
    pytest.importorskip("bitsandbytes")
    engine = make_engine(pair, layers="all_linear")
    norms = {
        load_in: engine.target.packing(engine.endpoints, load_in) for load_in in ("none", "8bit", "4bit")
    }
    assert norms["none"] == 0
    assert 0 < norms["8bit"] < norms["4bit"]
    plain = load_model(pair[1], torch.float32)
    packed = load_model(pair[1], torch.float32, load_in="4bit").dequantize(dtype=torch.float32)
    names = {layer.name for layer in engine.target.layers}
    weights = dict(packed.named_parameters())
    square = sum(
        float((p - weights[n]).detach().square().sum()) for n, p in plain.named_parameters() if n in names
    )
    assert norms["4bit"] == pytest.approx(square**0.5, rel=1e-3)
    matrix = torch.tensor([[127.0, 0.25, -1.5], [0.0, 0.0, 0.0]])
    assert packing_error(matrix, "8bit") == pytest.approx(0.25**2 + 0.5**2)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_an_endpoint_stored_packed_is_dequantised_and_remembered_as_such(
    pair: tuple[str, str], tmp_path: Path, load_in: str
) -> None:
    pytest.importorskip("bitsandbytes")
    packed = load_model(pair[1], torch.float32, load_in=load_in)
    packed.save_pretrained(tmp_path / "packed")
    load_tokenizer(pair[1]).save_pretrained(tmp_path / "packed")
    target = resolve(str(tmp_path / "packed"), str(tmp_path / "plain"))
    assert target == str(tmp_path / "plain")
    assert is_quantised(target)
    assert json.loads((tmp_path / "plain/config.json").read_text()).get("quantization_config") is None
    found = dict(load_model(target, torch.float32).named_parameters())
    expected = dict(packed.dequantize(dtype=torch.float32).named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    endpoints = Endpoints(pair[0], target)
    assert len(endpoints.changed()) > 14


def test_what_cannot_be_packed_is_one_sentence(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = (tiny.save_model(tmp_path / "a", "gpt2"), tiny.save_model(tmp_path / "b", "gpt2", perturb=0.1))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no plain linear layers to pack"):
        make_engine(gpt2, load_in="8bit")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: .* -m pip install 'unbake\[quantization\]'"):
        loading_options("cpu", "4bit", torch.float32)


def test_a_model_larger_than_the_gpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
) -> None:
    model = load_model(pair[1], torch.float32, ON_DISK)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"does not fit into the GPUs of one worker: raise extract\.gpus"):
        placement.check_placed(model, placement.SPREAD)


def test_a_plain_device_needs_no_options() -> None:
    assert loading_options("cpu", "none", torch.float32) == {}
    assert loading_options(placement.SPREAD, "none", torch.float32) == {"device_map": "auto"}


def test_a_packed_model_is_loaded_onto_its_device() -> None:
    pytest.importorskip("bitsandbytes")
    packed = loading_options("cuda", "4bit", torch.bfloat16)
    assert packed["device_map"] == {"": "cuda"}
    assert isinstance(packed["quantization_config"], transformers.BitsAndBytesConfig)
