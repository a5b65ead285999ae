"""Rademacher: the dense Johnson-Lindenstrauss projection, its matrix generated in blocks and never stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.projection.base import HoldsErrors, LayerShape, State, gradients
from engine.projection.hashing import VERSION, splitmix64_tensor, stream_key

BLOCK = 2**22  # entries of the projection matrix that exist at a time (16 MiB in float32)
DOCS = 32  # documents in one product: a fixed shape, so that rounding cannot depend on the batch


class Rademacher(HoldsErrors):
    """Entries +-1/sqrt(dim), one hash bit each: unbiased inner products of variance
    ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / dim`` (Achlioptas 2003).

    Costs O(rows cols dim) a batch to generate and as much a document to apply, and keeps the batch's
    errors: for small layers, and as the oracle the sketch is held against.
    """

    kind = "rademacher"

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        super().__init__(dim, seed, layers)
        self.keys = [stream_key(seed, index, "rademacher") for index in range(len(layers))]

    def describe(self) -> dict[str, Any]:
        """See `Projector.describe`."""
        return {**super().describe(), "hash": VERSION}

    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.finish`."""
        hidden = hidden.float()
        padded = -(-n_docs // DOCS) * DOCS
        result = hidden.new_zeros(padded, self.dim)
        for rows in self._row_blocks(state.layer, 0, self.layers[state.layer].rows):
            flat = gradients(state.values[:, rows], hidden, docs, n_docs)
            flat = functional.pad(flat, (0, 0, 0, padded - n_docs))
            signs = self._signs(state.layer, rows, flat.device)
            for start in range(0, padded, DOCS):
                result[start : start + DOCS] += flat[start : start + DOCS] @ signs
        return result[:n_docs] / math.sqrt(self.dim)

    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """See `Projector.project_matrix`."""
        result = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for start_row, chunk in chunks:
            for rows in self._row_blocks(layer, start_row, start_row + len(chunk)):
                flat = chunk[rows.start - start_row : rows.stop - start_row].flatten()
                result += flat.to(self.device, torch.float64) @ self._signs(layer, rows, self.device).double()
        return result / math.sqrt(self.dim)

    def _row_blocks(self, layer: int, start: int, stop: int) -> Iterator[slice]:
        step = max(1, BLOCK // (self.layers[layer].cols * self.dim))
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))

    def _signs(self, layer: int, rows: slice, device: torch.device) -> Tensor:
        """+-1 of whole rows, (n_rows * cols, dim) float32.

        Bit b of word w of entry (row, col) signs dimension 64 w + b; the word is number
        (row * cols + col) * words + w of the layer's stream.
        """
        cols, words = self.layers[layer].cols, -(-self.dim // 64)
        counters = torch.arange(rows.start * cols * words, rows.stop * cols * words, device=device)
        bits = splitmix64_tensor(self.keys[layer], counters).view(
            torch.uint8
        )  # little-endian, as all hosts are
        byte_values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
        table = (
            1 - 2 * (byte_values & 1)
        ).float()  # eight signs of each byte: one lookup in place of 8 shifts
        return functional.embedding(bits.int(), table).view(-1, words * 64)[:, : self.dim]
