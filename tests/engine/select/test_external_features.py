"""Features that a user brings are used as given, and refused in one sentence when they cannot be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import zarr

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
        (np.ones((3, 2), np.float32), np.ones((1, 2)), "vector"),
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
