"""Training theta_0 on documents: the examples, their loss, and the one training loop.

The loop is written against `Stepper`, which says how a loss becomes a step: `PlainStepper` here is one
process of plain torch, cluster/train.py has one of DeepSpeed over many workers. Both see the same documents
in the same order with the same weights, so their loss curves are the same but for floating-point noise.

The gradient of a step is the mean over the documents of the global batch of each document's mean loss over
its own loss tokens (METHOD section 6), times its weight where documents have one, however many workers,
forward passes or documents the batch has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers

from engine.encode import IGNORE, PENDING, Batch, Encoder, Ragged, length_batches, pad
from engine.errors import UserError
from engine.models import find_head, hidden_states, torch_dtype
from engine.recipe import (
    epoch_order,
    learning_rate,
    make_optimizer,
    passes_per_step,
    prepare,
    require_dtype,
    worker_share,
)
from engine.spec import Retrain

Progress = Callable[[dict[str, Any]], None]

FLUSH_STEPS = 10
"""Steps between two looks at the loss: summing it over the workers makes them wait for each other."""

CURVE_POINTS = 200
"""Points of the loss curve that are kept in the metrics."""


def load_examples(table: pa.Table, encoder: Encoder) -> Ragged:
    """Documents of a selection as training examples, in the table's order.

    Args:
        table: columns text and, in classification, label (index into task.labels); with columns prompt and
            response the response carries the loss (loss scope response). A column weight, none negative,
            says how much each document counts.

    Returns:
        The documents that carry loss; those that yield no loss token (empty texts) are left out.

    Raises:
        UserError: a missing column, a label that task.labels does not have, or nothing left to train on.
    """
    columns = {"text"} | ({"label"} if encoder.label_ids else set())
    columns = {"prompt", "response"} if "response" in table.column_names else columns
    if missing := sorted(columns - set(table.column_names)):
        raise UserError(
            f"the training documents have no column {missing[0]}: they have {table.column_names}."
        )
    if "response" in columns:
        examples = encoder.encode(table["response"].to_pylist(), table["prompt"].to_pylist())
    else:
        examples = encoder.encode(table["text"].to_pylist())
    if encoder.label_ids:
        labels = table["label"].to_numpy().astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(encoder.label_ids):
            raise UserError(f"the training documents have labels outside 0..{len(encoder.label_ids) - 1}.")
        examples = examples.with_labels(np.asarray(encoder.label_ids, np.int32)[labels])
    examples = replace(examples, weights=_weights(table))
    carries = np.zeros(len(examples.targets) + 1, np.int64)
    np.cumsum(examples.targets != IGNORE, out=carries[1:])
    kept = np.flatnonzero(np.diff(carries[examples.offsets]))
    if not len(kept):
        raise UserError(
            "none of the training documents has a token that carries loss: there is nothing to train on."
        )
    return examples if len(kept) == len(examples) else _take(examples, kept)


def _weights(table: pa.Table) -> npt.NDArray[np.float32] | None:
    """The documents' weights; None without the column or where all are 1."""
    if "weight" not in table.column_names:
        return None
    weights = table["weight"].to_numpy().astype(np.float32)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError("the training documents' weights must be finite, none negative and not all 0.")
    return None if (weights == 1).all() else weights


def label_rows(encoder: Encoder) -> list[int] | None:
    """Vocabulary rows of the softmax: the labels' in restricted classification, None for all of them."""
    return encoder.label_ids if encoder.label_ids and encoder.task.label_softmax == "restricted" else None


def document_losses(
    model: transformers.PreTrainedModel, batch: Batch, label_ids: list[int] | None = None
) -> torch.Tensor:
    """Loss of each document: the mean over its loss tokens, (docs,) float32; 0 without loss tokens.

    Only states that carry loss go through the head. With `label_ids` the softmax is restricted to those rows.
    """
    losses, _ = document_scores(model, batch, label_ids)
    return losses


def document_scores(
    model: transformers.PreTrainedModel, batch: Batch, label_ids: list[int] | None = None, hits: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`document_losses` and, with `hits`, the share of each document's targets that are the likeliest token.

    The output layer is called as a module, not by its weight, so that ZeRO-3 can gather the weight for it.
    """
    carries = batch.targets != IGNORE
    wanted = batch.targets[carries]
    assert PENDING not in wanted, "a label was never filled in"
    states = hidden_states(model, batch.input_ids)[carries]
    z = model.get_output_embeddings()(states)
    if label_ids is not None:
        rows = torch.tensor(label_ids, device=z.device)
        z, wanted = z[:, rows], (wanted[:, None] == rows).int().argmax(1)
    logits = find_head(model).finish(z)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits.detach().argmax(1) == wanted).float() if hits else None

    def mean(values: torch.Tensor) -> torch.Tensor:
        # scattered into (docs, length) and summed there: deterministic on a GPU, as index_add is not
        grid = torch.zeros(carries.shape, device=z.device).masked_scatter(carries, values)
        return grid.sum(1) / carries.sum(1).clamp(min=1)

    return mean(losses), None if right is None else mean(right)


@dataclass
class Position:
    """How far a training has come; JSON-able, so that a checkpoint can hold it."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Fields as a dict; `Position(**d)` is equal to self."""
        return asdict(self)


class Stepper(Protocol):
    """How losses become steps: one process, or one of many workers that all call the same things in turn."""

    rank: int
    world: int
    device: torch.device

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`document_scores` of the model in training."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar; over the workers, gradients are averaged."""

    def step(self, rate: float) -> None:
        """Clip, update with that learning rate, and forget the gradient."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the workers."""


@dataclass(frozen=True)
class Hooks:
    """What happens around the loop; every worker calls each at the same steps.

    keep: the weights of this moment are the best so far. checkpoint: save all that resuming needs.
    progress: step, steps, epoch, loss, documents, seconds, for whoever watches.
    """

    keep: Callable[[Position], None] = lambda position: None
    checkpoint: Callable[[Position], None] = lambda position: None
    progress: Progress = lambda event: None


def fit(
    stepper: Stepper,
    examples: Ragged,
    retrain: Retrain,
    seed: int,
    position: Position,
    validation: Ragged | None = None,
    classify: bool = False,
    hooks: Hooks | None = None,
) -> None:
    """Train from `position` to the end, which `position` then describes.

    Args:
        validation: judged after every epoch for early stopping; classify: by accuracy rather than loss.

    Raises:
        UserError: the loss is no longer finite.
    """
    hooks = hooks or Hooks()
    n, size = len(examples), min(retrain.batch_size, len(examples))
    per_epoch = -(-n // size)
    total = per_epoch * retrain.epochs
    every = per_epoch if retrain.checkpoint_steps is None else retrain.checkpoint_steps
    passes = passes_per_step(n, retrain, stepper.world)
    lengths = examples.lengths
    recent: list[torch.Tensor] = []
    began = time.perf_counter()
    while position.step < total:
        epoch, index = divmod(position.step, per_epoch)
        members = epoch_order(n, seed, epoch)[index * size : (index + 1) * size]
        if retrain.dropout:
            torch.manual_seed((seed * 1_000_003 + position.step) * 1_009 + stepper.rank)
        shares = worker_share(lengths, members, stepper.rank, stepper.world, passes)
        recent.append(_step(stepper, examples, shares, learning_rate(position.step, total, retrain)))
        position.step += 1
        ended = position.step % per_epoch == 0
        due = every > 0 and position.step % every == 0 and position.step < total
        if ended or due or len(recent) == FLUSH_STEPS:
            now = time.perf_counter()
            position.seconds, began = position.seconds + now - began, now
            _flush(stepper, recent, position)
            hooks.progress(_event(position, total, per_epoch, n, size))
        if ended and validation is not None and _judge(stepper, validation, position, classify, passes[1]):
            hooks.keep(position)
        if ended and _patience_over(position, retrain):
            break
        if due:
            hooks.checkpoint(position)
            began = time.perf_counter()


def _step(
    stepper: Stepper, examples: Ragged, shares: Iterator[tuple[npt.NDArray[np.int64], float]], rate: float
) -> torch.Tensor:
    """One step over this worker's share; its part of the global batch's mean loss, a scalar."""
    loss = torch.zeros((), device=stepper.device)
    for members, weight in shares:
        losses, _ = stepper.scores(pad(examples, members).to(stepper.device))
        if examples.weights is not None:
            losses = losses * torch.from_numpy(examples.weights[members]).to(losses)
        # gradients are averaged over workers, the documents of a step are to be summed: hence * world
        stepper.backward(losses.sum() * (weight * stepper.world))
        loss = loss + losses.detach().sum() * weight
    stepper.step(rate)
    return loss


def _flush(stepper: Stepper, recent: list[torch.Tensor], position: Position) -> None:
    """Move the losses of recent steps, summed over workers, into the position."""
    losses = stepper.total(torch.stack(recent)).tolist()
    recent.clear()
    position.losses.extend(losses)
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"training diverged: no finite loss at step {position.step}; lower retrain.learning_rate."
        )


def _event(position: Position, total: int, per_epoch: int, n: int, size: int) -> dict[str, Any]:
    epochs, steps = divmod(position.step, per_epoch)
    return {
        "step": position.step,
        "steps": total,
        "epoch": position.step / per_epoch,
        "loss": position.losses[-1],
        "documents": epochs * n + steps * size,
        "seconds": position.seconds,
    }


@torch.no_grad()
def _judge(stepper: Stepper, validation: Ragged, position: Position, classify: bool, micro: int) -> bool:
    """Judge the model on the validation documents; whether this epoch is the best so far."""
    world, budget = stepper.world, micro * int(validation.lengths.max())
    sums = torch.zeros(2, dtype=torch.float64, device=stepper.device)
    for group in length_batches(validation.lengths, budget * world):
        mine = group[stepper.rank :: world]
        weight = 1.0 / len(validation) if len(mine) else 0.0
        losses, hits = stepper.scores(
            pad(validation, mine if len(mine) else group[:1]).to(stepper.device), True
        )
        assert hits is not None
        sums += torch.stack([losses.double().sum(), hits.double().sum()]) * weight
    loss, accuracy = stepper.total(sums).tolist()
    position.validation.append({"loss": loss, "accuracy": accuracy})

    def merit(result: dict[str, float]) -> tuple[float, float]:
        return (result["accuracy"] if classify else 0.0, -result["loss"])

    best = position.best_epoch
    if best is not None and merit(position.validation[best]) >= merit(position.validation[-1]):
        return False
    position.best_epoch = len(position.validation) - 1
    return True


def _patience_over(position: Position, retrain: Retrain) -> bool:
    if retrain.patience is None or position.best_epoch is None:
        return False
    return len(position.validation) - 1 - position.best_epoch >= retrain.patience


def metrics(position: Position, examples: Ragged, retrain: Retrain) -> dict[str, Any]:
    """JSON-able summary of a finished training; curve: [step, loss] pairs, thinned to CURVE_POINTS."""
    n, size = len(examples), min(retrain.batch_size, len(examples))
    per_epoch = -(-n // size)
    every = max(1, -(-len(position.losses) // CURVE_POINTS))
    last = position.losses[-per_epoch:]
    return {
        "documents": n,
        "steps": position.step,
        "epochs": position.step / per_epoch,
        "final_loss": sum(last) / len(last),
        "curve": [[step, loss] for step, loss in enumerate(position.losses, 1)][::every],
        "validation": position.validation,
        "best_epoch": position.best_epoch,
        "seconds": position.seconds,
        "examples_per_second": position.step / per_epoch * n / max(position.seconds, 1e-9),
        "dtype": str(torch_dtype(retrain.dtype)).removeprefix("torch."),
    }


class PlainStepper:
    """One process of plain torch; 16-bit models step on float32 master copies of their trained weights."""

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

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Stepper`."""
        return document_scores(self.model, batch, self.label_ids, hits)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Stepper`. Gradients add up in float32."""
        loss.backward()
        for weight, master in zip(self.trained, self.masters, strict=True):
            if master is not weight and weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """See `Stepper`."""
        if self.retrain.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.masters, self.retrain.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for weight, master in zip(self.trained, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        return values


def train_plain(
    model: transformers.PreTrainedModel,
    examples: Ragged,
    retrain: Retrain,
    seed: int,
    label_ids: list[int] | None = None,
    validation: Ragged | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a model in place, in this process; the reference that every other way has to follow.

    Args:
        model: weights of type `torch_dtype(retrain.dtype)`.
        label_ids: rows of a restricted softmax, as `label_rows` gives them.
        validation: documents for early stopping (used when retrain.early_stopping).

    Returns:
        `metrics`. With early stopping the model is that of the best epoch.
    """
    require_dtype(retrain, model.device.type)
    stepper = PlainStepper(prepare(model, retrain, seed), retrain, label_ids)
    best: list[torch.Tensor] = []

    def keep(_: Position) -> None:
        best[:] = [weight.detach().clone() for weight in stepper.trained]

    position = Position()
    judged = validation if retrain.early_stopping else None
    hooks = Hooks(keep=keep, progress=progress or (lambda event: None))
    fit(stepper, examples, retrain, seed, position, judged, label_ids is not None, hooks)
    with torch.no_grad():
        for weight, kept in zip(stepper.trained, best, strict=bool(best)):
            weight.copy_(kept)
    model.eval()
    return metrics(position, examples, retrain)


def _take(examples: Ragged, members: npt.NDArray[np.int64]) -> Ragged:
    """The given documents alone."""
    spans = [slice(examples.offsets[i], examples.offsets[i + 1]) for i in members]
    offsets = np.concatenate([[0], np.cumsum(examples.lengths[members])])
    tokens = np.concatenate([examples.tokens[span] for span in spans])
    weights = None if examples.weights is None else examples.weights[members]
    return Ragged(tokens, np.concatenate([examples.targets[span] for span in spans]), offsets, weights)
