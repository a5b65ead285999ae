"""Sources of models: a local folder, a Hub name, a GGUF file, packed weights, or a PEFT adapter on the base model.

Whatever it is, it becomes one folder of safetensors, so that every later stage maps tensors from disk and loads
no pickle.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from engine.errors import UserError, first_line, install
from engine.model_files import require_safetensors, save
from engine.models import load_config, load_model, load_tokenizer

CONVERTED = "converted.json"
"""Note in a converted model's folder: what it was made of."""

QUANTISED = "quantised.json"
"""Note in a dequantised model's folder: how it had been quantised."""


def resolve(
    source: str,
    target: str,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """A local folder of safetensors for a source; converted into `target` only when it must be.

    Args:
        source: folder, Hub name, .gguf file, or PEFT adapter (folder or Hub name).
        target: folder to write a converted model to (GGUF dequantised to float32, adapter merged); a
            finished conversion of the same files is used again.
        base: resolved folder of the base model, for an adapter.

    Raises:
        UserError: nothing there, no safetensors, or a broken file.
    """
    source = os.path.expanduser(source)
    if source.endswith(".gguf"):
        return _from_gguf(source, target)
    folder = os.path.abspath(source) if os.path.isdir(source) else _from_hub(source, revision)
    if os.path.isfile(f"{folder}/adapter_config.json"):
        return _merge_adapter(folder, target, base, trust_remote_code)
    require_safetensors(folder)
    packing = getattr(load_config(folder, trust_remote_code), "quantization_config", None)
    if packing and packing.get("quant_method") == "bitsandbytes":
        return _unpack(folder, target, trust_remote_code)
    return folder


def is_quantised(path: str) -> bool:
    """Whether the folder's weights are quantised, or once were, so that Delta is partly noise."""
    if os.path.isfile(os.path.join(path, QUANTISED)):
        return True
    return getattr(load_config(path), "quantization_config", None) is not None


def _origin(files: list[str], base: str | None) -> str:
    """What a conversion depends on: names, sizes and modification times of its files, and the base's folder."""
    stats = [(os.path.abspath(file), os.stat(file)) for file in sorted(files)]
    return json.dumps({"files": [[file, s.st_size, s.st_mtime_ns] for file, s in stats], "base": base})


def _converted(target: str, origin: str) -> bool:
    """Whether `target` is the finished conversion of this very origin."""
    try:
        with open(os.path.join(target, CONVERTED), encoding="utf-8") as file:
            return file.read() == origin
    except FileNotFoundError:
        return False


def _unpack(folder: str, target: str, trust_remote_code: bool) -> str:
    """A bitsandbytes folder, 8 or 4 bits, dequantised to float32 in `target`."""
    files = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")]
    origin = _origin(files, None)
    if _converted(target, origin):
        return target
    model = load_model(folder, torch.float32, {"": "cpu"}, trust_remote_code)
    packing = model.config.quantization_config.to_dict()
    model = model.dequantize(dtype=torch.float32)
    _forget_quantisation(model)
    notes = {CONVERTED: origin, QUANTISED: json.dumps(packing, default=str)}
    save(model, load_tokenizer(folder, trust_remote_code), target, notes=notes)
    return target


def _from_gguf(source: str, target: str) -> str:
    if not os.path.isfile(source):
        raise UserError(f"GGUF file {source} does not exist.")
    origin = _origin([source], None)
    if _converted(target, origin):
        return target
    folder, name = os.path.split(os.path.abspath(source))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, **_dequantised()
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"cannot read the GGUF file {source}: {first_line(error)}.") from None
    _forget_quantisation(model)
    save(model, tokenizer, target, notes={CONVERTED: origin})
    return target


def _forget_quantisation(model: transformers.PreTrainedModel) -> None:
    """transformers counts a dequantised model as quantised and refuses to save it until told otherwise."""
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _dequantised() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed where a kernel allows it; older ones know no other way."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _from_hub(name: str, revision: str | None) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {os.path.abspath(name)} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise UserError(
            f"{name} is no local folder and not to be had from the Hub ({first_line(error).removeprefix('Got: ')}): "
            "give a local folder, or mend the name or the network (unbake doctor)."
        ) from None


def _merge_adapter(adapter: str, target: str, base: str | None, trust_remote_code: bool) -> str:
    if base is None:
        raise UserError(
            f"{adapter} is a PEFT adapter: only models.finetuned may be one, on top of models.base."
        )
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(f"{adapter} is a PEFT adapter: {install('adapters')}.") from None
    files = [os.path.join(adapter, name) for name in os.listdir(adapter) if name.startswith("adapter_")]
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"the adapter {adapter} has no .safetensors file.")
    origin = _origin(files, base)
    if _converted(target, origin):
        return target
    # Merged in float32 so that Delta = B A is not rounded away before it is measured.
    model = load_model(base, torch.float32, trust_remote_code=trust_remote_code)
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter {adapter} does not fit the base model: {first_line(error)}.") from None
    save(merged, load_tokenizer(base, trust_remote_code), target, notes={CONVERTED: origin})
    return target
