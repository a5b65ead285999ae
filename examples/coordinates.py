"""A projector of one's own, in one file: d entries of the gradient, drawn once, scaled to be unbiased.

    PYTHONPATH=examples unbake recover run.yaml --gradients.projector coordinates:Coordinates

It costs next to nothing and has far more variance than TensorSketch: most entries of a gradient are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.projection.base import HoldsErrors, LayerShape, State


class Coordinates(HoldsErrors):
    """sqrt(size / dim) times entries of all layers together, the same ones on every machine."""

    kind = "coordinates"

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        super().__init__(dim, seed, layers)
        size = sum(layer.size for layer in layers)
        flat = torch.randint(0, size, (dim,), generator=torch.Generator().manual_seed(seed))
        self.factor = (size / dim) ** 0.5
        self.where: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # of each layer: place in the result, row, column
        start = 0
        for layer in layers:
            place = ((flat >= start) & (flat < start + layer.size)).nonzero()[:, 0]
            entry = flat[place] - start
            self.where.append((place, entry // layer.cols, entry % layer.cols))
            start += layer.size

    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.finish`: entry (r, c) of a gradient is sum_t e_t[r] h_t[c]."""
        place, row, col = (index.to(hidden.device) for index in self.where[state.layer])
        entries = state.values[:, row] * hidden.float()[:, col] * self.factor
        result = entries.new_zeros(n_docs, self.dim)
        result[:, place] = entries.new_zeros(n_docs, place.numel()).index_add(0, docs, entries)
        return result

    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """See `Projector.project_matrix`."""
        result = torch.zeros(self.dim, dtype=torch.float64)
        place, row, col = self.where[layer]
        for start, chunk in chunks:
            inside = (row >= start) & (row < start + len(chunk))
            values = chunk.cpu().double()[row[inside] - start, col[inside]]
            result[place[inside]] += self.factor * values
        return result.to(self.device)
