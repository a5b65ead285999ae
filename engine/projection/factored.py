"""Factored: a two-sided random projection of each layer, for gradients of many layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from engine.projection.base import LayerShape, Projector, Side, State, token_bounds
from engine.projection.hashing import VERSION, buckets_and_signs, splitmix64_tensor, stream_key
from engine.projection.tensorsketch import Groups, group, group_sums

MANY = 8
"""Layers from which the errors of single layers have averaged out enough (docs/decisions.md)."""

LAYERS_AT_ONE = 256
"""Layers from which a layer needs no more entries than the sum of all has: see `entries`."""


def entries(n_layers: int, dim: int) -> int:
    """Entries p q of one layer's projection: dim times a power of two, 1 to 16; the fewer layers, the more."""
    return dim * min(16, max(1, 2 ** int(math.log2(LAYERS_AT_ONE / n_layers))))


class Factored(Projector):
    """A layer's gradient G (rows, cols) becomes ``S G R^T``: S (p, rows), R (q, cols) of +-1/sqrt(p), +-1/sqrt(q).

    A token costs two thin matrix products, ``S e`` and ``R h``, and a document one of p x q, where
    `TensorSketch` takes two Fourier transforms a token and layer (LoGra's two-sided projection, Choe et al.
    2024, summed over layers as gradients of one model rather than kept apart). The p q numbers are added to
    the dim of all layers, by a count sketch where they are more than dim. A side with no more than p (q)
    numbers is kept as it is. Inner products of gradients X, Y of one layer are unbiased, with variance about::

        (|X Y'|^2 + tr((X Y')^2)) / p + (|X' Y|^2 + tr((X' Y)^2)) / q
            + (|X Y'|^2 + |X' Y|^2 + |X|^2 |Y|^2 + <X,Y>^2) / (p q) + (|X|^2 |Y|^2 + <X,Y>^2) / dim

    The first two are those of one side alone: large for a single layer whose hidden states lean one way, and
    divided by the number of layers when equally strong layers add up. Hence p > q (hidden states are more
    alike than errors), p and q that grow as layers get fewer, and at least MANY layers where `auto` chooses.
    Matrix products round by the shape of the batch: company changes a row by float32 rounding.
    """

    kind = "factored"

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        super().__init__(dim, seed, layers)
        size = entries(len(layers), dim)
        self.q = max(1, 2 ** int(math.log2(math.sqrt(size) / 2)))
        self.p = size // self.q
        self._signs: dict[tuple[int, Side], Tensor] = {}
        self._hashes: dict[int, Groups] = {}

    def to(self, device: torch.device | str) -> Self:
        """See `Projector.to`; tables are made at their first use."""
        moved = super().to(device)
        moved._signs, moved._hashes = {}, {}
        return moved

    def describe(self) -> dict[str, Any]:
        """See `Projector.describe`."""
        return {**super().describe(), "p": self.p, "q": self.q, "hash": VERSION}

    def begin(self, layer: int, n_tokens: int, device: torch.device | str) -> State:
        """See `Projector.begin`; the state is S e of the errors so far, (n_tokens, at most p)."""
        return State(layer, torch.zeros(n_tokens, self._width(layer, "row"), device=device))

    def add_errors(self, state: State, errors: Tensor, start_row: int) -> None:
        """See `Projector.add_errors`."""
        stop = start_row + errors.shape[1]
        if self._reduces(state.layer, "row"):
            state.values += self._product(state.layer, "row", errors, slice(start_row, stop))
        else:
            state.values[:, start_row:stop] += errors

    def add_entries(self, state: State, rows: Tensor, values: Tensor) -> None:
        """See `Projector.add_entries`."""
        if self._reduces(state.layer, "row"):
            signs = self._matrix(state.layer, "row", values.device)[rows]
            state.values += values[:, None] / math.sqrt(self.p) * signs
        else:
            state.values[torch.arange(len(rows), device=rows.device), rows] += values

    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.finish`."""
        return self.join(state.layer, state.values, self.hold(state.layer, "col", hidden), docs, n_docs)

    def hold(self, layer: int, side: Side, values: Tensor) -> Tensor:
        """See `Projector.hold`: S e or R h, float32, so little that inputs of all layers fit in memory."""
        if not self._reduces(layer, side):
            return values.float()
        return self._product(layer, side, values, slice(0, values.shape[1]))

    def join(self, layer: int, rows: Tensor, cols: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.join`."""
        flat = _outer(rows, cols, token_bounds(docs, n_docs)).flatten(1)
        if self._in_place(layer):
            return torch.nn.functional.pad(flat, (0, self.dim - flat.shape[1]))
        return group_sums(flat.t().contiguous(), self._hash(layer, flat.device)).t()

    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """See `Projector.project_matrix`."""
        shape = self._width(layer, "row"), self._width(layer, "col")
        total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for start, chunk in chunks:
            rows, values = slice(start, start + len(chunk)), chunk.to(self.device, torch.float64)
            if self._reduces(layer, "col"):
                signs = self._matrix(layer, "col", self.device).double()
                values = values @ signs / math.sqrt(self.q)
            if self._reduces(layer, "row"):
                signs = self._matrix(layer, "row", self.device)[rows].double()
                total += signs.t() @ values / math.sqrt(self.p)
            else:
                total[rows] += values
        flat = total.flatten()
        if self._in_place(layer):
            return torch.nn.functional.pad(flat, (0, self.dim - len(flat)))
        return group_sums(flat[:, None], self._hash(layer, self.device))[:, 0]

    def _reduces(self, layer: int, side: Side) -> bool:
        """Whether this side of a layer is longer than what it would be projected to."""
        shape = self.layers[layer]
        return shape.rows > self.p if side == "row" else shape.cols > self.q

    def _width(self, layer: int, side: Side) -> int:
        shape = self.layers[layer]
        return min(shape.rows, self.p) if side == "row" else min(shape.cols, self.q)

    def _in_place(self, layer: int) -> bool:
        """Whether entries need no hash: they fit, and random signs of both sides make layers independent."""
        return self._reduces(layer, "row") and self._reduces(layer, "col") and self.p * self.q <= self.dim

    def _product(self, layer: int, side: Side, values: Tensor, rows: slice) -> Tensor:
        """values (tokens, n) times the signs of these n rows, scaled: (tokens, p or q) float32.

        bfloat16 stays bfloat16: its product is four times as fast here, on a GPU more, and rounds once.
        """
        values = values if values.dtype == torch.bfloat16 else values.float()
        signs = self._matrix(layer, side, values.device)[rows].to(values.dtype)
        return (values @ signs).float() / math.sqrt(self.p if side == "row" else self.q)

    def _matrix(self, layer: int, side: Side, device: torch.device) -> Tensor:
        """Signs of one side, (rows, p) or (cols, q) int8; bit b of word w of row i signs entry 64 w + b."""
        if (layer, side) not in self._signs:
            shape = self.layers[layer]
            n, width = (shape.rows, self.p) if side == "row" else (shape.cols, self.q)
            words = -(-width // 64)
            counters = torch.arange(n * words, device=device).view(n, words, 1)
            random = splitmix64_tensor(stream_key(self.seed, layer, f"factored/{side}"), counters)
            bits = (random >> torch.arange(64, device=device)) & 1
            self._signs[layer, side] = (1 - 2 * bits).to(torch.int8).flatten(1)[:, :width].contiguous()
        return self._signs[layer, side]

    def _hash(self, layer: int, device: torch.device) -> Groups:
        if layer not in self._hashes:
            n = self._width(layer, "row") * self._width(layer, "col")
            buckets, signs = buckets_and_signs(self.seed, layer, "entry", n, self.dim)
            self._hashes[layer] = group(buckets.to(device), signs.to(device), self.dim)
        return self._hashes[layer]


def _outer(rows: Tensor, cols: Tensor, bounds: list[int]) -> Tensor:
    """Sum over each document's tokens of row x col: (documents, p, q) float32."""
    lengths = {stop - start for start, stop in itertools.pairwise(bounds)}
    if len(lengths) == 1 and len(rows):
        n = len(bounds) - 1
        return torch.bmm(rows.unflatten(0, (n, -1)).transpose(1, 2), cols.unflatten(0, (n, -1)))
    result = rows.new_zeros(len(bounds) - 1, rows.shape[1], cols.shape[1])
    for doc, (start, stop) in enumerate(itertools.pairwise(bounds)):
        torch.mm(rows[start:stop].t(), cols[start:stop], out=result[doc])
    return result
