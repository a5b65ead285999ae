"""Shards of the index in Ray actors give the picks of one process, also when an actor dies."""

from __future__ import annotations

import functools
import os
import sys

import numpy as np
import pytest
import ray

from cluster.select import ray_shards
from engine.errors import UserError
from engine.rows import ArrayRows
from engine.select import Columns, open_features, select
from engine.spec import Select

pytestmark = pytest.mark.usefixtures("ray_session")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

N = 1000


def open_rows(path):
    """Two checkpoints, scales over many magnitudes, some invalid rows."""
    stored = np.load(path)
    return ArrayRows(stored["x"], stored["t"], stored["s"], stored["v"], block_rows=128)


@pytest.fixture(scope="module")
def opener(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, N, 24)) * np.arange(1, 25) ** -0.7).astype(np.float16)
    x[:, 500:520] = x[:, 100:120]
    scale = np.exp(2 * rng.normal(size=(2, N))).astype(np.float32)
    scale[:, 500:520] = scale[:, 100:120]
    np.savez(path, x=x, t=rng.normal(size=24), s=scale, v=rng.random(N) > 0.1)
    return functools.partial(open_rows, str(path))


COLUMNS = Columns(label=(np.arange(N) % 3).astype(np.int32))


def outcome(selection):
    """Every byte of a result, the record of work done left out."""
    arrays = [selection.rows, selection.objective, selection.gain, selection.norm, selection.path]
    return [a.tobytes() for a in [*arrays, selection.certificate.score, selection.random_path.mean]]


@pytest.mark.parametrize(
    ("strategy", "count"),
    [("greedy", 1), ("greedy", 2), ("greedy", 4), ("greedy_batched", 2), ("greedy_balanced", 2)],
)
def test_any_number_of_shards_gives_the_bytes_of_one_process(opener, strategy, count):
    spec = Select(strategy=strategy, size=90, batch_size=11)
    serial = select(opener(), COLUMNS, spec)
    assert outcome(select(opener(), COLUMNS, spec, shards=ray_shards(opener, count))) == outcome(serial)


def test_an_actor_that_dies_is_rebuilt_and_the_picks_do_not_change(opener):
    spec = Select(size=120, rows="unit")
    made = []

    def factory(*args):
        made.append(ray_shards(opener, 2)(*args))
        return made[0]

    def progress(done, total):
        if done in (20, 70):
            ray.kill(made[0].actors[done // 70])

    killed = select(opener(), COLUMNS, spec, progress, shards=factory)
    assert outcome(killed) == outcome(select(opener(), COLUMNS, spec))


class DyingRows(ArrayRows):
    """A store on which every worker that reads it dies."""

    def read(self, start, stop):
        os._exit(1)


def open_dying():
    return DyingRows(np.ones((8, 2), np.float32), np.ones(2), block_rows=4)


def test_a_shard_that_always_dies_ends_in_one_sentence():
    rows = ArrayRows(np.ones((8, 2), np.float32), np.ones(2), block_rows=4)
    with pytest.raises(UserError, match="rows 0 to 7 died 3 times"):
        select(rows, Columns(), Select(size=2), shards=ray_shards(open_dying, 1))


def test_a_users_mistake_in_a_shard_reaches_the_user_as_it_is(tmp_path):
    x = np.ones((64, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", np.ones(4))
    opener = functools.partial(open_features, str(tmp_path / "x.npy"), str(tmp_path / "t.npy"))
    rows = opener()
    x[40, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match="row 40 holds a number that is not finite"):
        select(rows, Columns(), Select(size=2), shards=ray_shards(opener, 1))
