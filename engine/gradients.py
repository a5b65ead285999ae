"""Per-example gradients of one partition: label at theta_f, then error factors at every theta_j, projected.

The last layer needs no backward pass: one forward pass gives the states h_t and the logits, hence
``e_t = w_t (softmax(W h_t) - onehot(y_t))`` and the gradient ``G = sum_t e_t h_t^T`` in factored form
(docs/method.md, step 3). Other linear layers give the same factors through hooks and one backward pass a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.batches import Batches, LossBatch, tokens_per_batch
from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.head import Head, check_head, compile_body, find_head, hidden_states
from engine.labels import best_labels
from engine.last_layer import LastLayer, Result
from engine.layers import LayerHooks
from engine.memory import keep_freed_memory
from engine.models import load_model, torch_dtype
from engine.placement import Place, entry_device
from engine.projection import Projector
from engine.ragged import IGNORE, Ragged
from engine.spec import RunSpec
from engine.target import Target


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
class _Pass:
    """Results of one checkpoint, filled batch by batch: each (n,) float32, features (n, d) float16."""

    features: npt.NDArray[np.float16]
    scale: npt.NDArray[np.float32]
    loss: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    alignment: npt.NDArray[np.float32]

    def keep(self, members: npt.NDArray[np.int64], found: dict[str, npt.NDArray[Any]]) -> None:
        """Write a batch's columns to its documents."""
        for name in ("features", "scale", "loss", "norm", "alignment"):
            getattr(self, name)[members] = found[name]


class GradientEngine:
    """Labels documents and projects their gradients, one partition at a time.

    Args:
        endpoints: the two models.
        encoder: gives label ids and the loss scope.
        target: the chosen layers and the projector.
        spec: sections task, gradients and models are read.
        device: where the working model lives: a device, "auto" (spread over all of this process), or a device_map.

    Raises:
        UserError: the model does something to its logits that `Head` does not know.
    """

    def __init__(
        self, endpoints: Endpoints, encoder: Encoder, target: Target, spec: RunSpec, device: Place = "cpu"
    ) -> None:
        self.endpoints, self.encoder, self.target, self.spec = endpoints, encoder, target, spec
        self.fractions = spec.gradients.fractions
        if str(device) == "cpu":
            keep_freed_memory()
        self.model = load_model(
            endpoints.finetuned,
            torch_dtype(spec.gradients.dtype),
            device,
            spec.models.trust_remote_code,
            spec.models.load_in,
        ).requires_grad_(False)
        self.device = entry_device(self.model, device)
        self.at: float = 1.0
        self.head: Head = find_head(self.model)
        check_head(self.model, self.head)
        if spec.gradients.compile:
            compile_body(self.model)
        self.classifies = spec.task.kind == "classification"
        self.home = self.head.weight.device  # where the head is, of a model that is spread over devices
        self.label_ids = torch.tensor(encoder.label_ids, dtype=torch.int64, device=self.home)
        self.hooked = [layer.name for layer in target.layers] != [self.head.name]
        self.projector: Projector = target.projector(self.home)
        self._on_device = functools.cache(self.projector.to)
        self._last_layer = self._make_last_layer()
        self.batches = Batches(self.device, spec.gradients.tokens_per_batch or self._tokens_that_fit())

    @property
    def tokens_per_batch(self) -> int:
        """Padded tokens of a batch: as asked or by the device's memory, and less once memory has run out."""
        return self.batches.tokens

    def _make_last_layer(self) -> LastLayer:
        names = [layer.name for layer in self.target.layers]
        index = names.index(self.head.name) if self.head.name in names else None
        aligned = not self.hooked and self.encoder.scope == "last_token"
        return LastLayer(
            self.head,
            self.target.vocab,
            self.label_ids if self.classifies and self.target.only is not None else None,
            None if index is None else self.projector,
            index or 0,
            self._head_delta() if aligned else None,
        )

    def _head_delta(self) -> torch.Tensor:
        """Delta of the last layer, (rows, cols) float32, for exact alignments."""
        chunks = [chunk for _, chunk in self.target.delta(self.endpoints, self.target.layers[0])]
        return torch.cat(chunks).to(self.home)

    def _tokens_that_fit(self) -> int:
        return tokens_per_batch(self.device, self._trial)

    def _trial(self, ids: torch.Tensor) -> None:
        """The passes that a batch of input_ids (docs, length) takes, for their memory."""
        if not self.hooked:
            with torch.inference_mode():
                hidden_states(self.model, ids)
            return
        rows = torch.zeros(len(ids), self.projector.dim, device=self.home)
        with self._hooks(ids, rows) as hooks, torch.enable_grad():
            states = hidden_states(self.model, ids)
            hooks.backward(states, torch.zeros_like(states))

    def _hooks(self, ids: torch.Tensor, rows: torch.Tensor) -> LayerHooks:
        """Hooks on the chosen layers but the head, for input_ids (docs, length), that add to rows (docs, dim)."""
        layers = {i: x.name for i, x in enumerate(self.target.layers) if x.name != self.head.name}
        return LayerHooks(self.model, layers, self._on_device, (ids.shape[0], ids.shape[1]), rows)

    def run(self, documents: Ragged, progress: Callable[[int], None] | None = None) -> PartitionGradients:
        """Label and differentiate n encoded documents at every checkpoint.

        Deterministic: equal documents, device, dtype, threads and tokens_per_batch give equal bytes.
        """
        n, p = len(documents), len(self.fractions)
        usable = _with_loss(documents)
        label, confidence = np.full(n, -1, np.int32), np.zeros(n, np.float32)
        passes = [self._empty_pass(n) for _ in range(p)]
        order = sorted(range(p), key=lambda j: -self.fractions[j])
        if self.fractions[order[0]] != 1.0:
            self._walk(1.0, documents, usable, None, label, confidence, progress)
        for j in order:
            self._walk(self.fractions[j], documents, usable, passes[j], label, confidence, progress)
        problems = dict.fromkeys(np.flatnonzero(~usable).tolist(), "no token that carries loss")
        return _assemble(passes, label, confidence, documents, problems)

    def _empty_pass(self, n: int) -> _Pass:
        nothing = [np.full(n, np.nan, np.float32) for _ in range(3)]
        return _Pass(np.zeros((n, self.projector.dim), np.float16), np.zeros(n, np.float32), *nothing)

    def _walk(
        self,
        fraction: float,
        documents: Ragged,
        usable: npt.NDArray[np.bool_],
        out: _Pass | None,
        label: npt.NDArray[np.int32],
        confidence: npt.NDArray[np.float32],
        progress: Callable[[int], None] | None,
    ) -> None:
        """One checkpoint over all batches; at fraction 1 it labels, and `out` takes the gradients if given."""
        if fraction != self.at:
            self.endpoints.interpolate(self.model, fraction)
            self.at = fraction

        def keep(members: npt.NDArray[np.int64], found: dict[str, npt.NDArray[Any]]) -> None:
            if fraction == 1.0:
                label[members] = found.pop("label")
                confidence[members] = np.exp(-found["loss"])
            if out is not None:
                out.keep(members, found)
            if progress is not None:
                progress(len(members))

        results = _Results(keep)

        def work(batch: LossBatch) -> None:
            batch = batch.map(lambda tensor: tensor.to(self.home))
            given = torch.from_numpy(label[batch.members].astype(np.int64)).to(self.home)
            result = Result.empty(len(batch.counts), self.projector.dim, given)
            if self.hooked:
                self._with_hooks(batch, result)
            else:
                self._without_backward(batch, result, out is not None)
            results.put(batch.members, result, out is not None)

        self.batches.walk(documents, np.flatnonzero(usable), work)
        results.flush()

    @torch.inference_mode()
    def _without_backward(self, batch: LossBatch, result: Result, project: bool) -> None:
        """Losses, and projected last-layer gradients if wanted: one forward pass."""
        hidden = self._loss_states(batch)
        targets = self._targets(batch, hidden, result.label)
        self._last_layer.add(result, hidden, targets, batch.docs, batch.weight, batch.counts, project)

    def _with_hooks(self, batch: LossBatch, result: Result) -> None:
        """Losses and projected gradients of any linear layers: one forward pass, one backward pass.

        Documents do not meet in the forward pass, so the gradient of the summed losses splits by document.
        The head needs no graph: dL/dh is its error times its weight, for a few tokens at a time.
        """
        with self._hooks(batch.input_ids, result.rows) as hooks, torch.enable_grad():
            hidden = self._loss_states(batch)
            gradient = torch.empty_like(hidden)
            with torch.no_grad():
                targets = self._targets(batch, hidden, result.label)
                self._last_layer.add(
                    result,
                    hidden,
                    targets,
                    batch.docs,
                    batch.weight,
                    batch.counts,
                    backward=gradient,
                    backward_scale=hooks.scale,
                )
            hooks.backward(hidden, gradient)

    def _loss_states(self, batch: LossBatch) -> torch.Tensor:
        """States that predict a loss token, (tokens, hidden)."""
        states = hidden_states(self.model, batch.input_ids)
        return states.flatten(0, 1)[batch.index.to(states.device)].to(self.home)

    def _targets(self, batch: LossBatch, hidden: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Rows of the softmax that are to be predicted, (tokens,) int64; at theta_f labels are found, into `label`."""
        if not self.classifies:
            return batch.targets
        if self.at == 1.0:
            label.copy_(best_labels(self.head, hidden, self.label_ids))
        return label if self.target.only is not None else self.label_ids[label]


class _Results:
    """Brings results to main memory, on a GPU while the next batch computes, and hands them to `keep`."""

    def __init__(self, keep: Callable[[npt.NDArray[np.int64], dict[str, npt.NDArray[Any]]], None]) -> None:
        self._keep = keep
        self._waiting: tuple[npt.NDArray[np.int64], dict[str, torch.Tensor], torch.cuda.Event] | None = None

    @torch.inference_mode()
    def put(self, members: npt.NDArray[np.int64], result: Result, project: bool) -> None:
        """Rows are split into unit-norm float16 features and float32 norms before they leave the device."""
        found = {"loss": result.loss, "label": result.label}
        if project:
            scale = torch.linalg.vector_norm(result.rows, dim=1, dtype=torch.float64)
            safe = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
            found["features"] = (result.rows / safe[:, None]).to(torch.float16)
            found |= {"scale": scale.float(), "norm": result.norm, "alignment": result.alignment}
        if not result.loss.is_cuda:
            self._keep(members, {name: value.numpy() for name, value in found.items()})
            return
        pinned = {name: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for name, v in found.items()}
        for name, value in found.items():
            pinned[name].copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(result.loss.device))
        self.flush()
        self._waiting = members, pinned, copied

    def flush(self) -> None:
        """Wait for what is on its way."""
        if self._waiting is not None:
            members, found, copied = self._waiting
            self._waiting = None
            copied.synchronize()
            self._keep(members, {name: value.numpy() for name, value in found.items()})


def _with_loss(documents: Ragged) -> npt.NDArray[np.bool_]:
    """Which documents have a token that carries loss, (n,)."""
    carries = np.concatenate([[0], np.cumsum(documents.targets != IGNORE)])
    return np.diff(carries[documents.offsets]) > 0


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
