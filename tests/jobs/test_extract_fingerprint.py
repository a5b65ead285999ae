"""The extraction's fingerprint holds everything that its bytes depend on, and nothing that they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from engine.rundir import fingerprint
from engine.spec import RunSpec
from engine.target import choose_target
from jobs.extract import _inputs, prepare
from jobs.job import Job

CHANGES: list[dict[str, dict[str, Any]]] = [
    {"gradients": {"seed": 1}},
    {"gradients": {"projector": "rademacher"}},
    {"gradients": {"dim": 40}},
    {"gradients": {"checkpoints": 2}},
    {"gradients": {"dtype": "bfloat16"}},
    {"gradients": {"tokens_per_batch": 512}},
    {"gradients": {"layers": "mlp"}},
    {"extract": {"threads": 2}},
    {"extract": {"gpus_per_worker": 1}},
    {"task": {"max_tokens": 20}},
    {"corpus": {"partition_rows": 30}},
]
SAME: list[dict[str, dict[str, Any]]] = [
    {},
    {"extract": {"workers_max": 3, "max_attempts": 1}},
    {"select": {"size": 7}},
]


def stamp(folder: Path, models: tuple[str, str], corpus: str, change: dict[str, dict[str, Any]]) -> str:
    fields: dict[str, Any] = {
        "run_dir": str(folder / f"run-{len(list(folder.iterdir()))}"),
        "models": {"base": models[0], "finetuned": models[1]},
        "corpus": {"paths": [corpus]},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"projector": "tensorsketch", "dim": 32},
        "extract": {"threads": 1, "gpus_per_worker": 0},
        "select": {"size": 5},
    }
    for section, values in change.items():
        fields[section] = {**fields[section], **values}
    job = Job(RunSpec.from_dict(fields), quiet=True)
    return fingerprint(_inputs(job, prepare(job).plan))


def test_the_fingerprint_holds_seed_kind_and_whatever_else_changes_bytes(
    tiny_base: str, tiny_finetuned: str, tiny_corpus: str, tmp_path: Path
) -> None:
    models = tiny_base, tiny_finetuned
    same = {stamp(tmp_path, models, tiny_corpus, change) for change in SAME}
    assert len(same) == 1
    others = {stamp(tmp_path, models, tiny_corpus, change) for change in CHANGES}
    others.add(stamp(tmp_path, models[::-1], tiny_corpus, {}))
    assert len(others - same) == len(CHANGES) + 1


def test_a_run_begun_where_bfloat16_is_imitated_goes_on_in_float32_elsewhere(
    tiny_base: str, tiny_finetuned: str, tiny_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus]},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:"},
        "extract": {"threads": 1, "gpus_per_worker": 0},
        "select": {"size": 5},
    }
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def inputs(native: bool) -> dict[str, Any]:
        monkeypatch.setattr("engine.precision.multiplies_bfloat16", lambda: native)
        job = Job(RunSpec.from_dict(fields), quiet=True)
        found = _inputs(job, prepare(job).plan)
        job.run.save_spec(job.spec)
        return found

    begun = inputs(native=False)
    assert begun["gradients.dtype"] == "float32"
    assert inputs(native=True) == begun


@pytest.mark.parametrize("kind", ["rademacher", "tensorsketch"])
def test_the_store_says_which_projector_made_it(
    tiny_base: str, tiny_finetuned: str, tiny_corpus: str, kind: str
) -> None:
    def described(seed: int) -> dict[str, Any]:
        spec = RunSpec.from_dict(
            {
                "models": {"base": tiny_base, "finetuned": tiny_finetuned},
                "corpus": {"paths": [tiny_corpus]},
                "task": {"labels": tiny.LABELS, "template": "{text} topic:"},
                "gradients": {"projector": kind, "dim": 32, "seed": seed},
            }
        )
        job = Job(spec, quiet=True)
        return choose_target(spec, job.endpoints, job.encoder.label_ids).projector().describe()

    assert (described(3)["kind"], described(3)["seed"]) == (kind, 3)
    assert described(3) != described(4)
