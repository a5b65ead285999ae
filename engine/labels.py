"""Autolabel: what the fine-tuned model says about a document (docs/method.md, step 1), from states already computed."""

from __future__ import annotations

import torch

from engine.head import Head


def best_labels(head: Head, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
    """Label (docs,) int64 of documents, from the states of their last prompt tokens.

    The most likely label word, in float32, whatever rows the loss's softmax has: evaluation asks the same.

    Args:
        hidden: (docs, hidden) states that enter the head.
        label_ids: (L,) vocabulary ids of the label words.
    """
    return head.label_logits(hidden, label_ids).argmax(1)
