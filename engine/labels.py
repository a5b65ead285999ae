"""Autolabel: what the fine-tuned model says about a document (METHOD section 1), from states already computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.models import Head


@dataclass(frozen=True)
class Classified:
    """One prediction a document.

    label (docs,) int64; columns (L,) int64, where the labels stand in the softmax; log_probs, logits
    (docs, rows) float32 of the softmax used.
    """

    label: torch.Tensor
    columns: torch.Tensor
    log_probs: torch.Tensor
    logits: torch.Tensor


def classify(
    head: Head, hidden: torch.Tensor, label_ids: torch.Tensor, restricted: bool, vocab: int
) -> Classified:
    """Label documents from the states of their last prompt tokens.

    Args:
        hidden: (docs, hidden) states that enter the head.
        label_ids: (L,) vocabulary ids of the label words.
        restricted: softmax over the L labels; else over the first `vocab` rows. The label is the best label
            word in either case.
    """
    if restricted:
        logits = head.label_logits(hidden, label_ids)
        columns = torch.arange(len(label_ids), device=hidden.device)
    else:
        logits = head.logits(hidden, slice(0, vocab))
        columns = label_ids
    return Classified(logits[:, columns].argmax(1), columns, torch.log_softmax(logits, 1), logits)
