"""retrain after the driver's death: the same command repeats nothing that is done, and reaches the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny
import yaml

from jobs.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path, tiny_base: str, tiny_finetuned: str, tiny_corpus: str, ray_session: None) -> Path:
    """A run whose documents are selected already."""
    fields = {
        "run_dir": str(tmp_path / "undisturbed"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32"},
        "extract": {"threads": 1, "workers_max": 1},
        "select": {"size": 16},
        "retrain": {
            "strategies": ["greedy"], "seeds": [0, 1], "epochs": 120, "batch_size": 4, "dtype": "float32",
            "threads": 1, "parallel": 1, "workers": 2, "zero_stage": 2, "checkpoint_steps": 40,
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    for command in ("extract", "select"):
        assert main([command, "--config", str(path), "--quiet"]) == 0
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "disturbed")
    return path


def start(config: Path, run: str, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs", "retrain", "--config", str(config), "--quiet"]
    return subprocess.Popen(
        [*command, "--run_dir", str(config.parent / run)],
        cwd=ROOT,
        env={**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def wait_for(found: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not list(found.glob(pattern)):
        assert process.poll() is None, "the training was over before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)


def test_after_kill_9_of_the_driver_the_same_command_goes_on(config: Path) -> None:
    run = config.parent / "disturbed"
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    driver = start(config, "disturbed", folder)
    wait_for(run / "train", "greedy-1-*/*.json", driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    first = run / "models/greedy-0/training.json"
    written = first.stat().st_mtime_ns
    assert not (run / "models/greedy-1").exists()

    finish(start(config, "disturbed", folder))
    assert first.stat().st_mtime_ns == written, "what was done is not done again"
    assert json.loads((run / "models/greedy-1/training.json").read_text())["resumed_at"] >= 40
    finish(start(config, "undisturbed", folder))
    for seed in (0, 1):
        name = f"models/greedy-{seed}/model.safetensors"
        assert (run / name).read_bytes() == (config.parent / "undisturbed" / name).read_bytes()
    assert not list((run / "train").glob("greedy-*")), "no checkpoints of finished trainings stay"
    shutil.rmtree(folder, ignore_errors=True)
