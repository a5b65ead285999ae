"""Low-rank adapters (LoRA, arXiv 2106.09685): put into a model for training, written as PEFT does, or merged.

A weight W (out, in) stays as it is and W + (alpha / rank) B A is trained through B (out, rank), zero at
first, and A (rank, in). PEFT puts them in place, so the model keeps its class and its output layer.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from engine.errors import UserError, first_line, install
from engine.model_files import save, written_whole
from engine.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from engine.spec import Retrain

ADAPTER = "default"
"""PEFT's name of the only adapter of a model."""


def lora_config(retrain: Retrain, model: transformers.PreTrainedModel) -> Any:
    """PEFT's configuration of what `retrain.lora` and `retrain.freeze_below` describe.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(f"retrain.lora needs PEFT: {install('adapters')}.") from None
    depth = model.config.get_text_config().num_hidden_layers
    if retrain.freeze_below >= depth:
        raise UserError(f"retrain.freeze_below is {retrain.freeze_below}, and the model has {depth} blocks.")
    lora = retrain.lora
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or _linear_names(model),
        layers_to_transform=list(range(retrain.freeze_below, depth)) if retrain.freeze_below else None,
    )


def _linear_names(model: transformers.PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers but the head: PEFT's all-linear, as a list.

    PEFT takes a range of layers beside a list alone.
    """
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    linear = {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and "lora_" not in name
    }
    return sorted(linear)


def add_adapters(model: transformers.PreTrainedModel, retrain: Retrain, seed: int) -> None:
    """Freeze a model and give it adapters of its own type, with the same first weights wherever it is done.

    Raises:
        UserError: no PEFT, or target_modules that the model does not have.
    """
    config = lora_config(retrain, model)
    from peft import inject_adapter_in_model

    dtype = model.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"retrain.lora does not fit the model: {first_line(error)}.") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def save_trained_adapter(
    model: transformers.PreTrainedModel,
    retrain: Retrain,
    base: str,
    target: str,
    state: dict[str, torch.Tensor],
    notes: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the adapters of a trained model, alone or merged into the base model's weights.

    Args:
        base: folder of the base model; state: the adapters' weights by name, as trained (ZeRO-3 holds the
            model's own in pieces), among others or alone; notes: further text files, name -> contents.

    Raises:
        UserError: no space or no permission.
    """
    from peft import PeftModel

    config = lora_config(retrain, model)
    config.base_model_name_or_path = base
    config.inference_mode = True
    trained = {
        "base_model.model." + name.replace(f".{ADAPTER}.", "."): tensor.float().contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }
    tokenizer = load_tokenizer(base, trust_remote_code)
    if retrain.lora.export == "adapter":
        with written_whole(target, notes) as part:
            _write(config, trained, part)
            tokenizer.save_pretrained(part)
        return
    with tempfile.TemporaryDirectory(prefix="unbake-") as folder:
        _write(config, trained, folder)
        # merged in float32 and rounded once, so that B A is not lost beside a 16-bit weight
        whole = load_model(base, torch.float32, trust_remote_code=trust_remote_code)
        merged = PeftModel.from_pretrained(whole, folder).merge_and_unload().to(model.dtype)
    save(merged, tokenizer, target, notes=notes)


def _write(config: Any, tensors: dict[str, torch.Tensor], folder: str) -> None:
    config.save_pretrained(folder)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
