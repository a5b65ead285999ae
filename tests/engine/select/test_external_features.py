"""Features that a user brings are used as given, and refused in one sentence when they cannot be."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import zarr
from numpy.lib.format import open_memmap

from engine.errors import UserError
from engine.rows import ArrayRows
from engine.select import Columns, open_features, select
from engine.spec import Select


@pytest.fixture
def matrix():
    return np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)


def saved(folder, matrix, target, form="npy"):
    np.save(folder / "t.npy", target)
    if form == "npy":
        np.save(folder / "x.npy", matrix)
    else:
        array = zarr.create_array(folder / "x.zarr", shape=matrix.shape, chunks=(16, 8), dtype=matrix.dtype)
        array[:] = matrix
    return str(folder / f"x.{form}"), str(folder / "t.npy")


@pytest.mark.parametrize("form", ["npy", "zarr"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_from_a_file_are_the_rows_in_it(tmp_path, matrix, form, dtype):
    given = matrix.astype(dtype)
    rows = copy.deepcopy(open_features(*saved(tmp_path, given, np.ones(8), form)))  # what actors get
    some = np.array([0, 1, 2, 17, 49])
    assert rows.take(some).features[0].tobytes() == given[some].tobytes()
    assert rows.read(10, 99).features[0].tobytes() == given[10:].tobytes()
    assert rows.read(0, 1).features.dtype == dtype
    spec = Select(strategy="topk", size=10)
    want = select(ArrayRows(given, np.ones(8)), Columns(), spec)
    assert select(rows, Columns(), spec).rows.tolist() == want.rows.tolist()


@pytest.mark.parametrize(
    ("features", "target", "message"),
    [
        (np.ones((3, 2)), np.ones(2), "float16 or float32, but it is float64"),
        (np.ones((3, 2), np.int8), np.ones(2), "but it is int8"),
        (np.ones(3, np.float32), np.ones(3), "matrix"),
        (np.ones((0, 3), np.float32), np.ones(3), "matrix"),
        (np.ones((3, 2), np.float32, order="F"), np.ones(2), "column by column"),
        (np.ones((3, 2), np.float32), np.ones(3), "3 numbers.*have 2"),
        (np.ones((3, 2), np.float32), np.array([1, np.nan]), "not finite"),
        (np.ones((3, 2), np.float32), np.ones((1, 1, 2)), "vector"),
        (np.array([{}, {}]), np.ones(2), "cannot read"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, features, target, message):
    with pytest.raises(UserError, match=message):
        open_features(*saved(tmp_path, features, target))


def test_a_row_that_is_not_finite_is_named(tmp_path, matrix):
    matrix[33, 3] = np.inf
    rows = open_features(*saved(tmp_path, matrix, np.ones(8)))
    with pytest.raises(UserError, match="row 33 holds"):
        select(rows, Columns(), Select(strategy="topk", size=5))


def test_missing_damaged_and_truncated_files_are_refused(tmp_path, matrix):
    _, t = saved(tmp_path, matrix, np.ones(8))
    with pytest.raises(UserError, match="does not exist"):
        open_features(str(tmp_path / "no.npy"), t)
    with pytest.raises(UserError, match=r"cannot read|does not exist"):
        open_features(str(tmp_path / "no.zarr"), t)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        open_features(str(tmp_path / "cut.npy"), t)
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    with pytest.raises(UserError, match="cannot read"):
        open_features(str(tmp_path / "bad.npy"), t)


def test_a_target_of_rows_is_their_mean(tmp_path, matrix):
    some = matrix[:7].astype(np.float32)
    rows = open_features(*saved(tmp_path, matrix, some))
    np.testing.assert_allclose(rows.target, some.astype(np.float64).mean(axis=0), rtol=1e-12)


def bergson_store(folder, values, kind, sizes):
    """What bergson's `create_index` lays out (bergson 2.5, data.py)."""
    folder.mkdir(parents=True)
    raw = values.astype(np.float32)
    if kind == "bfloat16":
        raw = (raw.view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = raw.astype(kind)
    (folder / "gradients.bin").write_bytes(raw.tobytes())
    info = {"num_items": len(values), "num_grads": len(values), "grad_sizes": sizes, "base_dtype": kind}
    (folder / "info.json").write_text(json.dumps(info))
    return str(folder)


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
def test_a_store_of_bergsons_is_read_in_its_own_type(tmp_path, matrix, kind):
    folder = bergson_store(tmp_path / "store", matrix, kind, {"layer.0": 3, "layer.1": 5})
    query = bergson_store(tmp_path / "query", matrix[:4], kind, {"layer.0": 3, "layer.1": 5})
    rows = copy.deepcopy(open_features(folder, query))
    want = matrix.astype(np.float32)
    if kind == "bfloat16":
        want = (want.view(np.uint32) >> 16 << 16).view(np.float32)
    some = np.array([0, 3, 4, 49])
    assert rows.take(some).features[0].astype(np.float32).tobytes() == want[some].tobytes()
    assert rows.read(40, 60).features[0].astype(np.float32).tobytes() == want[40:].tobytes()
    np.testing.assert_allclose(rows.target, want[:4].astype(np.float64).mean(axis=0), rtol=1e-12)
    spec = Select(strategy="greedy", size=10)
    same = select(ArrayRows(want, rows.target), Columns(), spec)
    assert select(rows, Columns(), spec).rows.tolist() == same.rows.tolist()


def test_what_bergson_left_unusable_is_said(tmp_path, matrix):
    folder = bergson_store(tmp_path / "store", matrix, "float32", {"a": 8})
    t = folder
    (tmp_path / "store/gradients.bin").write_bytes(b"\0" * 99)
    with pytest.raises(UserError, match=r"99 bytes.*1,600"):
        open_features(folder, t)
    (tmp_path / "store/info.json").write_text('{"num_grads": 3, "dtype": {"formats": ["float32"]}}')
    with pytest.raises(UserError, match="base_dtype"):
        open_features(folder, t)
    (tmp_path / "store/offsets.npy").touch()
    with pytest.raises(UserError, match="a token"):
        open_features(folder, t)
    (tmp_path / "store/info.json").write_text("{")
    (tmp_path / "store/offsets.npy").unlink()
    with pytest.raises(UserError, match="cannot read"):
        open_features(folder, t)


def trak_store(folder, matrix, model=0, done=None):
    """What TRAK's MmapSaver lays out (traker 0.3, savers.py)."""
    (folder / str(model)).mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"JL dimension": 8, "train set size": len(matrix)}))
    record = {str(model): {"total_num_featurized": len(matrix) if done is None else done, "is_finalized": 1}}
    (folder / f"id_{model}.json").write_text(json.dumps(record))
    mapped = open_memmap(
        folder / str(model) / "grads.mmap", mode="w+", shape=matrix.shape, dtype=matrix.dtype
    )
    mapped[:] = matrix
    mapped.flush()
    exp = open_memmap(folder / str(model) / "test_grads.mmap", mode="w+", shape=(5, 8), dtype=matrix.dtype)
    exp[:] = matrix[:5] * 2
    exp.flush()
    return str(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_store_of_traks_is_read_with_its_targets(tmp_path, matrix, dtype):
    given = matrix.astype(dtype)
    folder = trak_store(tmp_path / "trak", given)
    for name in (folder, f"{folder}/0", f"{folder}/0/grads.mmap"):
        rows = open_features(name, f"{folder}/0/test_grads.mmap")
        assert rows.read(0, 50).features[0].tobytes() == given.tobytes()
        np.testing.assert_allclose(rows.target, (given[:5] * 2).astype(np.float64).mean(axis=0), rtol=1e-12)


def test_what_trak_left_unusable_is_said(tmp_path, matrix):
    target = trak_store(tmp_path / "one", matrix) + "/0/test_grads.mmap"
    many = trak_store(tmp_path / "many", matrix)
    trak_store(tmp_path / "many", matrix, model=1)
    with pytest.raises(UserError, match=r"2 models.*many/0"):
        open_features(many, target)
    with pytest.raises(UserError, match="30 of 50"):
        open_features(trak_store(tmp_path / "half", matrix, done=30), target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"features\.mmap"):
        open_features(str(tmp_path / "empty"), target)
