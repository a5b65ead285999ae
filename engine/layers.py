"""Linear layers other than the last: finding them by pattern, and projecting their gradients through hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine.errors import UserError
from engine.projection import LayerShape, Projector
from engine.projection.base import Side

HALF_SCALE = 1024.0
"""Losses are multiplied by this in float16, whose smallest number is 6e-8, and rows divided by it."""


def matching_layers(
    model: transformers.PreTrainedModel, pattern: str, head: str, head_rows: int
) -> list[LayerShape]:
    """Weights of the linear layers whose module name matches, in the model's order.

    Args:
        pattern: all_linear (every linear layer but the output embedding, as in PEFT), or a regular expression
            that is searched in module names.
        head: name of the head's weight; it counts with `head_rows` rows.

    Raises:
        UserError: a broken expression, or one that matches no linear layer.
    """
    every = pattern == "all_linear"
    try:
        wanted = re.compile("" if every else pattern)
    except re.error as error:
        raise UserError(f"gradients.layers={pattern!r} is not a regular expression: {error}.") from None
    found = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or not wanted.search(name):
            continue
        if not (every and weight == head):
            rows, cols = module.weight.shape
            found.append(LayerShape(weight, head_rows if weight == head else rows, cols))
    if not found:
        raise UserError(f"gradients.layers={pattern!r} matches no linear layer of {type(model).__name__}.")
    return found


class LayerHooks:
    """Projects per-example gradients of named linear layers in one forward and one backward pass.

    A layer's output gradient ``e_t`` is projected with its input ``h_t`` as soon as the backward pass reaches
    it, and let go: no layer's per-example gradient and no two layers' output gradients exist at once. No
    weight requires a gradient. The graph begins at the outputs of the lowest chosen layers, so blocks below
    are as cheap as in inference, and the backward pass ends there.

    The gradient of a weight is kept in the weight's own orientation: a Linear's (out, in) is error x input;
    GPT-2's Conv1D stores (in, out), so there the factors change places.

    Args:
        layers: index in the projector -> name of the weight.
        on_device: gives the run's projector on a device: layers may lie on several.
        shape: (docs, length) of the padded batch.
        rows: (docs, dim) float32, to which projected gradients are added.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        layers: Mapping[int, str],
        on_device: Callable[[torch.device], Projector],
        shape: tuple[int, int],
        rows: Tensor,
    ) -> None:
        self._modules = {f"{name}.weight": module for name, module in model.named_modules()}
        self._layers, self._on_device, self._shape, self._rows = layers, on_device, shape, rows
        self._handles: list[Any] = []
        self._ends: list[Tensor] = []
        self.scale = HALF_SCALE if model.dtype == torch.float16 else 1.0

    def __enter__(self) -> LayerHooks:
        for index, weight in self._layers.items():

            def record(
                module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor, index: int = index
            ) -> None:
                self._record(index, module, inputs[0], output)

            self._handles.append(self._modules[weight].register_forward_hook(record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._ends.clear()

    def backward(self, states: Tensor, gradient: Tensor) -> None:
        """Run the backward pass from the states that enter the head, given `scale` times dL/dstates.

        The rows hold the gradients afterwards. Layers that the loss does not depend on add nothing.
        """
        if self._ends and states.requires_grad:
            # grad() wants the ends alone: what is in between, the hooks see on the way
            torch.autograd.grad(states, self._ends, gradient, allow_unused=True)

    def _record(self, index: int, module: torch.nn.Module, hidden: Tensor, output: Tensor) -> None:
        """Keep what the projection needs of the inputs, and wait for the gradient of the output."""
        tokens = hidden.reshape(-1, hidden.shape[-1]).to(output.device)
        if len(tokens) != self._shape[0] * self._shape[1]:
            raise UserError(
                f"{self._layers[index]} does not see every token of every document, so its gradients cannot be "
                "told apart by document: choose other layers with gradients.layers."
            )
        projector = self._on_device(output.device)
        sides: tuple[Side, Side] = ("row", "col") if isinstance(module, Conv1D) else ("col", "row")
        with torch.no_grad():
            held = projector.hold(index, sides[0], tokens.detach())
        if not output.requires_grad:
            self._ends.append(output.requires_grad_(True))
        output.register_hook(lambda error: self._add(projector, index, held, sides[1], error))

    def _add(self, projector: Projector, index: int, held: Tensor, side: Side, error: Tensor) -> None:
        other = projector.hold(index, side, error.reshape(-1, error.shape[-1]))
        rows, cols = (other, held) if side == "row" else (held, other)
        # Padding has its place here: its errors are zero, and cutting it out would copy every activation.
        docs, length = self._shape
        owner = torch.arange(docs, device=held.device).repeat_interleave(length)
        projected = projector.join(index, rows, cols, owner, docs)
        self._rows.add_(projected.to(self._rows.device), alpha=1.0 / self.scale)
