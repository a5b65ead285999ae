"""The loss of a document: what training lowers, what judging reads, and what gradients are taken of.

A document's loss is the mean over its own loss tokens (METHOD section 6), so that long documents count no more
than short ones.
"""

from __future__ import annotations

import torch
import transformers

from engine.encode import Encoder
from engine.frozen import states_above
from engine.head import find_head, hidden_states
from engine.padding import Batch
from engine.ragged import IGNORE, PENDING
from engine.soft import soft_cross_entropy


def label_rows(encoder: Encoder) -> list[int] | None:
    """Vocabulary rows of the softmax: the labels' in restricted classification, None for all of them."""
    return encoder.label_ids if encoder.label_ids and encoder.task.label_softmax == "restricted" else None


def document_losses(
    model: transformers.PreTrainedModel, batch: Batch, label_ids: list[int] | None = None
) -> torch.Tensor:
    """Loss of each document: the mean over its loss tokens, (docs,) float32; 0 without loss tokens.

    A token's loss is the cross entropy with its target, or with its soft target where the batch has those.
    Only states that carry loss go through the head. With `label_ids` the softmax is restricted to those rows.
    """
    losses, _ = document_scores(model, batch, label_ids)
    return losses


def document_scores(
    model: transformers.PreTrainedModel,
    batch: Batch,
    label_ids: list[int] | None = None,
    hits: bool = False,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`document_losses` and, with `hits`, the share of each document's targets that are the likeliest token.

    `temperature` is that of soft targets (`engine.soft`); hard ones have none.

    The output layer is called as a module, not by its weight, so that ZeRO-3 can gather the weight for it.
    """
    carries = batch.targets != IGNORE
    wanted, soft = batch.targets[carries], batch.soft_tokens
    assert PENDING not in wanted, "a label was never filled in"
    if batch.entering is None:
        states = hidden_states(model, batch.input_ids, batch.position_ids)[carries]
    else:
        states = states_above(model, batch.entering)[carries]
    z = model.get_output_embeddings()(states)
    if label_ids is not None:
        rows = torch.tensor(label_ids, device=z.device)
        z, wanted = z[:, rows], (wanted[:, None] == rows).int().argmax(1)
        soft = None if soft is None else (soft[:, :, None] == rows).int().argmax(2)
    logits = find_head(model).finish(z)
    if soft is None:
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    else:
        assert batch.soft_probs is not None
        losses = soft_cross_entropy(logits, soft, batch.soft_probs, temperature)
    right = (logits.detach().argmax(1) == wanted).float() if hits else None

    def mean(values: torch.Tensor) -> torch.Tensor:
        # scattered into (docs, tokens) and summed there: deterministic on a GPU, as index_add is not
        places = torch.arange(int(batch.counts.max()), device=z.device) < batch.counts[:, None]
        grid = torch.zeros(places.shape, device=z.device).masked_scatter(places, values)
        return grid.sum(1) / batch.counts.clamp(min=1)

    return mean(losses), None if right is None else mean(right)
