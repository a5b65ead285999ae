"""TensorSketch: sketches of outer products in O(V + H + d log d) a token, without ever forming one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import UserError
from engine.projection.base import LayerShape, Projector, State, token_bounds
from engine.projection.hashing import PRIME, VERSION, buckets_and_signs

BLOCK = 64  # tokens (columns) transformed at a time: their spectra stay in cache
GPU_BLOCK = 4096  # there, few large kernels


class Groups(NamedTuple):
    """Rows of an array sorted by bucket: `order` lists them, bucket b's begin at `starts[b]`."""

    order: Tensor
    starts: Tensor
    signs: Tensor | None


class TensorSketch(Projector):
    """Entry (v, w) of a gradient goes to bucket ``(a(v) + b(w)) mod dim`` with sign ``s(v) r(w)``.

    The sketch of ``e h^T`` is the circular convolution of the count sketches of e (by a, s) and of h (by b,
    r): one product in the Fourier domain, where a document's tokens are summed (Pham and Pagh 2013). Buckets
    are 3-wise and signs 4-wise independent, for each layer and side anew. Inner products of gradients X, Y
    are unbiased, with variance at most (and, but for diagonal terms, about)::

        (|X|^2 |Y|^2 + <X,Y>^2 + |X Y'|^2 + tr((X Y')^2) + |X' Y|^2 + tr((X' Y)^2)) / dim
            + 4 |X|^2 |Y|^2 / dim^2

    so the leading term is that of a dense projection, (|X|^2 |Y|^2 + <X,Y>^2) / dim, up to three times it
    where X and Y share their row or column space; the usual bound for degree 2 is 8 |X|^2 |Y|^2 / dim.
    """

    kind = "tensorsketch"

    def __init__(self, dim: int, seed: int, layers: Sequence[LayerShape]) -> None:
        for layer in layers:
            if max(layer.rows, layer.cols, dim) > PRIME:
                raise UserError(
                    f"gradients.projector=tensorsketch: {layer.name} or gradients.dim is too large."
                )
        super().__init__(dim, seed, layers)
        self._rows = [buckets_and_signs(seed, i, "row", x.rows, dim) for i, x in enumerate(layers)]
        self._cols = [buckets_and_signs(seed, i, "col", x.cols, dim) for i, x in enumerate(layers)]
        self._groups: dict[tuple[int, int, int], Groups] = {}

    def to(self, device: torch.device | str) -> Self:
        """See `Projector.to`."""
        moved = super().to(device)
        moved._rows = [(buckets.to(device), signs.to(device)) for buckets, signs in self._rows]
        moved._cols = [(buckets.to(device), signs.to(device)) for buckets, signs in self._cols]
        moved._groups = {}
        return moved

    def describe(self) -> dict[str, Any]:
        """See `Projector.describe`."""
        return {**super().describe(), "hash": VERSION}

    def begin(self, layer: int, n_tokens: int, device: torch.device | str) -> State:
        """See `Projector.begin`; the state is the (dim, n_tokens) count sketch of the errors so far."""
        return State(layer, torch.zeros(self.dim, n_tokens, device=device))

    def add_errors(self, state: State, errors: Tensor, start_row: int) -> None:
        """See `Projector.add_errors`."""
        groups = self._row_groups(state.layer, start_row, errors.shape[1])
        state.values += group_sums(errors.t().float().contiguous(), groups)

    def rescale(self, state: State, factor: Tensor) -> None:
        """See `Projector.rescale`."""
        state.values *= factor

    def add_entries(self, state: State, rows: Tensor, values: Tensor) -> None:
        """See `Projector.add_entries`."""
        buckets, signs = self._rows[state.layer]
        state.values[buckets[rows], torch.arange(len(rows), device=rows.device)] += signs[rows] * values

    def finish(self, state: State, hidden: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        """See `Projector.finish`."""
        buckets, signs = self._cols[state.layer]
        sketched = group_sums(hidden.t().float().contiguous(), group(buckets, signs, self.dim))
        errors, inputs = state.values.t().contiguous(), sketched.t().contiguous()
        result = errors.new_zeros(n_docs, self.dim)
        bounds = token_bounds(docs, n_docs)
        for first, last in document_blocks(bounds, BLOCK if errors.is_cpu else GPU_BLOCK):
            tokens = slice(bounds[first], bounds[last])
            spectra = multiply(torch.fft.rfft(errors[tokens]), torch.fft.rfft(inputs[tokens]))
            spectra = sum_documents(spectra, [bound - tokens.start for bound in bounds[first:last]])
            result[first:last] = torch.fft.irfft(spectra, n=self.dim)
        return result

    def project_matrix(self, layer: int, chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
        """See `Projector.project_matrix`: rows go to buckets, then each column turns to its place."""
        cols, device = self.layers[layer].cols, self.device
        table = torch.zeros(self.dim, cols, dtype=torch.float64, device=device)
        for start_row, chunk in chunks:
            table += group_sums(
                chunk.to(device, torch.float64), self._row_groups(layer, start_row, len(chunk))
            )
        buckets, signs = self._cols[layer]
        places = torch.arange(self.dim, device=device)[:, None]
        result = torch.zeros(self.dim, dtype=torch.float64, device=device)
        for some in torch.arange(cols, device=device).split(BLOCK):
            turned = table[:, some].gather(0, (places - buckets[some]) % self.dim)
            result += (turned * signs[some]).sum(1)
        return result

    def _row_groups(self, layer: int, start: int, n: int) -> Groups:
        """Groups of one chunk of rows, sorted at its first use."""
        key = (layer, start, n)
        if key not in self._groups:
            buckets, signs = (table[start : start + n] for table in self._rows[layer])
            self._groups[key] = group(buckets, signs, self.dim)
        return self._groups[key]


def group(buckets: Tensor, signs: Tensor, dim: int) -> Groups:
    """Sort indices by bucket, stably."""
    ordered, order = torch.sort(buckets, stable=True)
    return Groups(order, torch.searchsorted(ordered, torch.arange(dim, device=order.device)), signs[order])


def group_sums(values: Tensor, groups: Groups) -> Tensor:
    """Signed sums of the rows of each group: (n, m) -> (groups, m), zeros for an empty one.

    embedding_bag adds a group's rows in order, each column alone: no atomics (index_add_ on a GPU has them),
    the same bits for every m; and it was the fastest of index_add_, scatter_add_, sparse CSR and
    segment_reduce (benchmarks/projection.py).
    """
    signs = None if groups.signs is None else groups.signs.to(values.dtype)
    return functional.embedding_bag(groups.order, values, groups.starts, mode="sum", per_sample_weights=signs)


def document_blocks(bounds: list[int], n_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole documents, first to last - 1, of at least `n_tokens` tokens but for the last range.

    Documents without tokens at the end are left out.
    """
    first = 0
    for last in range(1, len(bounds)):
        tokens = bounds[last] - bounds[first]
        if tokens >= n_tokens or (tokens and last == len(bounds) - 1):
            yield first, last
            first = last


def sum_documents(spectra: Tensor, starts: list[int]) -> Tensor:
    """Sums of consecutive rows, (tokens, frequencies) -> (documents, frequencies) complex64."""
    if starts == list(range(len(spectra))):
        return spectra
    order = torch.arange(len(spectra), device=spectra.device)
    groups = Groups(order, torch.tensor(starts, device=spectra.device), None)
    sums = group_sums(torch.view_as_real(spectra).flatten(1), groups)
    return torch.view_as_complex(sums.unflatten(1, (-1, 2)))


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """Complex product from real ones: torch's own rounds the last few elements of an array differently."""
    return torch.complex(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)
