"""Tokenizer, configuration and weights of a model folder, on the device or devices that compute."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from engine.errors import UserError, first_line
from engine.model_files import require_safetensors
from engine.placement import Place, check_placed, loading_options
from engine.spec import LoadIn


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a spec's dtype; auto is bfloat16, the type published models are trained in."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return torch.bfloat16 if name == "auto" else names[name]


def load_tokenizer(path: str, trust_remote_code: bool = False, template_of: str | None = None) -> Any:
    """The fast tokenizer of a model folder; UserError when there is none.

    Args:
        template_of: folder of a model whose chat template serves where `path` has none, as with a base model
            whose fine-tuned version alone was made for chats.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {path} has no fast version (tokenizer.json); convert it first.")
    if template_of is not None and not tokenizer.chat_template:
        names = ("tokenizer_config.json", "chat_template.jinja")
        if any(os.path.isfile(os.path.join(template_of, name)) for name in names):
            tokenizer.chat_template = load_tokenizer(template_of, trust_remote_code).chat_template
    return tokenizer


def load_config(path: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder; UserError when it is unreadable or of an unknown architecture."""
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise UserError(f"cannot read the model configuration in {path}: {first_line(error)}.") from None


def load_model(
    path: str,
    dtype: torch.dtype = torch.bfloat16,
    device: Place = "cpu",
    trust_remote_code: bool = False,
    load_in: LoadIn = "none",
) -> transformers.PreTrainedModel:
    """A causal language model in evaluation mode, from a folder of safetensors.

    Args:
        device: a device, "auto" (spread over all devices of this process) or a device_map.
        load_in: weights of linear layers packed to 8 or 4 bits by bitsandbytes, the head apart.

    Raises:
        UserError: no config, no safetensors, a corrupt file, or an architecture transformers does not know.
    """
    require_safetensors(path)
    load_config(path, trust_remote_code)
    placed = loading_options(device, load_in, dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="sdpa",
            **placed,
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError) as error:
        raise UserError(f"cannot load the model in {path}: {first_line(error)}.") from None
    if not placed:
        return model.to(device).eval()
    check_placed(model, device)
    return model.eval()
