"""Stored examples: what was encoded comes back, from any part, in any order, without being read whole."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import INDEX, StoredExamples, load_examples, write_index, write_part
from engine.models import load_tokenizer
from engine.ragged import Ragged, Soft
from engine.spec import Task
from engine.storage import Folder


def same(a: Ragged, b: Ragged) -> None:
    for name in ("tokens", "targets", "offsets"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    ones = np.ones(len(a), np.float32)
    np.testing.assert_array_equal(
        ones if a.weights is None else a.weights, ones if b.weights is None else b.weights
    )
    assert (a.soft is None) == (b.soft is None)
    if a.soft is not None and b.soft is not None:
        np.testing.assert_array_equal(a.soft.tokens, b.soft.tokens)
        np.testing.assert_array_equal(a.soft.probs, b.soft.probs)


def ragged(lengths: list[int], seed: int, soft: bool) -> Ragged:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    targets = np.where(rng.random(total) < 0.4, -100, rng.integers(0, 99, total)).astype(np.int32)
    made = Ragged(
        rng.integers(0, 99, total).astype(np.int32),
        targets,
        np.cumsum([0, *lengths]),
        rng.random(len(lengths)).astype(np.float32),
    )
    if not soft:
        return made
    n = int(made.loss_offsets[-1])
    labels = Soft(rng.integers(0, 99, (n, 3)).astype(np.int32), rng.random((n, 3)).astype(np.float32))
    return Ragged(made.tokens, made.targets, made.offsets, made.weights, labels)


def store(uri: str, whole: Ragged, cuts: list[int]) -> StoredExamples:
    folder, parts = Folder(uri), []
    edges = [0, *sorted(cuts), len(whole)]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        parts.append(write_part(folder, f"part-{i}.arrow", whole.take(np.arange(a, b))))
    write_index(folder, parts)
    return StoredExamples(uri)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 99),
    soft=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_documents_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    cuts: list[int],
    seed: int,
    soft: bool,
    data: st.DataObject,
) -> None:
    whole = ragged(lengths, seed, soft)
    stored = store(str(tmp_path_factory.mktemp("s")), whole, [min(c, len(lengths)) for c in cuts])
    assert stored.lengths.tolist() == lengths
    members = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1)), np.int64)
    same(stored.take(members), whole.take(members))


def test_an_object_store_is_read_as_a_disk_is_and_nothing_is_left_behind(tmp_path: Path) -> None:
    whole = ragged([3, 5, 2, 7], 0, True)
    stored = store("memory://examples-test", whole, [2])
    scratch = stored._scratch
    assert scratch is not None
    same(stored.take(np.array([3, 0])), whole.take(np.array([3, 0])))
    stored.close()
    assert not os.path.exists(scratch)


def test_taking_a_few_documents_does_not_read_the_rest(tmp_path: Path) -> None:
    """A part of 80 MB; what a batch takes is a few pages of it."""
    import psutil

    total = 10_000_000
    whole = Ragged(
        np.arange(total, dtype=np.int32), np.arange(total, dtype=np.int32), np.arange(0, total + 1, 1000)
    )
    store(str(tmp_path), whole, [])
    del whole
    process = psutil.Process()
    before = process.memory_info().rss
    stored = StoredExamples(str(tmp_path))
    got = stored.take(np.array([9_000, 17]))
    assert got.tokens[[0, 1000]].tolist() == [9_000_000, 17_000]
    assert process.memory_info().rss - before < 24 << 20


def test_missing_and_damaged_examples_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*remove that folder"):
        StoredExamples(str(tmp_path / "none"))
    store(str(tmp_path), ragged([3, 5], 0, False), [])
    part = tmp_path / "part-0.arrow"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be read .*remove that folder"):
        StoredExamples(str(tmp_path))


def test_parts_without_any_use_are_refused_when_declared(tmp_path: Path, tiny_base: str) -> None:
    folder = Folder(str(tmp_path))
    empty = ragged([], 0, False)
    with pytest.raises(UserError, match="nothing to train on"):
        write_index(folder, [write_part(folder, "part-0.arrow", empty)])
    nothing = Ragged(np.ones(2, np.int32), np.ones(2, np.int32), np.array([0, 2]), np.zeros(1, np.float32))
    with pytest.raises(UserError, match="weights are all 0"):
        write_index(folder, [write_part(folder, "part-0.arrow", nothing)])
    assert not folder.exists(INDEX)
    encoder = Encoder(load_tokenizer(tiny_base), Task(kind="language_modelling"), "all_tokens")
    text = tiny.sentences(2)[0][0]
    for weight, message in [([-1.0, 1.0], "none negative"), ([0.0, 0.0], "all 0")]:
        with pytest.raises(UserError, match=message):
            load_examples(pa.table({"text": [text, text], "weight": weight}), encoder)
