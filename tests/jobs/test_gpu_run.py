"""Whole runs on a GPU: as on the CPU, by one worker or several, with DeepSpeed's offloading and in float16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml

from engine.rundir import RunDir
from engine.store import GradientStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fields(tiny_base: str, tiny_finetuned: str, tiny_corpus: str, tiny_test: Path) -> dict[str, Any]:
    """A spec that leaves GPUs at their defaults."""
    return {
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32"},
        "select": {"size": 16},
        "retrain": {
            "strategies": ["random", "greedy"], "seeds": [0], "epochs": 2, "batch_size": 8, "dtype": "float32",
        },
        "evaluate": {"test": [str(tiny_test)]},
        "ray": {"num_cpus": 4},
    }  # fmt: skip


def recover(fields: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path:
    """A finished run in a folder; a section's fields are laid over those of the same name."""
    changed = {name: {**fields.get(name, {}), **section} for name, section in sections.items()}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**fields, **changed, "run_dir": str(folder / "run")}))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "RAY_ADDRESS")
    }
    command = [sys.executable, "-m", "jobs", "recover", "--config", str(path), "--quiet"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=550
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def whole(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a GPU worker."""
    return recover(fields, tmp_path_factory.mktemp("whole"))


def store(run: Path) -> GradientStore:
    return GradientStore.open(RunDir(str(run)))


def losses(run: Path, model: str = "greedy-0") -> list[float]:
    """Mean training loss of the first and the last epoch."""
    curve = json.loads((run / "models" / model / "training.json").read_text())["curve"]
    found = [loss for _, loss in curve]
    half = len(found) // 2
    return [float(np.mean(found[:half])), float(np.mean(found[half:]))]


def test_a_run_on_a_gpu_is_that_of_the_cpu(whole: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    other = recover(
        fields, tmp_path, extract={"gpus_per_worker": 0, "workers_max": 1}, retrain={"gpus_per_worker": 0}
    )
    on_gpu, on_cpu = store(whole), store(other)
    np.testing.assert_array_equal(on_gpu.column("label"), on_cpu.column("label"))
    np.testing.assert_allclose(on_gpu.column("confidence"), on_cpu.column("confidence"), rtol=1e-3)
    picked = [set(pq.read_table(run / "selection.parquet")["row"].to_pylist()) for run in (whole, other)]
    assert len(picked[0] & picked[1]) >= 14
    shown = [json.loads((run / "metrics.json").read_text()) for run in (whole, other)]
    for mine, theirs in zip(*(entry["models"][:2] for entry in shown), strict=True):
        assert mine["test"]["accuracy"] == theirs["test"]["accuracy"]
        assert mine["test"]["loss"] == pytest.approx(theirs["test"]["loss"], rel=1e-3)


def test_workers_that_share_a_gpu_write_the_bytes_of_one(fields: dict[str, Any], tmp_path: Path) -> None:
    half = {"gpus_per_worker": 0.5}
    budget = {"tokens_per_batch": 2048, "dtype": "float32"}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = recover(fields, tmp_path / "one", gradients=budget)
    two = recover(
        fields, tmp_path / "two", gradients=budget, extract={**half, "workers_min": 2}, retrain=half
    )
    stored = [
        path for path in (one / "gradients.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"
    ]
    assert stored
    for path in stored:
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    assert (one / "selection.parquet").read_bytes() == (two / "selection.parquet").read_bytes()
    for model in ("random-0", "greedy-0"):
        assert losses(one, model) == losses(two, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16", "offload_optimizer": True, "zero_stage": 2},
        {"dtype": "bfloat16", "offload_parameters": True, "offload_optimizer": True, "zero_stage": 3},
    ],
    ids=["float16", "zero2-offload", "zero3-offload"],
)
def test_deepspeed_trains_on_a_gpu(fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    run = recover(fields, tmp_path, retrain={**changes, "learning_rate": 1e-3, "strategies": ["greedy"]})
    before, after = losses(run)
    assert after < before
