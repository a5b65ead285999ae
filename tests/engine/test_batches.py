"""Every document is computed once, within the budget of tokens, also when memory runs out on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batches import GPU_TOKENS, Batches, LossBatch, loss_batch, tokens_per_batch, tokens_that_fit
from engine.errors import UserError
from engine.ragged import IGNORE, Ragged


def documents(lengths: list[int], seed: int = 0) -> Ragged:
    """Random tokens; about half of them carry loss, each document's last one always."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 100, offsets[-1]).astype(np.int32)
    targets = np.where(rng.random(offsets[-1]) < 0.5, tokens, IGNORE).astype(np.int32)
    targets[offsets[1:] - 1] = 7
    return Ragged(tokens, targets, offsets)


class Work:
    """Notes what it was given; runs out of memory above so many padded tokens."""

    def __init__(self, limit: int, allocate: bool = False) -> None:
        self.limit, self.allocate = limit, allocate
        self.done: list[int] = []
        self.sizes: list[int] = []

    def __call__(self, batch: LossBatch) -> None:
        self.sizes.append(batch.padded)
        if batch.padded > self.limit:
            if self.allocate:
                torch.empty(1 << 47, dtype=torch.uint8)  # 128 TiB: more than there are addresses
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.done += batch.members.tolist()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_each_usable_document_is_computed_once_though_memory_runs_out(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=40))
    usable = np.flatnonzero([data.draw(st.booleans()) for _ in lengths])
    budget, limit = data.draw(st.integers(1, 400)), data.draw(st.integers(30, 400))
    batches, work = Batches("cpu", budget), Work(limit)
    batches.walk(documents(lengths), usable, work)
    assert sorted(work.done) == usable.tolist()
    assert all(size <= max(budget, max(lengths)) for size in work.sizes)


@pytest.mark.parametrize("allocate", [False, True], ids=["gpu", "main_memory"])
def test_the_batch_is_halved_and_the_new_budget_remembered(allocate: bool) -> None:
    batches, work = Batches("cpu", 320), Work(100, allocate)
    batches.walk(documents([10] * 64), np.arange(64), work)
    assert work.sizes == [320, 160, *[80] * 8]
    assert batches.tokens == 80
    again = Work(100)
    batches.walk(documents([10] * 16), np.arange(16), again)
    assert again.sizes == [80, 80]


def test_a_document_that_does_not_fit_alone_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"a document of 101 tokens needs more memory than cpu has"):
        Batches("cpu", 400).walk(documents([101, 20]), np.arange(2), Work(100))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(_: LossBatch) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Batches("cpu", 100).walk(documents([5, 5]), np.arange(2), broken)


def test_a_batch_lists_its_loss_tokens_in_document_order() -> None:
    ragged = documents([4, 9, 1, 6], seed=1)
    members = np.array([1, 3, 0])
    batch = loss_batch(ragged, members)
    flat = batch.input_ids.flatten()
    position = 0
    for row, member in enumerate(members):
        own = slice(ragged.offsets[member], ragged.offsets[member + 1])
        carries = ragged.targets[own] != IGNORE
        some = slice(position, position + int(carries.sum()))
        assert batch.counts[row] == some.stop - some.start
        assert batch.docs[some].eq(row).all()
        assert batch.targets[some].tolist() == ragged.targets[own][carries].tolist()
        assert flat[batch.index[some]].tolist() == ragged.tokens[own][carries].tolist()
        torch.testing.assert_close(batch.weight[some].sum().item(), 1.0)
        position = some.stop
    assert position == len(batch.docs)


@given(free=st.integers(0, 1 << 42), measured=st.integers(0, 1 << 38))
def test_the_budget_found_is_a_power_of_two_that_fits_or_the_least(free: int, measured: int) -> None:
    found = tokens_that_fit(free, measured, 1024)
    least, most = GPU_TOKENS
    assert least <= found <= most
    assert found & (found - 1) == 0
    assert found == least or found * measured <= free * 1024


def test_a_cpu_needs_no_probe() -> None:
    assert tokens_per_batch("cpu", lambda ids: pytest.fail("was run")) == 4096
