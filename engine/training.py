"""The one training loop: which documents make a step, and what is judged, logged and kept on the way.

The loop is written against `Stepper`, which says how a loss becomes a step: `engine.plain_stepper` is one
process of plain torch, cluster/train.py has one of DeepSpeed over many workers. Both see the same documents
in the same order with the same weights, so their loss curves are the same but for floating-point noise.

The gradient of a step is the mean over the documents of the global batch of each document's mean loss over
its own loss tokens (METHOD section 6), times its weight where documents have one, however many workers,
forward passes or documents the batch has.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.attention import training_attention
from engine.errors import UserError, first_line
from engine.examples import Examples
from engine.frozen import Frozen, frozen_states, require_constant
from engine.models import torch_dtype
from engine.padding import Batch, length_batches, pack, pad
from engine.recipe import epoch_order, learning_rate, passes_per_step, worker_share
from engine.spec import Retrain

Progress = Callable[[dict[str, Any]], None]

FLUSH_STEPS = 10
"""Steps between two looks at the loss: summing it over the workers makes them wait for each other."""

CURVE_POINTS = 200
"""Points of the loss curve that are kept in the metrics."""


@dataclass
class Position:
    """How far a training has come; JSON-able, so that a checkpoint can hold it.

    validation: step, epoch, loss and accuracy of each judgement; best: which of them is the best.
    seconds: spent in steps, neither in judging nor in checkpoints.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Fields as a dict; `Position(**d)` is equal to self."""
        return asdict(self)


class Stepper(Protocol):
    """How losses become steps: one process, or one of many workers that all call the same things in turn."""

    rank: int
    world: int
    device: torch.device
    model: transformers.PreTrainedModel

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`document_scores` of the model in training."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar; over the workers, gradients are averaged."""

    def step(self, rate: float) -> torch.Tensor | float:
        """Clip, update with that learning rate, and forget the gradient; its norm before clipping."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the workers."""


@dataclass(frozen=True)
class Hooks:
    """What happens around the loop; every worker calls each at the same steps.

    keep: the weights of this moment are the best so far (early stopping alone asks). checkpoint: save all that
    resuming needs. progress: {step, steps, epoch, loss, documents, seconds}, for whoever watches, and `log`,
    the lines of the training's log since the last call (`engine.train_log`).
    """

    keep: Callable[[Position], None] = lambda position: None
    checkpoint: Callable[[Position], None] = lambda position: None
    progress: Progress = lambda event: None


def fit(
    stepper: Stepper,
    examples: Examples,
    retrain: Retrain,
    seed: int,
    position: Position,
    validation: Examples | None = None,
    classify: bool = False,
    hooks: Hooks | None = None,
) -> None:
    """Train from `position` to the end, which `position` then describes.

    Args:
        validation: judged after every `retrain.eval_steps` steps, or every epoch, and after the last step;
            classify: by accuracy rather than loss.

    Raises:
        UserError: the loss is no longer finite, or the model cannot be trained on packed documents.
    """
    hooks = hooks or Hooks()
    plan = _Plan.of(examples, retrain, seed, stepper.world)
    if retrain.packing:
        _check_packing(stepper, plan)
    plan = replace(plan, frozen=_frozen(stepper, examples, retrain))
    judged_states = None if validation is None else _frozen(stepper, validation, retrain)
    every = plan.per_epoch if retrain.checkpoint_steps is None else retrain.checkpoint_steps
    judging = retrain.eval_steps or plan.per_epoch
    window = _Window(plan)
    while position.step < plan.total:
        if retrain.dropout:
            torch.manual_seed((seed * 1_000_003 + position.step) * 1_009 + stepper.rank)
        window.add(*_step(stepper, plan, position.step))
        position.step += 1
        last = position.step == plan.total
        ended = position.step % plan.per_epoch == 0
        due = every > 0 and position.step % every == 0 and not last
        judged = validation is not None and (position.step % judging == 0 or last)
        if ended or due or judged or len(window) == FLUSH_STEPS:
            hooks.progress(window.flush(stepper, position))
        if judged and validation is not None:
            better = _judge(stepper, validation, position, plan, classify, judged_states)
            hooks.progress(plan.event(position, [_validation_line(position)]))
            if retrain.early_stopping and better:
                hooks.keep(position)
            if _patience_over(position, retrain):
                break
        if due:
            hooks.checkpoint(position)
        if judged or due:
            window.restart()


@dataclass(frozen=True)
class _Plan:
    """What follows from the documents and the recipe: which documents make a step, in which passes.

    per_epoch, total: steps; passes: of each worker in a step, and documents in one; width: tokens of the
    longest document, and so of a row of packed ones; frozen: what the frozen blocks give, where that is kept.
    """

    examples: Examples
    retrain: Retrain
    seed: int
    per_epoch: int
    total: int
    passes: tuple[int, int]
    width: int
    frozen: Frozen | None = None

    @classmethod
    def of(cls, examples: Examples, retrain: Retrain, seed: int, world: int) -> _Plan:
        n = len(examples)
        per_epoch = -(-n // min(retrain.batch_size, n))
        passes = passes_per_step(n, retrain, world)
        width = int(examples.lengths.max())
        return cls(examples, retrain, seed, per_epoch, per_epoch * retrain.epochs, passes, width)

    def members(self, step: int) -> npt.NDArray[np.int64]:
        """Documents of a step, over all workers."""
        epoch, index = divmod(step, self.per_epoch)
        size = min(self.retrain.batch_size, len(self.examples))
        return _order(len(self.examples), self.seed, epoch)[index * size : (index + 1) * size]

    def batch(self, members: npt.NDArray[np.int64]) -> Batch:
        """The documents as one forward pass."""
        part = self.examples.take(members)
        everyone = np.arange(len(part))
        if self.retrain.packing:
            return pack(part, everyone, self.width)
        return _with_states(pad(part, everyone), self.frozen, members)

    def event(self, position: Position, log: list[dict[str, Any]]) -> dict[str, Any]:
        """What is told to whoever watches."""
        epochs, steps = divmod(position.step, self.per_epoch)
        size = min(self.retrain.batch_size, len(self.examples))
        return {
            "step": position.step,
            "steps": self.total,
            "epoch": position.step / self.per_epoch,
            "loss": position.losses[-1],
            "documents": epochs * len(self.examples) + steps * size,
            "seconds": position.seconds,
            "log": log,
        }


_order = functools.lru_cache(maxsize=2)(epoch_order)
"""Steps of one epoch ask again and again."""


class _Window:
    """The steps since the last look at their losses: looking makes the workers wait for each other."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor | float] = []
        self.restart()

    def __len__(self) -> int:
        return len(self._losses)

    def restart(self) -> None:
        """Time from now on: what was between is not training."""
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor, norm: torch.Tensor | float) -> None:
        """Take in a step: this worker's part of the loss, the gradient's norm."""
        self._losses.append(loss)
        self._norms.append(norm)

    def flush(self, stepper: Stepper, position: Position) -> dict[str, Any]:
        """Move the losses, summed over the workers, into the position; the event that tells of these steps."""
        plan, count = self._plan, len(self)
        losses = stepper.total(torch.stack(self._losses)).tolist()
        norms = [float(norm) for norm in self._norms]
        self._losses.clear()
        self._norms.clear()
        position.losses.extend(losses)
        if not all(map(math.isfinite, losses)):
            raise UserError(
                f"training diverged: no finite loss at step {position.step}; lower retrain.learning_rate."
            )
        seconds = time.perf_counter() - self._began
        self.restart()
        position.seconds += seconds
        steps = range(position.step - count, position.step)
        members = [plan.members(step) for step in steps]
        tokens = sum(int(plan.examples.lengths[part].sum()) for part in members)
        speed = {
            "documents_per_second": sum(map(len, members)) / max(seconds, 1e-9),
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": position.seconds,
        }
        log = [
            {
                "step": step + 1,
                "epoch": (step + 1) / plan.per_epoch,
                "loss": loss,
                "learning_rate": learning_rate(step, plan.total, plan.retrain),
                "grad_norm": norm,
                **speed,
            }
            for step, loss, norm in zip(steps, losses, norms, strict=True)
        ]
        return plan.event(position, log)


def _step(stepper: Stepper, plan: _Plan, step: int) -> tuple[torch.Tensor, torch.Tensor | float]:
    """One step over this worker's share: its part of the global batch's loss, a scalar; the gradient's norm."""
    loss = torch.zeros((), device=stepper.device)
    shares = worker_share(plan.examples.lengths, plan.members(step), stepper.rank, stepper.world, plan.passes)
    for members, weight in shares:
        batch = plan.batch(members).to(stepper.device)
        with training_attention(stepper.model.dtype, batch.input_ids):
            losses, _ = stepper.scores(batch)
            losses = losses * batch.weights
            # gradients are averaged over workers, the documents of a step are to be summed: hence * world
            stepper.backward(losses.sum() * (weight * stepper.world))
        loss = loss + losses.detach().sum() * weight
    return loss, stepper.step(learning_rate(step, plan.total, plan.retrain))


def _frozen(stepper: Stepper, documents: Examples, retrain: Retrain) -> Frozen | None:
    """What the frozen blocks give for the documents, where the recipe keeps it."""
    if not retrain.cache_frozen:
        return None
    require_constant(stepper.model, retrain.freeze_below)
    return frozen_states(stepper.model, retrain.freeze_below, documents.take(np.arange(len(documents))))


def _with_states(batch: Batch, frozen: Frozen | None, members: npt.NDArray[np.int64]) -> Batch:
    """The batch of the given documents with what the frozen blocks give for them."""
    return batch if frozen is None else replace(batch, entering=frozen.entering(members))


@torch.no_grad()
def _check_packing(stepper: Stepper, plan: _Plan) -> None:
    """Refuse a model in which packed documents see each other: two losses beside different neighbours differ.

    Every worker calls it; where documents are kept apart the two losses are equal to the last bit.
    """
    order = np.argsort(-plan.examples.lengths, kind="stable")
    pair = plan.examples.take(order[[0, -1]])
    probes = [pair, replace(pair, tokens=pair.tokens.copy())]
    start, stop = pair.offsets[:2]
    probes[1].tokens[start:stop] = (pair.tokens[start:stop] + 1) % (pair.tokens.max() + 1)
    seen = []
    for probe in probes:
        torch.manual_seed(0)  # equal dropout, if any
        try:
            batch = pack(probe, np.arange(2), 2 * plan.width).to(stepper.device)
            seen.append(stepper.scores(batch)[0][1].item())
        except (TypeError, ValueError) as error:
            raise UserError(
                f"retrain.packing: {type(stepper.model).__name__} takes no position ids "
                f"({first_line(error)}): leave packing off."
            ) from None
    if seen[0] != seen[1]:
        raise UserError(
            f"retrain.packing: in {type(stepper.model).__name__} packed documents see each other: leave packing off."
        )


@torch.no_grad()
def _judge(
    stepper: Stepper,
    validation: Examples,
    position: Position,
    plan: _Plan,
    classify: bool,
    frozen: Frozen | None,
) -> bool:
    """Judge the model on the validation documents; whether it is the best so far."""
    world, budget = stepper.world, plan.passes[1] * int(validation.lengths.max())
    sums = torch.zeros(2, dtype=torch.float64, device=stepper.device)
    stepper.model.eval()
    for group in length_batches(validation.lengths, budget * world):
        mine = group[stepper.rank :: world]
        weight = 1.0 / len(validation) if len(mine) else 0.0
        mine = mine if len(mine) else group[:1]
        batch = _with_states(pad(validation.take(mine), np.arange(len(mine))), frozen, mine)
        losses, hits = stepper.scores(batch.to(stepper.device), True)
        assert hits is not None
        sums += torch.stack([losses.double().sum(), hits.double().sum()]) * weight
    stepper.model.train()
    loss, accuracy = stepper.total(sums).tolist()
    epoch = position.step / plan.per_epoch
    position.validation.append({"step": position.step, "epoch": epoch, "loss": loss, "accuracy": accuracy})

    def merit(result: dict[str, float]) -> tuple[float, float]:
        return (result["accuracy"] if classify else 0.0, -result["loss"])

    best = position.best
    if best is not None and merit(position.validation[best]) >= merit(position.validation[-1]):
        return False
    position.best = len(position.validation) - 1
    return True


def _validation_line(position: Position) -> dict[str, Any]:
    last = position.validation[-1]
    return {
        "step": last["step"],
        "epoch": last["epoch"],
        "validation_loss": last["loss"],
        "validation_accuracy": last["accuracy"],
    }


def _patience_over(position: Position, retrain: Retrain) -> bool:
    if retrain.patience is None or position.best is None:
        return False
    return len(position.validation) - 1 - position.best >= retrain.patience


def metrics(position: Position, examples: Examples, retrain: Retrain) -> dict[str, Any]:
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
        "best": position.best,
        "seconds": position.seconds,
        "examples_per_second": position.step / per_epoch * n / max(position.seconds, 1e-9),
        "dtype": str(torch_dtype(retrain.dtype)).removeprefix("torch."),
    }
