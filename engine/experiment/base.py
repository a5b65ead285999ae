"""The base model of an experiment: as it is, or rounded to another type and with an output layer of its own.

With tied embeddings the output layer's weight is the input embedding's too, so that training the one moves the other
and no block's output is constant. Untied, what the frozen lower blocks give can be kept (`engine.frozen`).
"""

from __future__ import annotations

import os
import shutil

import torch
import transformers

from engine.experiment.grid import Base
from engine.model_files import save
from engine.models import load_config, load_model, load_tokenizer, torch_dtype
from engine.sources import resolve


def changed_base(
    settings: Base, source: str, target: str, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """The folder of the base model: where it is if nothing is to be changed, else `target`, written once.

    Raises:
        UserError: as `engine.sources.resolve` and `load_model`.
    """
    if settings == Base():
        return resolve(source, target, None, revision, trust_remote_code)
    if os.path.isfile(f"{target}/config.json"):
        return target
    scratch = f"{target}-source"
    folder = resolve(source, scratch, None, revision, trust_remote_code)
    kept = load_config(folder, trust_remote_code).dtype or torch.float32
    dtype = torch_dtype(settings.dtype) if settings.dtype else kept
    model = load_model(folder, dtype, trust_remote_code=trust_remote_code)
    if settings.untie:
        untie(model)
    save(model, load_tokenizer(folder, trust_remote_code), target)
    shutil.rmtree(scratch, ignore_errors=True)
    return target


@torch.no_grad()
def untie(model: transformers.PreTrainedModel) -> None:
    """Give the output layer a copy of the weight that it shares with the input embedding, in place."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
