"""The recipe of a training: data order, each worker's share, schedule, optimizer, and what stays frozen.

Everything here is a function of the spec, the seed and the step, so a resumed or a wider training has no
state to restore but weights, optimizer and step number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.adapters import add_adapters
from engine.errors import UserError
from engine.head import find_head
from engine.models import torch_dtype
from engine.spec import Retrain


def epoch_order(documents: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch: a permutation that depends on (documents, seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(documents)


def passes_per_step(documents: int, retrain: Retrain, world: int) -> tuple[int, int]:
    """Forward passes of each worker in one step, and the most documents in one of them.

    The number is the same for every worker and step: collectives in the passes have to meet.
    """
    share = -(-min(retrain.batch_size, documents) // world)
    micro = min(retrain.micro_batch_size or share, share)
    return -(-share // micro), micro


def worker_share(
    lengths: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    rank: int,
    world: int,
    passes: tuple[int, int],
) -> Iterator[tuple[npt.NDArray[np.int64], float]]:
    """One worker's forward passes for the documents `members` of a step.

    Documents are dealt out in order of length, so that workers get like amounts and a pass little padding.

    Yields:
        (documents, weight): weight is 1 / len(members), or 0 for the document that a worker with nothing
        left to do computes all the same.
    """
    ordered = members[np.argsort(-lengths[members], kind="stable")]
    mine = ordered[rank::world]
    count, micro = passes
    for start in range(0, count * micro, micro):
        part = mine[start : start + micro]
        yield (part, 1.0 / len(members)) if len(part) else (ordered[-1:], 0.0)


def learning_rate(step: int, total: int, retrain: Retrain) -> float:
    """Learning rate of step 0..total-1: linear warm-up over the first share, then the schedule down to 0."""
    warmup = round(retrain.warmup_share * total)
    if step < warmup:
        return retrain.learning_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[
        retrain.schedule
    ]
    return retrain.learning_rate * factor


def make_optimizer(parameters: list[torch.Tensor], retrain: Retrain) -> torch.optim.Optimizer:
    """adamw, adam or sgd over the parameters; vectors (biases, norms) never decay."""
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": 0.0}]
    if retrain.weight_decay:
        flat = [
            p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2
        ]  # ds_shape: ZeRO-3's pieces
        deep = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
        decays = [
            {"params": deep, "weight_decay": retrain.weight_decay},
            {"params": flat, "weight_decay": 0.0},
        ]
        groups = [group for group in decays if group["params"]]
    if retrain.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=retrain.learning_rate, momentum=retrain.momentum, fused=True)
    kind = torch.optim.AdamW if retrain.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=retrain.learning_rate, fused=True)


def prepare(
    model: transformers.PreTrainedModel, retrain: Retrain, seed: int = 0
) -> transformers.PreTrainedModel:
    """Put a model into training mode: adapters, frozen parts, dropout, activation checkpointing.

    Args:
        seed: of the adapters' first weights.

    Raises:
        UserError: freeze_below is more than the model has blocks, adapters that fit nowhere, or nothing is
            left to train.
    """
    model.train()
    if retrain.lora.rank:
        add_adapters(model, retrain, seed)
    else:
        _freeze(model, retrain)
    if not retrain.dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    if retrain.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def require_dtype(retrain: Retrain, device: str) -> torch.dtype:
    """The type of weights in forward and backward; float16 needs a GPU's loss scaling, else UserError."""
    dtype = torch_dtype(retrain.dtype)
    if dtype == torch.float16 and device == "cpu":
        raise UserError("retrain.dtype float16 needs a GPU: use bfloat16, auto or float32 on a CPU.")
    return dtype


def _freeze(model: transformers.PreTrainedModel, retrain: Retrain) -> None:
    """Freeze blocks below `freeze_below`, the embeddings that feed them, and head or body where asked for.

    A tied embedding is also the head and goes on training as such: its gradient is then the output side's
    alone, because the input side is cut off. Backward thus ends at the lowest block that trains.
    """
    head = find_head(model)
    if retrain.freeze_body:
        model.requires_grad_(False)
    else:
        for block in _blocks_below(model, retrain):
            block.requires_grad_(False)
    if retrain.freeze_below or retrain.freeze_body:
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.requires_grad_(False)
                module.register_forward_hook(lambda _module, _inputs, output: output.detach())
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            parameter.requires_grad_(not retrain.freeze_head)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("retrain.freeze_below, freeze_body and freeze_head together leave nothing to train.")


def _blocks_below(model: transformers.PreTrainedModel, retrain: Retrain) -> list[torch.nn.Module]:
    """The blocks that freeze_below freezes; UserError when the model has fewer."""
    if not retrain.freeze_below:
        return []
    depth = model.config.get_text_config().num_hidden_layers
    stacks = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    blocks = next(stacks, None)
    if blocks is None or retrain.freeze_below > depth:
        raise UserError(f"retrain.freeze_below is {retrain.freeze_below}, and the model has {depth} blocks.")
    return list(blocks)[: retrain.freeze_below]
