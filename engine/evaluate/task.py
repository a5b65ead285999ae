"""Task metrics: accuracy or perplexity of one model on held-out documents (docs/method.md, step 6)."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.encode import Encoder
from engine.errors import UserError
from engine.frozen import frozen_states, states_above
from engine.head import Head, find_head, hidden_states
from engine.padding import length_batches, pad
from engine.ragged import IGNORE, Ragged
from engine.rundir import fingerprint
from engine.spec import Task

CHUNK_LOGITS = 1 << 24
"""Logits held at a time (64 MiB in float32), whatever the vocabulary."""


@dataclass(frozen=True)
class TestSet:
    """n held-out documents: texts, label indices (n,) int64 or None, prompts without loss or None."""

    __test__ = False  # the name makes pytest take it for a test class

    texts: list[str]
    labels: npt.NDArray[np.int64] | None = None
    prompts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, members: npt.NDArray[np.int64]) -> TestSet:
        """The documents at the given positions, in that order."""
        return TestSet(
            [self.texts[i] for i in members],
            None if self.labels is None else self.labels[members],
            None if self.prompts is None else [self.prompts[i] for i in members],
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of documents, labels and prompts."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        labels = None if self.labels is None else self.labels.tolist()
        return fingerprint([digest.hexdigest(), labels, self.prompts])

    def at_most(self, n: int | None) -> TestSet:
        """n documents by content hash, so that a file sorted by label keeps its mix; all of them for None."""
        if n is None or n >= len(self):
            return self
        return self.take(np.sort(_by_hash(self._contents())[0][:n]))

    def split(self, share: float) -> tuple[TestSet, TestSet]:
        """(validation, test); see `split_validation`."""
        validation, test = split_validation(self._contents(), share)
        return self.take(validation), self.take(test)

    def _contents(self) -> list[str]:
        if self.prompts is None:
            return self.texts
        return [f"{prompt}\0{text}" for prompt, text in zip(self.prompts, self.texts, strict=True)]


def match_labels(values: Sequence[object], task: Task) -> npt.NDArray[np.int64]:
    """Label indices (n,) of a label column.

    A value is a label word or display name (case-insensitive), or an index from 0, as number or digits.
    A column in which every value is a name is read as names, so that digits may serve as label words.

    Raises:
        UserError: names the first value that is none of these.
    """
    names = {_label_key(name): i for words in (task.names, task.labels) for i, name in enumerate(words)}
    indices = {str(i): i for i in range(len(task.labels))}
    keys = [_label_key(value) for value in values]
    lookups = [names] if all(key in names for key in keys) else [indices, names]
    found = np.empty(len(keys), np.int64)
    for row, key in enumerate(keys):
        index = next((lookup[key] for lookup in lookups if key in lookup), None)
        if index is None:
            raise UserError(
                f"evaluate.label: {values[row]!r} (document {row} of the test set) is no label: "
                f"use {', '.join(task.names)}, or an index from 0 to {len(task.labels) - 1}."
            )
        found[row] = index
    return found


def split_validation(
    contents: Sequence[str], share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split documents by content hash: equal documents fall on one side, whatever their order in the file.

    Args:
        contents: n documents.
        share: of the documents, in [0, 1), for validation. Above 0, each side gets a document where n allows.

    Returns:
        positions of the validation and of the test documents, each ascending.
    """
    order, group = _by_hash(contents)
    n_groups = int(group[-1]) + 1 if len(group) else 0
    wanted = min(round(share * len(contents)), len(contents))
    # The whole groups of equal documents that fit into the share, by hash.
    n_taken = int(np.searchsorted(np.flatnonzero(np.diff(group, append=n_groups)) + 1, wanted, side="right"))
    n_taken = min(max(n_taken, int(share > 0)), max(0, n_groups - 1))
    return np.sort(order[group < n_taken]), np.sort(order[group >= n_taken])


@torch.inference_mode()
def evaluate_model(
    model: transformers.PreTrainedModel,
    encoder: Encoder,
    test: TestSet,
    tokens_per_batch: int,
    label_softmax: Literal["restricted", "full"] = "restricted",
    frozen_below: int = 0,
) -> dict[str, Any]:
    """Accuracy (classification) or perplexity (language modelling) of a model.

    Only states that carry loss go through the head, `CHUNK_LOGITS` logits at a time. Batches are by length:
    the budget changes speed and the last digits, nothing else. A model in training mode is put back into it.

    Args:
        model: a causal model on any device.
        encoder: the encoder that extraction and retraining use.
        test: the documents; labels are required for classification.
        tokens_per_batch: padded tokens in one forward pass.
        label_softmax: softmax of the classification loss: over label words, or over the whole vocabulary.
        frozen_below: keep what the blocks below this one give, for the next model in which they are the same; 0:
            keep nothing. The batches are those of the plain way, and so is every number.

    Returns:
        Classification: accuracy (argmax over the label words), loss (mean cross-entropy), documents, tokens,
        per_label (recall, None without documents), confusion (by true label, then by the predicted one).
        Language modelling: perplexity = exp(total loss / total tokens), loss = its logarithm, documents,
        tokens (that carry loss), skipped (documents without any).
        A metric is None, and non_finite counts the culprits, when a model yields NaN or infinite logits.

    Raises:
        UserError: no labels for classification, or no document to judge.
    """
    if encoder.task.kind == "classification" and test.labels is None:
        raise UserError("evaluate.label: classification needs a label for every document of the test set.")
    ragged = encoder.encode(test.texts, test.prompts)
    if ragged.problems:
        row, why = min(ragged.problems.items())
        raise UserError(f"evaluate.test: document {row} cannot be used: {why}: mend or remove it.")
    judged = np.flatnonzero(_loss_tokens(ragged) > 0)
    if len(judged) == 0:
        raise UserError("evaluate.test: no document of the test set has a token that carries loss.")
    was_training = model.training
    model.eval()
    try:
        states = _states(model, ragged.take(judged), judged, tokens_per_batch, frozen_below)
        if test.labels is not None and encoder.task.kind == "classification":
            result = _accuracy(find_head(model), states, test.labels, encoder.label_ids, label_softmax)
            result["tokens"] = int(ragged.lengths[judged].sum())
        else:
            result = _perplexity(find_head(model), states)
            result |= {"documents": len(judged), "skipped": len(test) - len(judged)}
        return result
    finally:
        model.train(was_training)


States = Iterator[tuple[npt.NDArray[np.int64], torch.Tensor, torch.Tensor]]
"""Per batch: document of each state (n,), states (n, hidden), targets (n,) int64."""


def _states(
    model: transformers.PreTrainedModel,
    ragged: Ragged,
    judged: npt.NDArray[np.int64],
    tokens_per_batch: int,
    frozen_below: int,
) -> States:
    """States of the documents in `ragged`, which are those at the positions `judged` of the test set."""
    frozen = frozen_states(model, frozen_below, ragged, tokens_per_batch) if frozen_below else None
    for group in length_batches(ragged.lengths, tokens_per_batch):
        batch = pad(ragged, group)
        carries = batch.targets != IGNORE
        if frozen is None:
            hidden = hidden_states(model, batch.input_ids.to(model.device))
        else:
            hidden = states_above(model, frozen.entering(group).to(model.device))
        documents = judged[group][carries.nonzero()[:, 0].numpy()]
        yield documents, hidden[carries.to(model.device)], batch.targets[carries].to(model.device)


def _accuracy(
    head: Head,
    states: States,
    labels: npt.NDArray[np.int64],
    label_ids: list[int],
    label_softmax: Literal["restricted", "full"],
) -> dict[str, Any]:
    ids = torch.tensor(label_ids, device=head.weight.device)
    confusion = np.zeros((len(label_ids), len(label_ids)), np.int64)
    total, non_finite = 0.0, 0
    for documents, hidden, _ in states:
        true = labels[documents]
        on_device = torch.from_numpy(true).to(hidden.device)
        logits = head.label_logits(hidden, ids)
        if label_softmax == "restricted":
            losses = _cross_entropy(logits, on_device)
        else:
            losses = _losses(head, hidden, ids[on_device])
        # numpy's argmax, unlike torch's, promises the first of equal values.
        np.add.at(confusion, (true, logits.cpu().numpy().argmax(axis=1)), 1)
        total += float(losses.sum())
        non_finite += int((~np.isfinite(losses)).sum())
    n, per_label = int(confusion.sum()), confusion.sum(axis=1)
    recall = [float(confusion[i, i] / per_label[i]) if per_label[i] else None for i in range(len(label_ids))]
    return {
        "accuracy": None if non_finite else float(np.trace(confusion) / n),
        "loss": None if non_finite else total / n,
        "documents": n,
        "non_finite": non_finite,
        "per_label": recall,
        "confusion": confusion.tolist(),
    }


def _perplexity(head: Head, states: States) -> dict[str, Any]:
    total, n, non_finite = 0.0, 0, 0
    for _, hidden, targets in states:
        losses = _losses(head, hidden, targets)
        total += float(losses.sum())
        n += len(losses)
        non_finite += int((~np.isfinite(losses)).sum())
    loss = None if non_finite else total / n
    perplexity = math.exp(loss) if loss is not None and loss < 700 else None  # beyond: no float64
    return {"perplexity": perplexity, "loss": loss, "tokens": n, "non_finite": non_finite}


def _losses(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> npt.NDArray[np.float64]:
    """Cross-entropy (n,) over the whole vocabulary, a bounded number of logits at a time."""
    rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return np.concatenate([_cross_entropy(head.logits(states), wanted) for states, wanted in pieces])


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> npt.NDArray[np.float64]:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()


def _loss_tokens(ragged: Ragged) -> npt.NDArray[np.int64]:
    """Tokens that carry loss, (n,)."""
    counts = np.zeros(len(ragged.targets) + 1, np.int64)
    np.cumsum(ragged.targets != IGNORE, out=counts[1:])
    return np.diff(counts[ragged.offsets])


def _by_hash(contents: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions in order of content hash (ties by position), and the number of each one's group of equals."""
    hashes = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in contents]
    order = sorted(range(len(hashes)), key=lambda i: (hashes[i], i))
    new = [i > 0 and hashes[order[i]] != hashes[order[i - 1]] for i in range(len(order))]
    return np.array(order, np.int64), np.cumsum(np.array(new, np.int64))


def _label_key(value: object) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)  # a column with gaps turns indices into floats
    return str(value).strip().casefold()
