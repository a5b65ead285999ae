"""The store: what is written is read back, what is missing or damaged is known, and twice gives equal bytes."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.gradients import PartitionGradients
from engine.rundir import STORE, RunDir
from engine.store import MISSING, QUARANTINED, VALID, GradientStore, StoreShape

SHAPE = StoreShape(checkpoints=2, docs=21, dim=16, partition_rows=8)
TARGET = np.linspace(-1, 1, 16)


def exact(n: int, seed: int, shape: StoreShape = SHAPE) -> np.ndarray:
    """Rows (P, n, d) float64 of very different norms, the second of them zero."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((shape.checkpoints, n, shape.dim)) * 10.0 ** rng.uniform(-6, 6, (1, n, 1))
    rows[:, 1:2] = 0
    return rows


def gradients(rows: np.ndarray, problems: dict[int, str] | None = None) -> PartitionGradients:
    """What the engine makes of exact rows."""
    p, n, _ = rows.shape
    norm = np.linalg.norm(rows, axis=2)
    unit = rows / np.where(norm > 0, norm, 1)[..., None]
    grid = np.arange(p * n, dtype=np.float32).reshape(p, n)
    return PartitionGradients(
        features=unit.astype(np.float16),
        scale=norm.astype(np.float32),
        loss=grid,
        norm=grid + 0.5,
        alignment=np.full((p, n), np.nan, np.float32),
        label=np.zeros(n, np.int32),
        confidence=np.linspace(0, 1, n, dtype=np.float32),
        tokens=np.arange(n, dtype=np.int32),
        problems=problems or {},
    )


def partition(p: int, problems: dict[int, str] | None = None) -> PartitionGradients:
    return gradients(exact(min(8, 21 - 8 * p), seed=p), problems)


def filled(run: RunDir, partitions: tuple[int, ...] = (0, 1, 2)) -> GradientStore:
    store = GradientStore.create(run, SHAPE, TARGET, {"fingerprint": "f"})
    for p in partitions:
        store.write(p, partition(p), "f", {})
    return store


def hashes(run: RunDir) -> dict[str, str]:
    return {name: hashlib.sha256(run.read_bytes(name)).hexdigest() for name in run.walk()}


@pytest.fixture(params=["local", "file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunDir]:
    name = uuid.uuid4().hex
    uri = {
        "local": str(tmp_path / name),
        "file": f"file://{tmp_path}/{name}",
        "memory": f"memory://{name}/run",
    }
    found = RunDir(uri[request.param])
    yield found
    found.remove("")


def test_rows_come_back_to_half_precision_and_zeros_stay_zeros(run: RunDir) -> None:
    filled(run)
    store = GradientStore.open(run)
    rows = np.concatenate([exact(8, 0), exact(8, 1), exact(5, 2)], axis=1)
    block = store.read(0, 21)
    assert block.valid.all()
    for j in range(2):
        error = np.linalg.norm(block.exact(j) - rows[j], axis=1)
        assert (error <= 2**-10 * np.linalg.norm(rows[j], axis=1)).all()
        assert (block.exact(j)[[1, 9, 17]] == 0).all()
    np.testing.assert_array_equal(store.target, TARGET.astype(np.float32))
    assert store.attributes["fingerprint"] == "f"


def test_reading_and_taking_agree_wherever_rows_lie(run: RunDir) -> None:
    store = filled(run)
    whole = store.read(0, 21)
    rows = np.array([0, 5, 7, 8, 15, 16, 20])
    some = store.take(rows)
    np.testing.assert_array_equal(some.features, whole.features[:, rows])
    np.testing.assert_array_equal(some.scale, whole.scale[:, rows])
    part = store.read(8, 16)
    np.testing.assert_array_equal(part.features, whole.features[:, 8:16])
    assert store.read(16, 24).features.shape == (2, 5, 16)


def test_columns_come_back(run: RunDir) -> None:
    store = filled(run)
    parts = [partition(p) for p in range(3)]
    for name in ("loss", "norm", "alignment", "label", "confidence", "tokens"):
        expected = np.concatenate([getattr(part, name) for part in parts], axis=-1)
        np.testing.assert_array_equal(store.column(name), expected)
    np.testing.assert_array_equal(store.column("loss", 1), store.column("loss")[1])


def test_missing_rows_are_not_valid_rows(run: RunDir) -> None:
    store = filled(run, (0, 2))
    assert store.read(0, 21).valid.tolist() == [True] * 8 + [False] * 8 + [True] * 5
    assert (store.column("state")[8:16] == MISSING).all()
    assert store.take(np.array([7, 8, 16])).valid.tolist() == [True, False, True]
    assert sorted(store.done("f")) == [0, 2]


def test_quarantined_rows_keep_their_place_and_are_not_valid(run: RunDir) -> None:
    store = GradientStore.create(run, SHAPE, TARGET, {})
    record = store.write(
        1, partition(1, {5: "why", 2: "text is null"}), "f", {5: "five", 2: "two"}, truncated=3
    )
    assert record["quarantined"] == [[10, "two", "text is null"], [13, "five", "why"]]
    assert (record["truncated"], record["rows"], record["tokens"]) == (3, 8, 28)
    state = store.column("state")[8:16]
    assert np.flatnonzero(state == QUARANTINED).tolist() == [2, 5]
    assert (np.delete(state, [2, 5]) == VALID).all()
    assert np.flatnonzero(~store.read(8, 16).valid).tolist() == [2, 5]


def test_records_of_another_fingerprint_do_not_count(run: RunDir) -> None:
    store = filled(run, (0,))
    store.write(1, partition(1), "other", {})
    assert sorted(store.done("f")) == [0]


@pytest.mark.parametrize("lost", ["features/c/1/1/0", "label/c/1", "scale/c/0/1", "state/c/1"])
def test_a_record_without_its_objects_does_not_count(run: RunDir, lost: str) -> None:
    store = filled(run)
    run.remove(f"{STORE}/{lost}")
    assert sorted(store.done("f")) == [0, 2]


def test_writing_twice_gives_equal_bytes(run: RunDir) -> None:
    store = filled(run)
    before = hashes(run)
    for p in (2, 0, 1):
        store.write(p, partition(p), "f", {})
    assert hashes(run) == before


def test_an_empty_store_is_opened_again_and_half_a_layout_is_replaced(run: RunDir) -> None:
    filled(run, (0,))
    again = GradientStore.create(run, SHAPE, TARGET, {"fingerprint": "f"})
    assert sorted(again.done("f")) == [0]
    other = RunDir(f"{run.uri}/other")
    other.write_bytes(f"{STORE}/zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert GradientStore.create(other, SHAPE, TARGET, {}).n_rows == 21


@pytest.mark.parametrize(
    "name", ["features/c/0/0/0", "features/c/1/2/0", "scale/c/0/1", "state/c/0", "target/c/0"]
)
def test_a_flipped_byte_is_detected_wherever_it_is(tmp_path: Path, name: str) -> None:
    run = RunDir(str(tmp_path))
    filled(run)
    path = tmp_path / STORE / name
    whole = path.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as caught:
            GradientStore.open(run).read(0, 21)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert GradientStore.open(run).read(0, 21).valid.all()


@pytest.mark.parametrize("partition_rows", [8, 300])
def test_random_rows_are_those_of_a_sequential_read_at_first_and_again(tmp_path, partition_rows) -> None:
    shape = StoreShape(checkpoints=2, docs=700, dim=4096, partition_rows=partition_rows)
    run, rng = RunDir(str(tmp_path)), np.random.default_rng(0)
    store = GradientStore.create(run, shape, np.ones(4096), {})
    for p in range(shape.partitions):
        n = min(partition_rows, 700 - p * partition_rows)
        features = rng.standard_normal((2, n, 4096)).astype(np.float16)
        store.write(p, replace(gradients(np.ones((2, n, 4096))), features=features), "f", {})
    whole = store.read(0, 700)
    for _ in range(20):
        rows = np.sort(rng.choice(700, rng.integers(1, 40), replace=False))
        taken = store.take(rows)
        assert taken.features.tobytes() == whole.features[:, rows].tobytes()
        assert taken.scale.tobytes() == whole.scale[:, rows].tobytes()
        assert taken.valid.tolist() == whole.valid[rows].tolist()


@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut short", "empty", "gone"])
def test_a_damaged_shard_is_detected_by_a_random_read(tmp_path: Path, damage: str) -> None:
    filled(RunDir(str(tmp_path)))
    path = tmp_path / STORE / "features/c/1/1/0"
    data = bytearray(path.read_bytes())
    match damage:
        case "first byte":
            data[0] ^= 1
        case "last byte":
            data[-1] ^= 1
        case "cut short":
            del data[len(data) // 2 :]
        case "empty":
            data.clear()
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    store = GradientStore.open(RunDir(str(tmp_path)))
    assert store.take(np.arange(3)).valid.tolist() == [True] * 3
    with pytest.raises(UserError, match="damaged or unreadable"):
        store.take(np.arange(8, 12))


def test_no_store_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `unbake extract` first"):
        GradientStore.open(RunDir(str(tmp_path)))


def test_a_store_opened_for_reading_cannot_be_written(tmp_path: Path) -> None:
    filled(RunDir(str(tmp_path)), (0,))
    store = GradientStore.open(RunDir(str(tmp_path)))
    before = hashes(store.run)
    with pytest.raises(ValueError, match="read-only"):
        store.write(1, partition(1), "f", {})
    assert hashes(store.run) == before


def test_a_partition_larger_than_the_corpus_takes_no_more_room_than_its_rows(tmp_path: Path) -> None:
    shape = StoreShape(checkpoints=1, docs=10, dim=512, partition_rows=4096)
    store = GradientStore.create(RunDir(str(tmp_path)), shape, np.ones(512), {})
    store.write(0, gradients(exact(10, 0, shape)), "f", {})
    size = (tmp_path / STORE / "features/c/0/0/0").stat().st_size
    assert size < 2 * 512 * store.chunk_rows + 16 * 4096 + 100


def test_all_zero_partitions_are_written(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    store = GradientStore.create(run, SHAPE, TARGET, {})
    nothing = replace(gradients(np.zeros((2, 8, 16))), problems=dict.fromkeys(range(8), "empty"))
    store.write(0, nothing, "f", {})
    assert sorted(store.done("f")) == [0]
    assert not store.read(0, 8).valid.any()


@settings(deadline=None)
@given(st.integers(8, 1 << 17), st.integers(1, 10_000))
def test_inner_chunks_divide_a_partition_and_stay_small(dim: int, rows: int) -> None:
    shape = StoreShape(1, 10**6, dim, rows)
    assert rows % shape.chunk_rows == 0
    assert shape.chunk_rows == 1 or shape.chunk_rows * dim * 2 <= 128 << 10
    assert shape.partitions * rows >= 10**6 > (shape.partitions - 1) * rows
