"""Trajectory fidelity: do gradients along a real training run point where the fine-tuned model went?

The method takes gradients at synthetic checkpoints, points of the straight line from theta_0 to theta_f. Where a
training run was recorded, this measures both: at every recorded theta_t and at every synthetic theta_j, the
cosine between the gradient of the true documents' loss and Delta = theta_0 - theta_f on the chosen layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers

from engine.checkpoints import Endpoints
from engine.errors import UserError
from engine.losses import document_losses
from engine.models import load_model
from engine.padding import length_batches, pad
from engine.ragged import Ragged
from engine.target import Target

SYNTHETIC = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Fractions of the way at which synthetic checkpoints are looked at."""

Gradient = dict[str, torch.Tensor]


def trajectory(
    endpoints: Endpoints,
    recorded: list[str],
    target: Target,
    examples: Ragged,
    label_ids: list[int] | None,
    tokens_per_batch: int,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fidelity of recorded and synthetic checkpoints.

    Args:
        recorded: model folders of one training run, in order of time.
        examples: true training documents, labelled.
        label_ids: rows of a restricted softmax, or None.
        device: where the working model lives.

    Returns:
        delta_norm; recorded: one row a checkpoint with cosine (true gradient to Delta), gradient_norm, way
        (projection of theta_t - theta_0 on theta_f - theta_0, 1 at theta_f), direction (cosine of the two); and
        synthetic: one row a fraction with fraction, cosine, gradient_norm. A cosine is None for a zero gradient.

    Raises:
        UserError: a recorded model that does not match the base model.
    """
    model = load_model(endpoints.base, torch.float32, device, trust_remote_code)
    delta = _delta(target, endpoints)
    length = _norm(delta)
    rows = []
    for folder in recorded:
        try:
            between = Endpoints(endpoints.base, folder, trust_remote_code)
        except UserError as error:
            raise UserError(f"the recorded checkpoint {folder} does not fit: {error}") from None
        moved = _delta(target, between)
        along = _dot(moved, delta)
        between.interpolate(model, 1.0)
        row = _look(model, examples, target, label_ids, delta, tokens_per_batch)
        norm = _norm(moved)
        rows.append(
            {
                "checkpoint": folder.rstrip("/").rsplit("/", 1)[-1],
                **row,
                "way": along / length**2,
                "direction": along / (norm * length) if norm else None,
            }
        )
    synthetic = []
    for fraction in SYNTHETIC:
        endpoints.interpolate(model, fraction)
        row = _look(model, examples, target, label_ids, delta, tokens_per_batch)
        synthetic.append({"fraction": fraction, **row})
    return {"delta_norm": length, "recorded": rows, "synthetic": synthetic}


def mean_gradient(
    model: transformers.PreTrainedModel,
    examples: Ragged,
    target: Target,
    label_ids: list[int] | None,
    tokens_per_batch: int,
) -> Gradient:
    """Gradient of the documents' mean loss with respect to the chosen layers, (rows, cols) float32 by name.

    The head's gradient is of its output side alone, also where it is tied to the input embedding, and of the
    target's rows alone (docs/method.md, step 3).
    """
    weights = {layer.name: _weight(model, layer.name, target) for layer in target.layers}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    cut = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.detach())
    try:
        for group in length_batches(examples.lengths, tokens_per_batch):
            losses = document_losses(model, pad(examples, group).to(model.device), label_ids)
            (losses.sum() / len(examples)).backward()
    finally:
        cut.remove()
    found = {}
    for layer in target.layers:
        grad = weights[layer.name].grad
        assert grad is not None
        only = target.only if layer.name == target.head else None
        found[layer.name] = (grad[only] if only is not None else grad[: layer.rows]).detach().cpu().clone()
        weights[layer.name].grad = None
    return found


def _look(
    model: transformers.PreTrainedModel,
    examples: Ragged,
    target: Target,
    label_ids: list[int] | None,
    delta: Gradient,
    tokens_per_batch: int,
) -> dict[str, Any]:
    gradient = mean_gradient(model, examples, target, label_ids, tokens_per_batch)
    norm = _norm(gradient)
    cosine = _dot(gradient, delta) / (norm * _norm(delta)) if norm else None
    return {"cosine": cosine, "gradient_norm": norm}


def _delta(target: Target, endpoints: Endpoints) -> Gradient:
    """theta_0 - theta of the second model, on the chosen layers."""
    return {
        layer.name: torch.cat([chunk for _, chunk in target.delta(endpoints, layer)])
        for layer in target.layers
    }


def _weight(model: transformers.PreTrainedModel, name: str, target: Target) -> torch.nn.Parameter:
    if name == target.head:
        return model.get_output_embeddings().weight
    return model.get_parameter(name)


def _dot(a: Gradient, b: Gradient) -> float:
    return float(sum(_pieces(a, b)))


def _pieces(a: Gradient, b: Gradient) -> Iterator[float]:
    for name in a:
        for left, right in zip(a[name].split(1024), b[name].split(1024), strict=True):
            yield float((left.double() * right.double()).sum())


def _norm(a: Gradient) -> float:
    return float(np.sqrt(_dot(a, a)))
