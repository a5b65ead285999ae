"""Linear layers other than the last: finding them by pattern, and their gradient factors through hooks."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from engine.errors import UserError
from engine.projection import LayerShape


def matching_layers(
    model: transformers.PreTrainedModel, pattern: str, head: str, head_rows: int
) -> list[LayerShape]:
    """Weights of the linear layers whose module name matches, in the model's order.

    Args:
        pattern: all_linear (every linear layer, the head included), or a regular expression that is searched
            in module names.
        head: name of the head's weight; it counts with `head_rows` rows.

    Raises:
        UserError: a broken expression, or one that matches no linear layer.
    """
    try:
        wanted = re.compile("" if pattern == "all_linear" else pattern)
    except re.error as error:
        raise UserError(f"gradients.layers={pattern!r} is not a regular expression: {error}.") from None
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and wanted.search(name):
            rows, cols = module.weight.shape
            weight = f"{name}.weight"
            found.append(LayerShape(weight, head_rows if weight == head else rows, cols))
    if not found:
        raise UserError(f"gradients.layers={pattern!r} matches no linear layer of {type(model).__name__}.")
    return found


class LayerHooks:
    """Records inputs and output gradients of named linear layers during one forward and backward pass.

    The gradient of a weight is kept in the weight's own orientation: a Linear's (out, in) is error x input;
    GPT-2's Conv1D stores (in, out), so there the factors change places.
    """

    def __init__(self, model: transformers.PreTrainedModel, weights: list[str]) -> None:
        self._modules = {f"{name}.weight": module for name, module in model.named_modules()}
        self._weights = weights
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._root = model.get_input_embeddings()

    def __enter__(self) -> LayerHooks:
        # Weights need no gradient: making the embedded input require one is enough for the chain to be built.
        self._handles.append(self._root.register_forward_hook(_require_gradient))
        for weight in self._weights:
            module = self._modules[weight]

            def record(
                _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, weight: str = weight
            ) -> None:
                self._inputs[weight] = inputs[0].detach()
                self._outputs[weight] = output

            self._handles.append(module.register_forward_hook(record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass; keeps d loss / d output of every recorded layer."""
        names = list(self._outputs)
        if names:
            gradients = torch.autograd.grad(loss, [self._outputs[name] for name in names])
            self._gradients = dict(zip(names, gradients, strict=True))
        self._outputs.clear()

    def factors(self, weight: str, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(left (tokens, rows), right (tokens, cols)) of a weight over the real tokens, documents in order."""
        error, hidden = self._gradients[weight][real], self._inputs[weight][real]
        return (hidden, error) if isinstance(self._modules[weight], Conv1D) else (error, hidden)


def _require_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True) if not output.requires_grad else output
