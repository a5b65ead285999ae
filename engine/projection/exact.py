"""Exact: the flattened gradient itself, where it is small enough to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.errors import UserError
from engine.projection.base import HoldsErrors, LayerShape, State, gradients

MAX_DIM = 2**24  # 64 MiB a document in float32


class Exact(HoldsErrors):
    """No projection: layer by layer, row-major. In classification L x H entries (docs/method.md, step 4)."""

    kind = "exact"

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        """`dim` and `seed` are ignored: the dim is the number of entries of all layers, the seed 0."""
        self.offsets = [0]
        for layer in layers:
            self.offsets.append(self.offsets[-1] + layer.size)
        if self.offsets[-1] > MAX_DIM:
            raise UserError(
                f"gradients.projector=exact would store {self.offsets[-1]:,} numbers for each document: "
                "use tensorsketch, or auto."
            )
        super().__init__(self.offsets[-1], 0, layers)

    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.finish`."""
        flat = gradients(state.values, hidden.float(), docs, n_docs)
        if len(self.layers) == 1:
            return flat
        result = flat.new_zeros(n_docs, self.dim)
        result[:, self.offsets[state.layer] : self.offsets[state.layer + 1]] = flat
        return result

    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """See `Projector.project_matrix`."""
        result = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for start_row, chunk in chunks:
            start = self.offsets[layer] + start_row * self.layers[layer].cols
            result[start : start + chunk.numel()] += chunk.to(self.device).flatten()
        return result
