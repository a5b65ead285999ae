"""Estimates are arithmetic: the sizes they name are the sizes things have, and costs scale as they must."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engine.calibrate import Calibration, Cost, spread
from engine.estimate import (
    FETCHED_PER_PICK,
    PIPELINE_START,
    Machine,
    ModelSize,
    estimate,
    extraction_seconds,
    held_bytes,
    index_bytes,
    logit_bytes,
    selection_seconds,
    store_bytes,
    training_bytes,
    worker_bytes,
)
from engine.gradients import PartitionGradients
from engine.rows import ArrayRows
from engine.rundir import STORE, RunDir
from engine.select.objective import unit_target
from engine.select.shard import Shard
from engine.spec import RunSpec
from engine.store import GradientStore, StoreShape

SIZE = ModelSize(parameters=7_500_000_000, trained=7_500_000_000, hidden=4096, depth=32)
MACHINE = Machine(
    cpus=8,
    workers=4,
    gpu=True,
    encoders=2,
    session=3,
    start=10,
    memory=64 << 30,
    device_memory=80 << 30,
    disk=1 << 40,
)
MEASURED = Calibration(
    documents=1000,
    tokens=100.0,
    tokens_error=1.0,
    seek=0.01,
    text=Cost(3e-5, 3e-5),
    encode=Cost(1e-4, 1e-4),
    gradient=Cost(1e-2, 2e-3),
    timed=100,
    interpolate=Cost(1.0, 1.0),
    write=Cost(1e-5, 1e-5),
    load=20.0,
    read=1e-7,
    fetch=1e-4,
    index=1e-5,
    pick=5e-3,
    pick_row=3e-8,
    train=None,
    encoder_bytes=400 << 20,
    worker_bytes=2 << 30,
    device_bytes=20 << 30,
)


def spec(**sections: dict[str, object]) -> RunSpec:
    fields = {
        "models": {"base": "b", "finetuned": "f"},
        "corpus": {"paths": ["c"]},
        "task": {"labels": ["a", "b"]},
    }
    return RunSpec.from_dict({**fields, **sections})


@pytest.mark.parametrize(("dim", "checkpoints"), [(64, 1), (1024, 2)])
def test_the_store_takes_the_bytes_that_were_estimated(tmp_path: Path, dim: int, checkpoints: int) -> None:
    shape = StoreShape(checkpoints, 3 * 128, dim, 128)
    run = RunDir(str(tmp_path))
    about = {"fingerprint": "x", "fractions": [(j + 1) / checkpoints for j in range(checkpoints)]}
    GradientStore.create(run, shape, np.ones(dim), about)
    store = GradientStore.open(run, writable=True)
    per = np.zeros((checkpoints, 128), np.float32)
    whole, single = np.zeros(128, np.int32), np.zeros(128, np.float32)
    features = np.zeros((checkpoints, 128, dim), np.float16)
    gradients = PartitionGradients(features, per, per, per, per, whole, single, whole, {})
    for partition in range(3):
        store.write(partition, gradients, "x", {})
    files = [path for path in (tmp_path / STORE).rglob("*") if path.is_file()]
    found = sum(
        path.stat().st_size for path in files if path.name != "zarr.json" and "target" not in str(path)
    )
    assert found == pytest.approx(store_bytes(shape), rel=0.02)


@pytest.mark.parametrize("budget", [1, 4, 512])
@pytest.mark.parametrize("dim", [48, 512])
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_the_index_takes_the_bytes_that_were_estimated(budget: int, dim: int, checkpoints: int) -> None:
    n, rng = 8000, np.random.default_rng(0)
    rows = ArrayRows(rng.normal(size=(checkpoints, n, dim)).astype(np.float32), np.ones(dim))
    shard = Shard(rows, 0, n, "raw", unit_target(rows.target), np.ones(n, np.bool_), None, budget, 1)
    arrays = [x for x in vars(shard.index).values() if isinstance(x, np.ndarray) and n in x.shape]
    once = 5 * (checkpoints - 1) * n
    assert index_bytes(StoreShape(checkpoints, n, dim, 4096), budget) == sum(x.nbytes for x in arrays) + once


def test_training_memory_is_that_of_the_zero_paper() -> None:
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 workers, Adam, 16 bits."""
    totals = [sum(training_bytes(spec(), SIZE, stage, 64).values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120.0, 31.4, 16.6, 1.9], abs=0.1)


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    half = dataclasses.replace(SIZE, trained=SIZE.parameters // 2)
    whole, frozen = training_bytes(spec(), SIZE, 0, 1), training_bytes(spec(), half, 0, 1)
    assert frozen["weights"] == whole["weights"]
    assert frozen["gradients"] == whole["gradients"] // 2
    assert frozen["optimizer"] == whole["optimizer"] // 2


def test_a_single_worker_of_plain_torch_holds_float32_gradients_and_needs_no_stage() -> None:
    (parts,) = worker_bytes(spec(), SIZE).values()
    assert sum(parts.values()) == 18 * SIZE.trained
    assert set(worker_bytes(spec(retrain={"workers": 2}), SIZE)) == {f"ZeRO {stage}" for stage in range(4)}


def test_what_is_offloaded_is_held_in_main_memory_instead_of_the_device() -> None:
    fields = {"workers": 2, "zero_stage": 3}
    all_there, _ = held_bytes(spec(retrain=fields), SIZE)
    left, away = held_bytes(spec(retrain={**fields, "offload_optimizer": True}), SIZE)
    assert away == 6 * SIZE.trained
    assert left == all_there - away
    left, away = held_bytes(
        spec(retrain={**fields, "offload_optimizer": True, "offload_parameters": True}), SIZE
    )
    assert (left, away) == (SIZE.trained, 7 * SIZE.trained)


def test_logits_count_the_tokens_that_carry_loss() -> None:
    size = dataclasses.replace(SIZE, vocab=1000)
    assert logit_bytes(spec(retrain={"batch_size": 8}), size, 50.0) == 2 * 4 * 1000 * 8
    texts = {"kind": "language_modelling", "labels": []}
    passes = spec(task=texts, retrain={"batch_size": 8, "micro_batch_size": 2})
    assert logit_bytes(passes, size, 50.0) == 2 * 4 * 1000 * 2 * 50


def test_more_actors_help_until_something_else_binds() -> None:
    def hours(workers: int, encoders: int) -> float:
        machine = dataclasses.replace(
            MACHINE, workers=workers, encoders=encoders, cpus=10_000, session=0, start=0
        )
        free = dataclasses.replace(MEASURED, load=0)
        return extraction_seconds(spec(), 10_000_000, free, machine) - PIPELINE_START

    assert hours(8, 100) == pytest.approx(hours(4, 100) / 2)
    assert hours(512, 1) == hours(1024, 1)  # the encoder binds


def test_cpus_that_actors_and_encoders_share_bind_together() -> None:
    shared = dataclasses.replace(MACHINE, gpu=False, workers=4, cpus=1, encoders=4)
    rows = 1_000_000
    least = rows * (MEASURED.gradient.cpu + MEASURED.text.cpu + MEASURED.encode.cpu)
    assert extraction_seconds(spec(), rows, MEASURED, shared) > least


def test_a_checkpoint_costs_a_forward_pass_and_labelling_one_more_where_it_is_not_the_last() -> None:
    shape = StoreShape(2, 1000, 64, 4096)
    last = estimate(spec(gradients={"checkpoints": 2}), shape, SIZE, MACHINE, MEASURED)
    other = estimate(spec(gradients={"checkpoints": [0.0, 0.5]}), shape, SIZE, MACHINE, MEASURED)
    assert (last.forward_passes, other.forward_passes) == (2000, 3000)


def test_shards_divide_what_rows_cost_but_not_what_a_pick_costs() -> None:
    one, eight = spec(select={"shards": 1}), spec(select={"shards": 8})
    fixed = 1000 * (MEASURED.pick + FETCHED_PER_PICK * MEASURED.fetch + MEASURED.seek)
    by_rows = selection_seconds(one, 10**8, MEASURED) - fixed
    assert selection_seconds(eight, 10**8, MEASURED) == pytest.approx(fixed + by_rows / 8)


def test_a_supposed_rate_needs_no_calibration_and_leaves_the_rest_unknown() -> None:
    shape = StoreShape(1, 100_000_000, 4096, 4096)
    result = estimate(spec(), shape, SIZE, MACHINE, None, rate=100.0)
    extract, select, retrain = result.stages
    assert extract.hours == pytest.approx(100_000_000 / 400 / 3600)
    assert extract.device_hours == pytest.approx(4 * extract.hours)
    assert select.hours is None
    assert retrain.hours is None


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"disk": 1 << 20}, "disk"),
        ({"memory": 1 << 30}, "index"),
        ({"device_memory": 1 << 30}, "training"),
        ({"gpu": False, "memory": 4 << 30}, "gradient actors"),
    ],
)
def test_what_does_not_fit_is_warned_of(changed: dict[str, object], word: str) -> None:
    shape = StoreShape(1, 50_000_000, 512, 4096)
    machine = dataclasses.replace(MACHINE, **changed)
    found = estimate(spec(select={"index_memory_mb": 8000}), shape, SIZE, machine, MEASURED).warnings
    assert any(word in warning for warning in found), found


def test_what_fits_is_not_warned_of() -> None:
    small = ModelSize(100_000_000, 100_000_000, 768, 12)
    assert estimate(spec(), StoreShape(1, 100_000, 512, 4096), small, MACHINE, MEASURED).warnings == []


def test_a_calibration_cut_short_has_looked_everywhere() -> None:
    for count in (1, 2, 7, 64, 100):
        order = spread(count)
        assert sorted(order) == list(range(count))
        for n in (4, 16):
            if n <= count:
                gaps = np.diff(sorted([*order[:n], count]))
                assert gaps.max() <= 2 * -(-count // n) + 1
