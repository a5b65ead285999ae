"""Batches of a partition: planned by length, brought to the device ahead of time, halved where memory runs out."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import UserError
from engine.padding import length_batches, pad
from engine.ragged import IGNORE, Ragged

CPU_TOKENS = 4096
"""Tokens of a batch on a CPU: larger ones are no faster, and their activations leave the cache."""

GPU_TOKENS = (1024, 65_536)
"""Least and most tokens of a batch on a GPU where none are asked for."""

GPU_SHARE = 0.5
"""Share of a GPU's free memory that activations may take by the estimate of `tokens_that_fit`."""


@dataclass(frozen=True)
class LossBatch:
    """Right-padded documents and the tokens of theirs that carry loss, on one device.

    members (docs,): positions in the partition, on the host. input_ids (docs, length) int64. For each loss
    token, documents in order: index (tokens,) int64, its position in the flattened (docs * length) batch;
    targets, docs (tokens,) int64; weight (tokens,) float32, 1 / T_i. counts: loss tokens of each document.
    """

    members: npt.NDArray[np.int64]
    input_ids: Tensor
    index: Tensor
    targets: Tensor
    docs: Tensor
    weight: Tensor
    counts: list[int]

    def map(self, change: Callable[[Tensor], Tensor]) -> LossBatch:
        """The batch with every tensor changed: moved or pinned."""
        ids, index, targets = change(self.input_ids), change(self.index), change(self.targets)
        docs, weight = change(self.docs), change(self.weight)
        return LossBatch(self.members, ids, index, targets, docs, weight, self.counts)

    @property
    def padded(self) -> int:
        """Tokens that the forward pass sees, padding included."""
        return self.input_ids.numel()


def loss_batch(documents: Ragged, members: npt.NDArray[np.int64]) -> LossBatch:
    """The given documents of a partition as one batch in main memory; each carries loss."""
    padded = pad(documents, members)
    targets = padded.targets.numpy()
    docs, positions = np.nonzero(targets != IGNORE)
    counts = np.bincount(docs, minlength=len(members))
    return LossBatch(
        members=members,
        input_ids=padded.input_ids,
        index=torch.from_numpy(docs * targets.shape[1] + positions),
        targets=torch.from_numpy(targets[docs, positions]),
        docs=torch.from_numpy(docs),
        weight=torch.from_numpy((1.0 / counts[docs]).astype(np.float32)),
        counts=counts.tolist(),
    )


class Batches:
    """Walks partitions batch by batch on one device, within a budget of tokens that it remembers.

    On a GPU the next batch is padded, pinned and copied by a thread and a stream of its own while the present
    one computes. When memory runs out, the budget becomes half the failed batch and the same documents are
    tried again; it stays so for all that follows.

    Args:
        tokens: padded tokens of a batch, at most; a longer document is alone.

    Attributes:
        lowered: the budget after memory ran out, or None where it never has.
    """

    def __init__(self, device: torch.device | str, tokens: int) -> None:
        self.device, self.tokens = torch.device(device), tokens
        self.lowered: int | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def walk(
        self,
        documents: Ragged,
        usable: npt.NDArray[np.int64],
        work: Callable[[LossBatch], None],
    ) -> None:
        """Call `work` with batches that hold each usable document of a partition once, longest first.

        Args:
            usable: positions of documents that carry loss.
            work: must leave nothing behind when it runs out of memory: its documents come again.

        Raises:
            UserError: a single document needs more memory than there is.
        """
        lengths = documents.lengths
        waiting = deque(usable[group] for group in length_batches(lengths[usable], self.tokens))
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: Future[LossBatch] | None = None
            while waiting:
                members = waiting.popleft()
                batch = self._received(ahead.result() if ahead else self._sent(documents, members))
                ahead = pool.submit(self._sent, documents, waiting[0]) if self._stream and waiting else None
                if self._fits(work, batch):
                    continue
                ahead = batch = None  # type: ignore[assignment]
                _free(self.device)
                self._halve(members, lengths)
                rest = np.concatenate([members, *waiting])
                waiting = deque(rest[group] for group in length_batches(lengths[rest], self.tokens))

    def _fits(self, work: Callable[[LossBatch], None], batch: LossBatch) -> bool:
        """Do the work; False when memory ran out. The error's frames, and what they hold, end here."""
        try:
            work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _halve(self, members: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        longest = int(lengths[members].max())
        if len(members) == 1:
            raise UserError(
                f"a document of {longest:,} tokens needs more memory than {self.device} has: lower "
                "task.max_tokens, or give extract.gpus_per_worker more."
            )
        self.tokens = self.lowered = min(self.tokens, longest * -(-len(members) // 2))

    def _sent(self, documents: Ragged, members: npt.NDArray[np.int64]) -> LossBatch:
        """The batch on its way to the device; runs in the thread."""
        batch = loss_batch(documents, members)
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            return batch.map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))

    def _received(self, batch: LossBatch) -> LossBatch:
        """The batch, safe to use on the present stream."""
        if self._stream is not None:
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(self._stream)

            def use(tensor: Tensor) -> Tensor:
                tensor.record_stream(present)
                return tensor

            batch.map(use)
        return batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch's CPU allocator has no type of its own


def tokens_that_fit(free: int, measured: int, tokens: int) -> int:
    """Tokens of a batch for `free` bytes, when one of `tokens` tokens took `measured` bytes: a power of two."""
    fit = int(GPU_SHARE * free / max(1, measured) * tokens)
    least, most = GPU_TOKENS
    return most if fit >= most else max(least, 1 << max(1, fit).bit_length() - 1)


def tokens_per_batch(device: torch.device | str, forward: Callable[[Tensor], object], probe: int = 64) -> int:
    """Tokens of a batch that the device's memory will take, for `forward` of input_ids (docs, length).

    On a GPU the peak of a batch of 16 documents of `probe` tokens is measured and scaled.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU_TOKENS
    ids = torch.ones(16, probe, dtype=torch.int64, device=device)
    forward(ids)  # kernels load, workspaces are made
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward(ids)
    torch.cuda.synchronize(device)
    used = torch.cuda.max_memory_allocated(device) - before
    return tokens_that_fit(torch.cuda.mem_get_info(device)[0], used, ids.numel())


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
