"""Training in one process of plain torch: the reference that every other way of training has to follow."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import transformers

from engine.examples import Examples
from engine.head import find_head
from engine.losses import document_scores
from engine.padding import Batch
from engine.recipe import make_optimizer, prepare, require_dtype
from engine.spec import Retrain
from engine.training import Hooks, Position, Progress, fit, metrics


class PlainStepper:
    """One process of plain torch; 16-bit models step on float32 master copies of their trained weights.

    The gradient of a 16-bit weight goes over to its float32 master as soon as it is whole, so the 16-bit
    gradients never exist all at once: 18 bytes a parameter at the end of backward with AdamW, 14 between steps.

    Where the softmax is over the labels alone, no other row of the output layer ever has a gradient, and without
    decay none moves: the master, and what the optimizer keeps, are then of the labels' rows (`_moving_rows`).
    """

    rank, world = 0, 1

    def __init__(
        self, model: transformers.PreTrainedModel, retrain: Retrain, label_ids: list[int] | None
    ) -> None:
        """Args: model: as `prepare` leaves it; label_ids: as for `document_losses`."""
        self.model, self.retrain, self.label_ids = model, retrain, label_ids
        self.device = next(model.parameters()).device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        head = find_head(model).weight
        rows = _moving_rows(model, retrain, label_ids)
        self.rows = [rows if weight is head else None for weight in self.trained]
        self.masters = [_master(weight, rows) for weight, rows in zip(self.trained, self.rows, strict=True)]
        self.optimizer = make_optimizer(list(self.masters), retrain)
        self._hooks = [
            weight.register_post_accumulate_grad_hook(functools.partial(_to_master, master, rows))
            for weight, master, rows in zip(self.trained, self.masters, self.rows, strict=True)
            if master is not weight
        ]

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Stepper`."""
        return document_scores(self.model, batch, self.label_ids, hits, self.retrain.temperature)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Stepper`. Gradients add up in float32."""
        loss.backward()

    @torch.no_grad()
    def step(self, rate: float) -> torch.Tensor:
        """See `Stepper`."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.retrain.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the weights what their masters hold."""
        for weight, master, rows in zip(self.trained, self.masters, self.rows, strict=True):
            if rows is not None:
                weight[rows] = master.to(weight.dtype)
            elif master is not weight:
                weight.copy_(master)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        return values

    def close(self) -> None:
        """Let go of the model: its gradients are its own again."""
        for hook in self._hooks:
            hook.remove()


def _moving_rows(
    model: transformers.PreTrainedModel, retrain: Retrain, label_ids: list[int] | None
) -> torch.Tensor | None:
    """The only rows of the output layer that a step can move, ascending; None where it may move all."""
    # an embedding that feeds frozen blocks has no gradient of its own (`engine.recipe`)
    fed = not (retrain.freeze_below or retrain.freeze_body)
    tied = model.get_input_embeddings().weight is find_head(model).weight
    if label_ids is None or retrain.weight_decay or (tied and fed):
        return None
    return torch.tensor(sorted(set(label_ids)), device=model.device)


def _master(weight: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """What the optimizer steps on, in float32: the weight itself where it is that already, else a copy, or its rows."""
    if rows is not None:
        return weight.detach()[rows].float()
    return weight if weight.dtype == torch.float32 else weight.detach().float()


def _to_master(master: torch.Tensor, rows: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Add a weight's gradient to its master's, and forget it."""
    assert weight.grad is not None
    grad = (weight.grad if rows is None else weight.grad[rows]).float()
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    weight.grad = None


def train_plain(
    model: transformers.PreTrainedModel,
    examples: Examples,
    retrain: Retrain,
    seed: int,
    label_ids: list[int] | None = None,
    validation: Examples | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a model in place, in this process; the reference that every other way has to follow.

    Args:
        model: weights of type `torch_dtype(retrain.dtype)`.
        label_ids: rows of a restricted softmax, as `label_rows` gives them.
        validation: documents to judge by (used with retrain.early_stopping or retrain.eval_steps).

    Returns:
        `metrics`. With early stopping the model is the one that was judged best.
    """
    require_dtype(retrain, model.device.type)
    stepper = PlainStepper(prepare(model, retrain, seed), retrain, label_ids)
    best: list[torch.Tensor] = []

    def keep(_: Position) -> None:
        best[:] = [weight.detach().clone() for weight in stepper.trained]

    position = Position()
    judged = validation if retrain.judges else None
    hooks = Hooks(keep=keep, progress=progress or (lambda event: None))
    try:
        fit(stepper, examples, retrain, seed, position, judged, label_ids is not None, hooks)
    finally:
        stepper.close()
    with torch.no_grad():
        for weight, kept in zip(stepper.trained, best, strict=bool(best)):
            weight.copy_(kept)
    model.eval()
    return metrics(position, examples, retrain)
