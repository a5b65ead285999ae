"""Mistakes in the retrain section are found before hours of work, each in one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny

from engine.errors import UserError
from engine.spec import RunSpec
from jobs.job import Job
from jobs.retrain import check


def job(folder: Path, retrain: dict[str, Any], ray: dict[str, Any] | None = None) -> Job:
    fields = {
        "run_dir": str(folder),
        "models": {"base": "base", "finetuned": "finetuned"},
        "corpus": {"paths": ["*.txt"]},
        "task": {"labels": tiny.LABELS},
        "retrain": retrain,
        "ray": ray or {},
    }
    return Job(RunSpec.from_dict(fields), quiet=True)


def test_workers_that_a_local_ray_has_no_room_for_are_refused_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^retrain.workers is 3, and this machine has 2 CPUs"):
        check(job(tmp_path, {"workers": 3}, {"num_cpus": 2}))
    check(job(tmp_path, {"workers": 2}, {"num_cpus": 2}))
    check(job(tmp_path, {"workers": 300}, {"address": "auto"}))


def test_lora_without_peft_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(job(tmp_path, {"lora": {"rank": 4}}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unbake\[adapters\]'"):
        check(job(tmp_path, {"lora": {"rank": 4}}))


@pytest.mark.parametrize(
    ("retrain", "sentence"),
    [
        ({"workers": 2, "workers_max": 1}, "workers_max must be at least workers"),
        ({"workers_max": 2, "optimizer": "sgd"}, "workers_max needs optimizer adamw or adam"),
        ({"workers_max": 2, "zero_stage": 0}, "workers_max needs zero_stage 1, 2 or 3"),
        ({"lora": {"rank": 4}, "freeze_body": True}, "lora freezes all but its adapters"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, retrain: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        job(tmp_path, retrain)
