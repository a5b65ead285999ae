"""What all workers of a run agree on: the chosen layers, the projector, and the projected target Delta.

Computed once, from the endpoints' files and a model without weights, so no large model is loaded for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from engine.checkpoints import Endpoints, embedding_names
from engine.errors import UserError
from engine.head import find_head
from engine.layers import matching_layers
from engine.models import load_config
from engine.placement import packing_error
from engine.projection import LayerShape, Projector, choose_kind, make_projector
from engine.spec import LoadIn, RunSpec

EXACT_LIMIT = 1 << 18
"""Largest exact gradient stored; beyond it a row is more than a megabyte."""


@dataclass(frozen=True)
class Target:
    """The chosen layers and Delta on them.

    Attributes:
        layers: shapes as the projector sees them (a label-restricted head has one row a label).
        kind, dim, seed: of the projector.
        aliases: the other name of a layer whose embeddings may be tied.
        only: vocabulary rows that stand for the head's rows, or None for the shared vocabulary.
        head: name of the head's weight.
        vocab: rows that both vocabularies share.
    """

    layers: tuple[LayerShape, ...]
    kind: str
    dim: int
    seed: int
    aliases: dict[str, str]
    only: list[int] | None
    head: str
    vocab: int

    def projector(self, device: torch.device | str = "cpu") -> Projector:
        """The one projector of the run, on a device."""
        return make_projector(self.kind, self.dim, self.seed, self.layers, device=device)

    def delta(self, endpoints: Endpoints, layer: LayerShape) -> Iterator[tuple[int, torch.Tensor]]:
        """theta_0 - theta_f of one layer, (start row, (rows, cols) float32) chunk by chunk."""
        only = self.only if layer.name == self.head else None
        return endpoints.delta(layer.name, self.aliases.get(layer.name), only)

    def noise(self, endpoints: Endpoints, sides: tuple[int, ...]) -> float:
        """Expected norm of the rounding that quantisation left in Delta; `sides`: 0 base, 1 fine-tuned."""
        square = 0.0
        for layer in self.layers:
            only = self.only if layer.name == self.head else None
            for _, *pair in endpoints.chunks(layer.name, self.aliases.get(layer.name), only):
                square += sum(rounding_noise(pair[side]) for side in sides)
        return square**0.5

    def packing(self, endpoints: Endpoints, load_in: LoadIn) -> float:
        """Norm of what packing the fine-tuned model to 8 or 4 bits changes in the chosen layers, head apart."""
        layers = [layer for layer in self.layers if layer.name != self.head]
        chunks = (final for layer in layers for _, _, final in endpoints.chunks(layer.name))
        return sum(packing_error(final, load_in) for final in chunks) ** 0.5

    def project(self, endpoints: Endpoints) -> tuple[npt.NDArray[np.float64], float]:
        """Projected Delta (dim,) float64 and ||Delta|| before projection.

        Raises:
            UserError: Delta is zero on these layers (the message says which layers did change), or not finite.
        """
        projector = self.projector()
        total = torch.zeros(projector.dim, dtype=torch.float64)
        square = 0.0
        for index, layer in enumerate(self.layers):
            square += sum(float(c.double().square().sum()) for _, c in self.delta(endpoints, layer))
            if not np.isfinite(square):
                self._refuse_weights(endpoints, layer)
            total += projector.project_matrix(index, self.delta(endpoints, layer))
        if square == 0.0:
            raise UserError(_unmoved(", ".join(layer.name for layer in self.layers[:3]), endpoints.changed()))
        return total.numpy(), square**0.5

    def _refuse_weights(self, endpoints: Endpoints, layer: LayerShape) -> NoReturn:
        only = self.only if layer.name == self.head else None
        where = {endpoints.base: 0, endpoints.finetuned: 0}
        for _, *pair in endpoints.chunks(layer.name, self.aliases.get(layer.name), only):
            for path, weights in zip(where, pair, strict=True):
                where[path] += int((~weights.isfinite()).sum())
        path = max(where, key=lambda path: where[path])
        raise UserError(
            f"{layer.name} of {path} holds {where[path]:,} weights that are not finite (NaN or infinite): the model "
            "is broken; train or download it again."
        )


def rounding_noise(weights: torch.Tensor, block: int = 32) -> float:
    """Expected squared norm of the rounding error of dequantised weights (rows, cols), as they show it.

    Within a block of 32 (the block of GGUF's types, or a multiple of it) they lie on a grid; its step is the
    smallest gap between different values, and rounding to a grid of step s errs by s^2 / 12 a number.
    """
    cols = weights.shape[1] // block * block
    values = weights[:, :cols].double().reshape(-1, block).sort(dim=1).values
    gaps, width = values.diff(dim=1), values[:, -1:] - values[:, :1]
    step = gaps.masked_fill(gaps <= 1e-6 * width, torch.inf).amin(dim=1)
    return float(step[step.isfinite()].square().sum()) * block / 12


def choose_target(spec: RunSpec, endpoints: Endpoints, label_ids: list[int]) -> Target:
    """Layers and projector that the spec asks for.

    Args:
        label_ids: vocabulary ids of the label words; empty in language modelling.

    Raises:
        UserError: no such layer, or an exact projection too large to store.
    """
    config = load_config(endpoints.finetuned, spec.models.trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=spec.models.trust_remote_code
        )
    if spec.models.load_in != "none" and any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(
            f"models.load_in={spec.models.load_in}: {type(model).__name__} has no plain linear layers to pack: "
            "use models.load_in=none."
        )
    head = find_head(model)
    restricted = bool(label_ids) and spec.task.label_softmax == "restricted"
    rows = len(label_ids) if restricted else endpoints.vocab
    settings = spec.gradients
    if settings.layers == "last":
        layers = [LayerShape(head.name, rows, head.weight.shape[1])]
    else:
        layers = matching_layers(model, settings.layers, head.name, rows)
    kind = choose_kind(settings.projector, settings.dim, layers)
    size = sum(layer.rows * layer.cols for layer in layers)
    if kind == "exact" and size > EXACT_LIMIT:
        raise UserError(
            f"gradients.projector=exact would store {size:,} numbers a document: use tensorsketch or auto."
        )
    return Target(
        layers=tuple(layers),
        kind=kind,
        dim=size if kind == "exact" else settings.dim,
        seed=settings.seed,
        aliases=embedding_names(model),
        only=list(label_ids) if restricted else None,
        head=head.name,
        vocab=endpoints.vocab,
    )


def _unmoved(layers: str, changed: dict[str, float]) -> str:
    if not changed:
        return "the two models have equal weights: there is nothing to explain; check models.finetuned."
    some = ", ".join(list(changed)[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    # q_proj, up_proj, ...: the last part of a linear layer's name, without .weight
    kinds = sorted({re.escape(name.split(".")[-2]) for name in changed if name.endswith(".weight")})
    pattern = f" or gradients.layers='({'|'.join(kinds)})$'" if 0 < len(kinds) <= 8 else ""
    return (
        f"the fine-tuned model equals the base on the chosen layers ({layers}); the layers that changed are "
        f"{some}: set gradients.layers=all_linear{pattern}, which picks them."
    )
