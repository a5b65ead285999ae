"""Training in one process of plain torch: the reference that every other way of training has to follow."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import transformers

from engine.examples import Examples
from engine.losses import document_scores
from engine.padding import Batch
from engine.recipe import make_optimizer, prepare, require_dtype
from engine.spec import Retrain
from engine.training import Hooks, Position, Progress, fit, metrics


class PlainStepper:
    """One process of plain torch; 16-bit models step on float32 master copies of their trained weights.

    The gradient of a 16-bit weight goes over to its float32 master as soon as it is whole, so the 16-bit
    gradients never exist all at once: 18 bytes a parameter at the end of backward with AdamW, 14 between steps.
    """

    rank, world = 0, 1

    def __init__(
        self, model: transformers.PreTrainedModel, retrain: Retrain, label_ids: list[int] | None
    ) -> None:
        """Args: model: as `prepare` leaves it; label_ids: as for `document_losses`."""
        self.model, self.retrain, self.label_ids = model, retrain, label_ids
        self.device = next(model.parameters()).device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.optimizer = make_optimizer(list(self.masters), retrain)
        self._hooks = [
            weight.register_post_accumulate_grad_hook(functools.partial(_to_master, master))
            for weight, master in zip(self.trained, self.masters, strict=True)
            if master is not weight
        ]

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Stepper`."""
        return document_scores(self.model, batch, self.label_ids, hits)

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
        for weight, master in zip(self.trained, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
        return norm

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        return values

    def close(self) -> None:
        """Let go of the model: its gradients are its own again."""
        for hook in self._hooks:
            hook.remove()


def _to_master(master: torch.Tensor, weight: torch.Tensor) -> None:
    """Add a weight's gradient to its master's, and forget it."""
    assert weight.grad is not None
    grad = weight.grad.float()
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
