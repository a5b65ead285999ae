"""What the frozen lower blocks of a model give for a set of documents: computed once, kept in memory.

Where nothing below block n trains, the states that enter it are the same at every step. They are computed in batches
by length, which depend on the documents and the budget alone, so that a seed, a step or a resumed training changes
no bit of them; the blocks from n up then run on them as on what the blocks below would have given.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.errors import UserError, first_line
from engine.head import hidden_states
from engine.padding import length_batches, pad
from engine.ragged import Ragged
from engine.rundir import fingerprint

TOKENS_PER_BATCH = 4096
"""Padded tokens of one forward pass through the lower blocks, in training."""

KEPT = 4
"""Sets of documents whose states a process keeps: the last so many."""


@dataclass(frozen=True)
class Entering:
    """States (rows, length, hidden) that enter block `below`, right-padded with zeros."""

    states: torch.Tensor
    below: int

    def to(self, device: str | torch.device) -> Entering:
        """The states on a device."""
        return Entering(self.states.to(device), self.below)


@dataclass(frozen=True)
class Frozen:
    """States (total tokens, hidden), in the model's type, that enter block `below`; offsets (n + 1,) of documents."""

    states: torch.Tensor
    offsets: npt.NDArray[np.int64]
    below: int

    def entering(self, members: npt.NDArray[np.int64]) -> Entering:
        """The states of the given documents as `engine.padding.pad` lays them out."""
        spans = [self.states[self.offsets[i] : self.offsets[i + 1]] for i in members]
        return Entering(torch.nn.utils.rnn.pad_sequence(spans, batch_first=True), self.below)


def frozen_states(
    model: transformers.PreTrainedModel,
    below: int,
    documents: Ragged,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Frozen:
    """The states that enter block `below` for every document; those of the last few sets are kept.

    Args:
        tokens_per_batch: padded tokens in one forward pass.

    Raises:
        UserError: the model is not made of blocks that can be run apart.
    """
    key = fingerprint(
        [_lower_hash(model, below), _hash(documents), below, tokens_per_batch, str(model.device)]
    )
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    check_parts(model, below)
    found = Frozen(_computed(model, below, documents, tokens_per_batch), documents.offsets.copy(), below)
    _kept[key] = found
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    return found


_kept: OrderedDict[str, Frozen] = OrderedDict()


def states_above(model: transformers.PreTrainedModel, entering: Entering) -> torch.Tensor:
    """`engine.head.hidden_states` of the documents whose states these are: the blocks from `below` up alone."""
    with _skipped(model, entering.below):
        return model.base_model(inputs_embeds=entering.states, use_cache=False).last_hidden_state


def require_constant(model: transformers.PreTrainedModel, below: int) -> None:
    """UserError when something that feeds block `below` trains, so that its states are not the same at every step."""
    if any(weight.requires_grad for weight in _lower_weights(model, below).values()):
        raise UserError(
            "retrain.cache_frozen: the input embedding is the trained output layer's too, so no state is constant: "
            "untie the base model (base: {untie: true} in a grid), or set retrain.freeze_head."
        )


@torch.no_grad()
def check_parts(model: transformers.PreTrainedModel, below: int) -> None:
    """Refuse a model whose upper blocks on the lower ones' states are not, bit by bit, the model (GPT-2, Gemma).

    Raises:
        UserError: names the architecture, or says that there is no block `below`.
    """
    depth = len(_blocks(model))
    if not 0 < below < depth:
        raise UserError(
            f"retrain.cache_frozen keeps what enters block {below}, and the model has blocks 0 to {depth - 1}: "
            "choose retrain.freeze_below among them, or leave it out."
        )
    vocab = min(30_000, model.get_input_embeddings().weight.shape[0])
    probe = (torch.arange(12, device=model.device) * 7919 % vocab).reshape(2, 6)
    whole = hidden_states(model, probe)
    try:
        parts = states_above(model, Entering(_lower(model, below, probe), below))
        equal, why = torch.equal(whole, parts), "its blocks give other states"
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        equal, why = False, first_line(error)
    if not equal and bool(whole.isfinite().all()):
        raise UserError(
            f"retrain.cache_frozen: {type(model).__name__} cannot be run from block {below} on ({why}): leave it out."
        )


@torch.no_grad()
def _computed(
    model: transformers.PreTrainedModel, below: int, documents: Ragged, tokens_per_batch: int
) -> torch.Tensor:
    states: torch.Tensor | None = None
    for group in length_batches(documents.lengths, tokens_per_batch):
        batch = pad(documents, group)
        lower = _lower(model, below, batch.input_ids.to(model.device))
        if states is None:
            states = lower.new_empty((len(documents.tokens), lower.shape[2]))
        for row, i in enumerate(group):
            start, stop = documents.offsets[i : i + 2]
            states[start:stop] = lower[row, : stop - start]
    assert states is not None, "no documents"
    return states


class _Reached(Exception):
    """The forward pass has come to the block that was asked for."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def _lower(model: transformers.PreTrainedModel, below: int, input_ids: torch.Tensor) -> torch.Tensor:
    """The states that enter block `below`; nothing above it is computed."""

    def stop(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    hook = _blocks(model)[below].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        hidden_states(model, input_ids)
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise UserError(
        f"retrain.cache_frozen: {type(model).__name__} does not run its blocks in turn: leave it out."
    )


class _Skip(torch.nn.Module):
    """Stands in a lower block's place and hands its input on."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The input as it is."""
        return hidden_states


@contextmanager
def _skipped(model: transformers.PreTrainedModel, below: int) -> Iterator[None]:
    """Have the model's blocks below `below` do nothing within the block; each of the others keeps its place."""
    blocks = _blocks(model)
    real = [blocks[i] for i in range(below)]
    for i in range(below):
        blocks[i] = _Skip()
    try:
        yield
    finally:
        for i, block in enumerate(real):
            blocks[i] = block


def _blocks(model: transformers.PreTrainedModel) -> torch.nn.ModuleList:
    """The stack of blocks; UserError when the model has none."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"retrain.cache_frozen: {type(model).__name__} has no stack of blocks: leave it out.")


def _lower_weights(model: transformers.PreTrainedModel, below: int) -> dict[str, torch.Tensor]:
    """Weights and buffers that states entering block `below` depend on: the embeddings' and the lower blocks'."""
    blocks = _blocks(model)
    lower = {f"block.{i}": blocks[i] for i in range(below)}
    lower |= {
        f"embedding.{name}": module
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    return {
        f"{place}.{name}": tensor
        for place, module in lower.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def _lower_hash(model: transformers.PreTrainedModel, below: int) -> str:
    """Hash of architecture and weights below a block."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "tie_word_embeddings"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in _lower_weights(model, below).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(documents: Ragged) -> str:
    """Hash of the documents' tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(documents.tokens).tobytes())
    digest.update(documents.offsets.tobytes())
    return digest.hexdigest()
