"""Where a working model's weights lie: on one device, spread over several, or packed to 8 or 4 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.errors import UserError, install
from engine.spec import LoadIn

SPREAD = "auto"
"""Device of a model that is spread over all devices this process sees, by accelerate's device_map."""

BLOCK_4BIT = 64
"""Weights that share a scale in bitsandbytes' 4-bit types."""

Place = str | torch.device | dict[str, Any]


def loading_options(place: Place, load_in: LoadIn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model that is spread or packed; empty for one plain device.

    Args:
        place: a device, SPREAD, or a device_map (module name -> device).

    Raises:
        UserError: packed weights without bitsandbytes.
    """
    if load_in == "none":
        return {"device_map": place} if place == SPREAD or isinstance(place, dict) else {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"models.load_in={load_in} needs bitsandbytes: {install('quantization')}.")
    where = place if place == SPREAD or isinstance(place, dict) else {"": place}
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"device_map": where, "quantization_config": config}


def check_placed(model: transformers.PreTrainedModel, place: Place) -> None:
    """Make a placed model fit for gradients.

    Raises:
        UserError: the GPUs are too small, so that accelerate left weights in main memory or on disk.
    """
    where = set(getattr(model, "hf_device_map", {}).values())
    if place == SPREAD and torch.cuda.is_available() and where & {"cpu", "disk"}:
        raise UserError(
            "the model does not fit into the GPUs of one worker: raise extract.gpus_per_worker, or set "
            "models.load_in=8bit or 4bit."
        )
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for the CPU at the first inference, and they have no backward then.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def entry_device(model: transformers.PreTrainedModel, place: Place) -> torch.device:
    """Where batches go: to the plain device, or to that of a placed model's input embedding."""
    if place == SPREAD or isinstance(place, dict):
        return model.get_input_embeddings().weight.device
    return torch.device(place)


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter holds bitsandbytes' integers rather than weights."""
    return not parameter.is_floating_point()


def weights(model: transformers.PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and the parameter, to be changed in place.

    Raises:
        UserError: it lies on disk, where it cannot be changed.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{name} lies on disk, so checkpoints between base and finetuned cannot be made: use "
                "gradients.checkpoints=1, more memory, or models.load_in."
            )
        yield name, parameter


@torch.no_grad()
def pack(model: transformers.PreTrainedModel, name: str, value: Tensor) -> None:
    """Replace a packed weight by the packed form of `value`, (rows, cols) float, on the same device.

    As in loading, the value is rounded to the model's type first.
    """
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    module = model.get_submodule(name.rpartition(".")[0])
    old, new = module.weight, value.to(model.dtype).contiguous()
    if isinstance(old, Params4bit):
        packed: Any = Params4bit(
            new,
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            blocksize=old.blocksize,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
    else:
        packed = Int8Params(new.cpu().to(torch.float16), requires_grad=False, has_fp16_weights=False)
    module.weight = packed.to(old.device)


def packing_error(weights: Tensor, load_in: LoadIn) -> float:
    """Squared norm of what packing changes in weights (rows, cols) float32."""
    if load_in == "none":
        return 0.0
    if load_in == "8bit":
        step = weights.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return float((weights - (weights / step).round() * step).double().square().sum())
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weights.contiguous(), blocksize=BLOCK_4BIT, quant_type="nf4")
    return float((weights - functional.dequantize_4bit(packed, state)).double().square().sum())
