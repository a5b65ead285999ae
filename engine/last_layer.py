"""The last layer's loss, error factors and projected gradients, from the states that enter it, in one pass.

For a loss token with state h, target y and logits z the error is ``e = w (softmax(z) - onehot(y))`` and the
gradient ``e h^T`` (docs/method.md, step 3). The vocabulary is walked in chunks of rows, each with the softmax's
running maximum and sum (Milakov and Gimelshein 2018), so that no (tokens, V) array ever exists: errors are
linear, hence what has been projected with an old maximum is rescaled when a new one comes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.head import Head
from engine.projection import Projector, State
from engine.projection.tensorsketch import Groups, group_sums

TOKENS, GPU_TOKENS = 512, 4096
"""Tokens that meet the vocabulary together; documents are cut at this from their own start."""

ROWS, GPU_ROWS = 4096, 8192
"""Rows of the vocabulary at a time: with TOKENS, a chunk that stays in a CPU's cache."""

SLACK = 16.0
"""The running maximum follows logits only when they exceed it by so much: exp(16) is far from overflow."""


@dataclass
class Result:
    """One batch at one checkpoint: rows (docs, dim), loss, norm, alignment (docs,) float32; label (docs,) int64.

    norm and alignment are NaN where not computed.
    """

    rows: Tensor
    loss: Tensor
    norm: Tensor
    alignment: Tensor
    label: Tensor

    @classmethod
    def empty(cls, docs: int, dim: int, label: Tensor) -> Result:
        """Zeros for rows and losses, on the labels' device."""
        nan = torch.full((docs,), float("nan"), device=label.device)
        zeros = torch.zeros((docs, dim), device=label.device)
        return cls(zeros, torch.zeros(docs, device=label.device), nan, nan.clone(), label)


class LastLayer:
    """Loss and projected gradients of the output embedding; its working memory does not grow with V or T.

    Args:
        head: of the working model.
        vocab: rows of the softmax, the first so many.
        label_ids: (L,) vocabulary rows that the softmax is restricted to, in place of the first `vocab`.
        projector: of the run; None when the head is not among the chosen layers.
        layer: the head's index in the projector.
        delta: (rows, hidden) float32, Delta of the head, where norms and alignments are wanted; for one loss
            token a document.
    """

    def __init__(
        self,
        head: Head,
        vocab: int,
        label_ids: Tensor | None,
        projector: Projector | None,
        layer: int = 0,
        delta: Tensor | None = None,
    ) -> None:
        self.head, self.vocab, self.label_ids = head, vocab, label_ids
        self.projector, self.layer, self.delta = projector, layer, delta
        gpu = head.weight.is_cuda
        self.tokens, self.rows = (GPU_TOKENS, GPU_ROWS) if gpu else (TOKENS, ROWS)
        # The product that gives dL/dh is taken in the model's type: float16 would overflow.
        self.slack = 0.0 if head.weight.dtype == torch.float16 else SLACK
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def add(
        self,
        result: Result,
        hidden: Tensor,
        targets: Tensor,
        docs: Tensor,
        weight: Tensor,
        counts: list[int],
        project: bool = True,
        backward: Tensor | None = None,
        backward_scale: float = 1.0,
    ) -> None:
        """Add losses, and gradients where wanted, of a batch's loss tokens to `result`.

        Args:
            hidden: (tokens, hidden) states, in the model's type.
            targets: (tokens,) int64, numbered as the softmax's rows are.
            docs: (tokens,) int64 ascending, document of each token.
            weight: (tokens,) float32, w_t.
            counts: tokens of each document.
            project: whether projected gradients (and norms, alignments) are wanted.
            backward: (tokens, hidden), filled with dL/dhidden times `backward_scale`, in the model's type.
        """
        bounds = [0, *itertools.accumulate(counts)]
        for start, stop in token_chunks(counts, self.tokens):
            some = slice(start, stop)
            back = None if backward is None else backward[some]
            slab = _Slab(self, hidden[some], targets[some], weight[some], project, back is not None)
            for row, logits in self._logits(slab.hidden):
                slab.meet(row, logits)
            first, last = bisect.bisect_right(bounds, start) - 1, bisect.bisect_left(bounds, stop)
            slab.finish(result, docs[some] - first, first, last)
            if back is not None:
                assert slab.total_back is not None
                back.copy_(slab.total_back * backward_scale)

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits (rows, tokens)) of consecutive chunks; each is overwritten by the next."""
        head = self.head
        if self.label_ids is not None:
            yield 0, head.label_logits(hidden, self.label_ids).t().contiguous()
            return
        for first in range(0, self.vocab, self.rows):
            rows = slice(first, min(self.vocab, first + self.rows))
            z = self.buffer("logits", rows.stop - first, len(hidden), head.weight)
            torch.mm(head.weight.detach()[rows], hidden.t(), out=z)
            if head.bias is not None:
                z = z.float() + head.bias.detach()[rows, None].float()
            plain = head.scale == 1.0 and head.softcap is None
            yield first, z if plain else head.finish(z)

    def buffer(self, name: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """A (rows, cols) array that is used again: fresh memory would cost more than the sums in it."""
        flat = self._buffers.get((name, like.dtype))
        if flat is None or flat.device != like.device or flat.numel() < rows * cols:
            size = max(rows * cols, min(self.rows, self.vocab) * self.tokens)
            flat = self._buffers[name, like.dtype] = like.new_empty(size)
        return flat[: rows * cols].view(rows, cols)


class _Slab:
    """Running sums of some tokens while they meet the vocabulary chunk by chunk.

    With the running maximum m: rest = sum over v != y of exp(z_v - m); the state holds the same sum of
    projected errors. The target's own error, ``p_y - 1 = -rest / total``, comes last: no cancellation.
    """

    def __init__(
        self, layer: LastLayer, hidden: Tensor, y: Tensor, weight: Tensor, project: bool, back: bool
    ) -> None:
        self.layer, self.hidden, self.y, self.weight = layer, hidden.detach(), y, weight
        n, device = len(hidden), hidden.device
        self.tokens = torch.arange(n, device=device)
        self.top = torch.full((n,), -torch.inf, device=device)
        self.rest, self.target = torch.zeros(n, device=device), torch.zeros(n, device=device)
        self.total_back = torch.zeros(hidden.shape, device=device) if back else None
        self.state: State | None = None
        self.wide = self.hidden.float() if project else None
        if project and layer.projector is not None:
            self.state = layer.projector.begin(layer.layer, n, device)
        aligned = project and layer.delta is not None
        self.against = torch.zeros(hidden.shape, device=device) if aligned else None  # e^T Delta
        self.squares = torch.zeros(n, device=device)

    def meet(self, first: int, logits: Tensor) -> None:
        """Take in the logits (rows, tokens) of rows first, first + 1, ..."""
        here = (self.y >= first) & (self.y < first + len(logits))
        at = (self.y - first).clamp_(0, len(logits) - 1)
        self.target = torch.where(here, logits[at, self.tokens].float(), self.target)
        self._raise(logits.amax(0).float())
        u = self.layer.buffer("errors", logits.shape[0], logits.shape[1], self.rest)
        torch.sub(logits, self.top, out=u).exp_()
        u[at, self.tokens] = torch.where(here, 0.0, u[at, self.tokens])
        self.rest += u.sum(0)
        if any(sums is not None for sums in (self.state, self.against, self.total_back)):
            self._errors(first, self.layer.head.backward_logits(u, logits))

    def _errors(self, first: int, errors: Tensor) -> None:
        """Add errors (rows, tokens), but for the targets' own and for the softmax's sum."""
        layer, rows = self.layer, slice(first, first + len(errors))
        if self.state is not None:
            assert layer.projector is not None
            layer.projector.add_errors(self.state, errors.t(), first)
        if self.total_back is not None:
            of = rows if layer.label_ids is None else layer.label_ids
            self.total_back += layer.head.input_gradient(errors.t(), of)
        if self.against is not None:
            assert layer.delta is not None
            # half the time of e . (Delta h), whose product has as many terms
            self.against.addmm_(errors.t(), layer.delta[rows])
            self.squares += errors.square().sum(0)

    def _raise(self, top: Tensor) -> None:
        """Let the running maximum follow, and rescale what was summed with the old one."""
        new = torch.where(top > self.top + self.layer.slack, top, self.top)
        factor = (self.top - new).exp()
        if not new.is_cuda and bool((factor == 1.0).all()):
            return  # on a GPU asking would wait for it
        self.top = new
        self.rest *= factor
        self._scale(factor)

    def _scale(self, factor: Tensor) -> None:
        if self.state is not None:
            assert self.layer.projector is not None
            self.layer.projector.rescale(self.state, factor)
        if self.total_back is not None:
            self.total_back *= factor[:, None]
        if self.against is not None:
            self.against *= factor[:, None]
            self.squares *= factor.square()

    def finish(self, result: Result, docs: Tensor, first: int, last: int) -> None:
        """Complete the errors and add them to the result's documents first to last - 1; `docs` counts from first."""
        layer, head = self.layer, self.layer.head
        total = self.rest + (self.target - self.top).exp()
        loss = self.top + total.log() - self.target
        result.loss[first:last] += _by_document(loss * self.weight, docs, last - first)
        own = head.backward_logits(-self.rest, self.target)
        if self.state is not None:
            assert layer.projector is not None
            layer.projector.add_entries(self.state, self.y, own)
        if self.total_back is not None:
            rows = self.y if layer.label_ids is None else layer.label_ids[self.y]
            self.total_back += own[:, None] * head.weight.detach()[rows].float()
        if self.against is not None:
            assert layer.delta is not None
            self.against += own[:, None] * layer.delta[self.y]
            self.squares += own.square()
        self._scale(self.weight / total)
        if self.state is not None:
            assert layer.projector is not None
            assert self.wide is not None
            rows = layer.projector.finish(self.state, self.wide, docs, last - first)
            result.rows[first:last] += rows.to(result.rows.device)
        if self.against is not None:
            assert self.wide is not None
            result.norm[first:last] = self.squares.sqrt() * self.wide.norm(dim=1)
            result.alignment[first:last] = (self.against * self.wide).sum(1)


def _by_document(values: Tensor, docs: Tensor, n: int) -> Tensor:
    """Sums (n,) of values (tokens,) over each document's tokens, in order on every device."""
    if len(values) == n:
        return values
    starts = torch.searchsorted(docs, torch.arange(n, device=docs.device))
    tokens = torch.arange(len(values), device=docs.device)
    return group_sums(values[:, None], Groups(tokens, starts, None))[:, 0]


def token_chunks(counts: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Token ranges of whole documents, at most `limit` tokens each; a longer document is cut from its start."""
    start = stop = 0
    for count in counts:
        if stop > start and stop - start + count > limit:
            yield start, stop
            start = stop
        stop += count
        while stop - start > limit:
            yield start, start + limit
            start += limit
    if stop > start:
        yield start, stop
