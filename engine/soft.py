"""Soft labels: the fine-tuned model's own distribution as the target of retraining, and the loss against it.

A target is the distribution truncated to its K largest probabilities; the mass that lacks to 1 stays a target
too, of all other tokens together. The loss is then the cross entropy of the two distributions over K + 1
outcomes: at K = vocabulary that of the whole distributions, at a one-hot target that of a hard label, and for
any K smallest where the model gives the K tokens, and the rest together, their target's probability. (A target
renormalised to the K tokens would ask the model to give the others nothing.)

At a temperature t (Hinton, Vinyals, Dean: arXiv 1503.02531) both are distributions of logits / t, and the loss counts
t^2 times, which keeps its gradients at one scale. As t grows the loss becomes that of matching centred logits.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers

from engine.head import find_head, hidden_states
from engine.padding import length_batches, pad
from engine.ragged import IGNORE, Ragged, Soft

CHUNK_LOGITS = 1 << 24
"""Logits held at a time (64 MiB in float32), whatever the vocabulary."""


def soft_cross_entropy(
    logits: torch.Tensor, columns: torch.Tensor, probs: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross entropy (n,) of truncated targets.

    ``-t^2 (sum_k p_k log q_k + (1 - sum_k p_k) log(1 - sum_k q_k))`` with ``q = softmax(logits / t)``; the last
    term is that of the columns not named, and absent when all are.

    Args:
        logits: (n, rows) float32.
        columns: (n, K) int64, distinct in a row.
        probs: (n, K) float32, each row's sum at most 1 but for rounding; made at the same temperature.
        temperature: t.
    """
    logits = logits / temperature
    total = torch.logsumexp(logits, 1)
    losses = (probs * (total[:, None] - logits.gather(1, columns))).sum(1)
    if columns.shape[1] < logits.shape[1]:
        # through the other logits: 1 - sum q would lose all digits where the model is sure
        others = torch.logsumexp(logits.scatter(1, columns, -torch.inf), 1)
        losses = losses + (1 - probs.sum(1)).clamp(min=0) * (total - others)
    return temperature**2 * losses


@torch.inference_mode()
def soft_labels(
    model: transformers.PreTrainedModel,
    examples: Ragged,
    label_ids: list[int] | None,
    top_k: int,
    vocab: int,
    temperature: float = 1.0,
    tokens_per_batch: int = 4096,
) -> Soft:
    """The model's distribution, softmax(logits / temperature), at every loss token of the documents.

    Args:
        model: theta_f.
        label_ids: vocabulary ids of the labels in restricted classification: the distribution over those, in
            their order, whatever `top_k`. None: over the first `vocab` tokens, cut to the `top_k` likeliest.
        vocab: rows of the vocabulary that the trained model has too.
    """
    head = find_head(model)
    width = min(top_k, vocab) if label_ids is None else len(label_ids)
    first = examples.loss_offsets
    result = Soft(np.zeros((int(first[-1]), width), np.int32), np.zeros((int(first[-1]), width), np.float32))
    ids = torch.tensor(label_ids or [], dtype=torch.int64, device=model.device)
    for members in length_batches(examples.lengths, tokens_per_batch):
        batch = pad(examples, members).to(model.device)
        states = hidden_states(model, batch.input_ids)[batch.targets != IGNORE]
        rows = np.concatenate([np.arange(first[i], first[i + 1]) for i in members])
        step = max(1, CHUNK_LOGITS // vocab)
        for start in range(0, len(states), step):
            part, where = states[start : start + step], rows[start : start + step]
            if label_ids is None:
                logits = head.logits(part, slice(0, vocab))
                probs, tokens = (logits / temperature).softmax(1).topk(width, 1)
            else:
                logits, tokens = head.label_logits(part, ids), ids.expand(len(part), -1)
                probs = (logits / temperature).softmax(1)
            result.tokens[where] = tokens.cpu().numpy()
            result.probs[where] = probs.cpu().numpy()
    return result
