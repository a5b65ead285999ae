"""Projector: the contract every projection keeps, and what its kinds share."""

from __future__ import annotations

import abc
import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

Side = Literal["row", "col"]
"""Rows of a weight meet the errors of a Linear, columns its inputs."""


@dataclass(frozen=True)
class LayerShape:
    """A chosen linear layer: its weight is (rows, cols) = (V vocabulary or L labels, H hidden)."""

    name: str
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.rows * self.cols


@dataclass
class State:
    """What `begin` opens and `finish` consumes: one layer's errors, held or already sketched."""

    layer: int
    values: Tensor


class Projector(abc.ABC):
    """A linear map of weight-shaped gradients to R^dim, fixed by (kind, dim, seed, layers).

    A document's gradient is the sum over its loss tokens of ``e_t h_t^T`` (docs/method.md, step 3). The errors
    ``e_t`` arrive in chunks over the rows, so no (tokens, V) array need exist; several layers add up::

        state = projector.begin(layer, n_tokens, device)
        for start_row, errors in chunks:
            projector.add_errors(state, errors, start_row)
        row += projector.finish(state, hidden, docs, n_docs)

    On the CPU a document's row depends, to the last bit, on its own tokens, the chunks' sizes and the number
    of threads alone: batch size, order and neighbours do not matter. Maps agree on every device; sums there
    may round differently.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        self.dim = dim
        self.seed = seed
        self.layers = tuple(layers)
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """The same projector with its tables on `device`."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def describe(self) -> dict[str, Any]:
        """JSON-able identity: equal descriptions mean the same map. For fingerprints and store attributes."""
        layers = [asdict(layer) for layer in self.layers]
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed, "layers": layers}

    @abc.abstractmethod
    def begin(self, layer: int, n_tokens: int, device: torch.device | str) -> State:
        """Open the state of one layer for `n_tokens` loss tokens."""

    @abc.abstractmethod
    def add_errors(self, state: State, errors: Tensor, start_row: int) -> None:
        """Add the errors of rows start_row, start_row + 1, ...

        Args:
            errors: (n_tokens, chunk) float32 or bfloat16. A transposed view of a contiguous (chunk, n_tokens)
                tensor is the fast layout: it spares tensorsketch a copy that costs more than its sums.
        """

    def rescale(self, state: State, factor: Tensor) -> None:
        """Multiply all errors added so far, token by token, by factor (n_tokens,)."""
        state.values *= factor[:, None]

    @abc.abstractmethod
    def add_entries(self, state: State, rows: Tensor, values: Tensor) -> None:
        """Add one more error to every token: values (n_tokens,) float32 at rows (n_tokens,) int64."""

    @abc.abstractmethod
    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """The projected gradient of every document for this layer.

        Args:
            hidden: (n_tokens, cols), the layer's inputs.
            docs: (n_tokens,) int64, ascending: the document a token belongs to. A document without tokens
                gets zeros.

        Returns:
            (n_docs, dim) float32.
        """

    def hold(self, layer: int, side: Side, values: Tensor) -> Tensor:
        """What `join` needs of one side's values (n_tokens, rows or cols), whichever comes first: (n_tokens, m).

        Inputs come with the forward pass and errors with the backward pass; what lies between is memory.
        """
        return values

    def join(self, layer: int, rows: Tensor, cols: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """`finish` from both sides as `hold` gave them."""
        state = self.begin(layer, len(docs), rows.device)
        self.add_errors(state, rows.float(), 0)
        return self.finish(state, cols.float(), docs, n_docs)

    @abc.abstractmethod
    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """The same map of a whole matrix, such as Delta, streamed by rows.

        Args:
            chunks: pairs (start_row, (n, cols) float32); rows that never come count as zero.

        Returns:
            (dim,) float64, summed in float64.
        """


class HoldsErrors(Projector):
    """Base of the projectors that need errors and inputs together: they keep the (n_tokens, rows) errors."""

    def begin(self, layer: int, n_tokens: int, device: torch.device | str) -> State:
        """See `Projector.begin`."""
        return State(layer, torch.zeros(n_tokens, self.layers[layer].rows, device=device))

    def add_errors(self, state: State, errors: Tensor, start_row: int) -> None:
        """See `Projector.add_errors`."""
        state.values[:, start_row : start_row + errors.shape[1]] += errors

    def add_entries(self, state: State, rows: Tensor, values: Tensor) -> None:
        """See `Projector.add_entries`."""
        state.values[torch.arange(len(rows), device=rows.device), rows] += values


def one_token_each(docs: Tensor, n_docs: int) -> bool:
    """Whether token i is document i's only one (loss scope last_token)."""
    return docs.shape[0] == n_docs and torch.equal(docs, torch.arange(n_docs, device=docs.device))


def token_bounds(docs: Tensor, n_docs: int) -> list[int]:
    """Document i owns tokens bounds[i] .. bounds[i + 1] - 1; n_docs + 1 numbers."""
    return torch.searchsorted(docs, torch.arange(n_docs + 1, device=docs.device)).tolist()


def gradients(errors: Tensor, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
    """Sum over each document's tokens of e_t h_t^T: (n_docs, rows * cols) float32, row-major.

    One product per document: batched, its rounding would depend on the other documents. Copies, because the
    rounding of a BLAS may depend on where in memory its operands begin.
    """
    if one_token_each(docs, n_docs):
        return (errors[:, :, None] * hidden[:, None, :]).flatten(1)
    result = errors.new_zeros(n_docs, errors.shape[1], hidden.shape[1])
    for doc, (start, stop) in enumerate(itertools.pairwise(token_bounds(docs, n_docs))):
        if stop > start:
            result[doc] = errors[start:stop].clone().t() @ hidden[start:stop].clone()
    return result.flatten(1)
