"""Per-example gradients of one partition: label at theta_f, then error factors at every theta_j, projected.

The last layer needs no backward pass: one forward pass gives the states h_t and the logits, hence
``e_t = w_t (softmax(W h_t) - onehot(y_t))`` and the gradient ``G = sum_t e_t h_t^T`` in factored form
(METHOD section 3). Other linear layers give the same factors through hooks and one backward pass a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.checkpoints import Endpoints
from engine.encode import IGNORE, Batch, Encoder, Ragged, length_batches, pad
from engine.labels import classify
from engine.layers import LayerHooks
from engine.models import Head, check_head, find_head, hidden_states, load_model, torch_dtype
from engine.projection import Projector
from engine.spec import RunSpec
from engine.target import Target

LOGIT_BYTES = 128 << 20
"""Float32 logits held at once; documents are cut at this from their own start, whatever batch they are in."""


@dataclass(frozen=True)
class PartitionGradients:
    """What one partition writes; n documents, P checkpoints, d dimensions.

    features (P, n, d) float16, unit-norm rows; scale (P, n) float32, the projected row's norm (row = scale x
    feature, a zero gradient has scale 0); loss, norm, alignment (P, n) float32 (the last two NaN where not
    computed); label (n,) int32, -1 in language modelling; confidence (n,) float32; tokens (n,) int32;
    problems: position -> reason, for documents without a usable gradient.
    """

    features: npt.NDArray[np.float16]
    scale: npt.NDArray[np.float32]
    loss: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    alignment: npt.NDArray[np.float32]
    label: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    problems: dict[int, str]


@dataclass
class _Result:
    """One batch at one checkpoint: rows (docs, dim), loss, norm, alignment (docs,) float32; label (docs,) int64."""

    rows: torch.Tensor
    loss: torch.Tensor
    norm: torch.Tensor
    alignment: torch.Tensor
    label: torch.Tensor


@dataclass
class _Pass:
    """Results of one checkpoint, filled batch by batch: each (n,) float32, features (n, d) float16."""

    features: npt.NDArray[np.float16]
    scale: npt.NDArray[np.float32]
    loss: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    alignment: npt.NDArray[np.float32]


class GradientEngine:
    """Labels documents and projects their gradients, one partition at a time.

    Args:
        endpoints: the two models.
        encoder: gives label ids and the loss scope.
        target: the chosen layers and the projector.
        spec: sections task, gradients and models are read.
        device: where the working model lives.

    Raises:
        UserError: the model does something to its logits that `Head` does not know.
    """

    def __init__(
        self, endpoints: Endpoints, encoder: Encoder, target: Target, spec: RunSpec, device: str = "cpu"
    ) -> None:
        self.endpoints, self.encoder, self.target, self.spec, self.device = (
            endpoints,
            encoder,
            target,
            spec,
            device,
        )
        self.fractions = spec.gradients.fractions
        self.model = load_model(
            endpoints.finetuned, torch_dtype(spec.gradients.dtype), device, spec.models.trust_remote_code
        ).requires_grad_(False)
        self.at: float = 1.0
        self.head: Head = find_head(self.model)
        check_head(self.model, self.head)
        self.classifies = spec.task.kind == "classification"
        self.label_ids = torch.tensor(encoder.label_ids, dtype=torch.int64, device=device)
        self.hooked = [layer.name for layer in target.layers] != [self.head.name]
        self.projector: Projector = target.projector(device)
        self._head_delta = None if self.hooked or encoder.scope != "last_token" else self._load_head_delta()

    def _load_head_delta(self) -> torch.Tensor:
        """Delta of the last layer, (rows, cols) float32, for exact alignments."""
        chunks = [chunk for _, chunk in self.target.delta(self.endpoints, self.target.layers[0])]
        return torch.cat(chunks).to(self.device)

    def run(self, documents: Ragged, progress: Callable[[int], None] | None = None) -> PartitionGradients:
        """Label and differentiate n encoded documents at every checkpoint.

        Deterministic: equal documents, device, dtype, threads and tokens_per_batch give equal bytes.
        """
        n, p = len(documents), len(self.fractions)
        groups, unusable = self._batches(documents)
        label, confidence = np.full(n, -1, np.int32), np.zeros(n, np.float32)
        passes = [self._empty_pass(n) for _ in range(p)]
        order = sorted(range(p), key=lambda j: -self.fractions[j])
        if self.fractions[order[0]] != 1.0:
            self._walk(1.0, documents, groups, None, label, confidence, progress)
        for j in order:
            self._walk(self.fractions[j], documents, groups, passes[j], label, confidence, progress)
        problems = dict.fromkeys(unusable.tolist(), "no token that carries loss")
        return _assemble(passes, label, confidence, documents, problems)

    def _batches(self, documents: Ragged) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """Length-sorted batches of the documents with a loss token, and the positions of those without."""
        counts = np.zeros(len(documents), np.int64)
        owner = np.repeat(np.arange(len(documents)), documents.lengths)
        np.add.at(counts, owner[documents.targets != IGNORE], 1)
        usable = np.flatnonzero(counts)
        groups = length_batches(documents.lengths[usable], self.spec.gradients.tokens_per_batch)
        return [usable[group] for group in groups], np.flatnonzero(counts == 0)

    def _empty_pass(self, n: int) -> _Pass:
        nothing = [np.full(n, np.nan, np.float32) for _ in range(3)]
        return _Pass(np.zeros((n, self.projector.dim), np.float16), np.zeros(n, np.float32), *nothing)

    def _walk(
        self,
        fraction: float,
        documents: Ragged,
        groups: list[npt.NDArray[np.int64]],
        out: _Pass | None,
        label: npt.NDArray[np.int32],
        confidence: npt.NDArray[np.float32],
        progress: Callable[[int], None] | None,
    ) -> None:
        """One checkpoint over all batches; at fraction 1 it labels, and `out` takes the gradients if given."""
        if fraction != self.at:
            self.endpoints.interpolate(self.model, fraction)
            self.at = fraction
        for members in groups:
            batch = pad(documents, members).to(self.device)
            result = (
                self._hooked(batch, label[members])
                if self.hooked
                else self._last_layer(batch, label[members], out)
            )
            loss = result.loss.cpu().numpy()
            if fraction == 1.0:
                label[members] = result.label.cpu().numpy()
                confidence[members] = np.exp(-loss)
            if out is not None:
                out.loss[members] = loss
                _store_rows(out, members, result)
            if progress is not None:
                progress(len(members))

    @torch.inference_mode()
    def _last_layer(self, batch: Batch, label: npt.NDArray[np.int32], out: _Pass | None) -> _Result:
        """Loss and projected last-layer gradients of one batch: one forward pass, no backward pass.

        Logits live for a few documents at a time, so memory does not grow with the vocabulary.
        """
        hidden, targets, docs, weight = self._loss_states(batch)
        result = self._empty_result(len(batch.lengths), label)
        counts = torch.bincount(docs, minlength=len(batch.lengths)).tolist()
        for start, stop in _token_chunks(counts, max(1, LOGIT_BYTES // (4 * self.target.vocab))):
            h, d, w = hidden[start:stop], docs[start:stop], weight[start:stop]
            loss, error = self._errors(h, targets[start:stop], d, result.label)
            result.loss.index_add_(0, d, loss * w)
            if out is None:
                continue
            error, h = error.mul_(w[:, None]), h.float()
            first, last = int(d[0]), int(d[-1]) + 1
            result.rows[first:last] += self._project(0, error, h, d - first, last - first)
            if self._head_delta is not None:
                result.norm[first:last] = error.norm(dim=1) * h.norm(dim=1)
                result.alignment[first:last] = (error * (h @ self._head_delta.T)).sum(1)
        return result

    def _loss_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """States that predict a loss token: hidden (tokens, hidden), targets, document and 1/T_i (tokens,)."""
        states = hidden_states(self.model, batch.input_ids)
        docs, positions = torch.nonzero(batch.targets != IGNORE, as_tuple=True)
        weight = 1.0 / torch.bincount(docs, minlength=len(batch.lengths))[docs]
        return states[docs, positions], batch.targets[docs, positions], docs, weight

    def _errors(
        self, hidden: torch.Tensor, targets: torch.Tensor, docs: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token losses (tokens,), keeping their graph if any, and dL/dz (tokens, rows) without one, unweighted.

        In classification at theta_f the labels are found here, into `label`, (docs,) int64.
        """
        if self.classifies:
            restricted = self.target.only is not None
            found = classify(self.head, hidden, self.label_ids, restricted, self.target.vocab)
            if self.at == 1.0:
                label[docs] = found.label
            chosen, logits, log_probs = found.columns[label[docs]], found.logits, found.log_probs
        else:
            logits = self.head.logits(hidden, slice(0, self.target.vocab))
            log_probs, chosen = torch.log_softmax(logits, 1), targets
        loss = -log_probs.gather(1, chosen[:, None])[:, 0]
        error = log_probs.detach().exp()
        error[torch.arange(len(chosen), device=chosen.device), chosen] -= 1.0
        return loss, self.head.backward_logits(error, logits.detach())

    def _empty_result(self, n: int, label: npt.NDArray[np.int32]) -> _Result:
        zero = torch.zeros(n, device=self.device)
        nan = torch.full((n,), float("nan"), device=self.device)
        rows = torch.zeros((n, self.projector.dim), device=self.device)
        return _Result(rows, zero, nan, nan.clone(), torch.from_numpy(label.astype(np.int64)).to(self.device))

    def _project(
        self, layer: int, error: torch.Tensor, hidden: torch.Tensor, docs: torch.Tensor, n: int
    ) -> torch.Tensor:
        """Projected gradients (n, dim) float32 of one layer from its factors."""
        state = self.projector.begin(layer, len(error), error.device)
        self.projector.add_errors(state, error, 0)
        return self.projector.finish(state, hidden, docs, n)

    def _hooked(self, batch: Batch, label: npt.NDArray[np.int32]) -> _Result:
        """Loss and projected gradients of any linear layers: factors from hooks, one backward pass.

        Documents do not meet in the forward pass, so the gradient of the summed losses splits by document.
        """
        result = self._empty_result(len(batch.lengths), label)
        with (
            LayerHooks(self.model, [layer.name for layer in self.target.layers]) as hooks,
            torch.enable_grad(),
        ):
            hidden, targets, docs, weight = self._loss_states(batch)
            loss, error = self._errors(hidden, targets, docs, result.label)
            hooks.backward((loss * weight).sum())
        with torch.inference_mode():
            result.loss.index_add_(0, docs, loss.detach() * weight)
            real = torch.arange(batch.input_ids.shape[1], device=self.device)[None] < batch.lengths[:, None]
            owner = torch.nonzero(real, as_tuple=True)[0]
            for index, layer in enumerate(self.target.layers):
                if layer.name == self.head.name:
                    left, right, docs_of = error * weight[:, None], hidden.detach(), docs
                else:
                    left, right, docs_of = *hooks.factors(layer.name, real), owner
                result.rows.add_(
                    self._project(index, left.float(), right.float(), docs_of, len(batch.lengths))
                )
        return result


def _store_rows(out: _Pass, members: npt.NDArray[np.int64], result: _Result) -> None:
    """Split rows into unit-norm float16 features and float32 norms, and keep norm and alignment."""
    norm = torch.linalg.vector_norm(result.rows, dim=1, dtype=torch.float64)
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    out.features[members] = (result.rows / safe[:, None].float()).to(torch.float16).cpu().numpy()
    out.scale[members] = norm.to(torch.float32).cpu().numpy()
    out.norm[members] = result.norm.cpu().numpy()
    out.alignment[members] = result.alignment.cpu().numpy()


def _token_chunks(counts: list[int], limit: int) -> Iterator[tuple[int, int]]:
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


def _assemble(
    passes: list[_Pass],
    label: npt.NDArray[np.int32],
    confidence: npt.NDArray[np.float32],
    documents: Ragged,
    problems: dict[int, str],
) -> PartitionGradients:
    """Stack the checkpoints; a document with a non-finite gradient anywhere is zeroed and quarantined."""
    features = np.stack([p.features for p in passes])
    scale = np.stack([p.scale for p in passes])
    loss = np.stack([p.loss for p in passes])
    usable = np.ones(len(documents), np.bool_)
    usable[list(problems)] = False
    finite = np.isfinite(scale).all(0) & np.isfinite(loss).all(0) & np.isfinite(features).all((0, 2))
    problems |= dict.fromkeys(np.flatnonzero(usable & ~finite).tolist(), "non-finite gradient")
    bad = list(problems)
    features[:, bad], scale[:, bad], label[bad], confidence[bad] = 0, 0, -1, 0
    return PartitionGradients(
        features=features,
        scale=scale,
        loss=loss,
        norm=np.stack([p.norm for p in passes]),
        alignment=np.stack([p.alignment for p in passes]),
        label=label,
        confidence=confidence,
        tokens=documents.lengths.astype(np.int32),
        problems=problems,
    )
