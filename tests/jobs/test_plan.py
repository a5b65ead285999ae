"""`unbake plan` counts what is there, measures the rest, and leaves the run as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.deepspeed_config import BUCKET_SHARE
from engine.corpus import load_plan
from engine.rundir import PLAN, RunDir
from jobs.__main__ import main


@pytest.fixture
def config(tmp_path: Path, tiny_base: str, tiny_finetuned: str, tiny_corpus: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\n"
        f"models: {{base: {tiny_base}, finetuned: {tiny_finetuned}}}\n"
        f"corpus: {{paths: [{tiny_corpus}], partition_rows: 64}}\n"
        "task: {labels: [world, sports, business, science], max_tokens: 32}\n"
        "gradients: {dtype: float32}\n"
        "select: {size: 20}\n"
        "retrain: {dtype: float32, batch_size: 8}\n"
    )
    return path


def test_a_plan_measures_every_stage_and_starts_none(
    config: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config.parent / "plan.json"
    assert main(["plan", "--config", str(config), "--seconds", "2", "--json", str(out), "-q"]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "200 in 4 partitions" in printed
    assert "none: one worker trains with plain torch" in printed
    assert found["documents"] == 200
    assert {stage["name"]: stage["hours"] > 0 for stage in found["stages"]} == {
        "extract": True,
        "index and select": True,
        "retrain": True,
    }
    assert 200 * 5 < found["tokens"] < 200 * 40
    run = RunDir(str(config.parent / "run"))
    assert load_plan(run).n_rows == 200
    assert set(run.names()) <= {PLAN, "corpus", "log.jsonl"}


def test_suppositions_need_no_measurement(
    config: Path, tiny_base: str, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    supposed = ["--documents", "100000000", "--workers", "64", "--docs-per-second", "500"]
    supposed += ["--retrain.workers", "2", "--retrain.zero_stage", "3"]
    assert main(["plan", "--config", str(config), *supposed, "-q"]) == 0
    printed = capsys.readouterr().out
    assert "100,000,000 in 1,562,500 partitions" in printed
    assert "52 min 05 s" in printed  # 1e8 / (64 * 500) seconds
    assert "select.index_memory_mb" in printed  # 512 MB do not hold an index of 1e8 rows
    (line,) = (line for line in printed.splitlines() if "gradient_clipping" in line)
    shown = json.loads(line)
    assert shown["zero_optimization"]["stage"] == 3
    assert (shown["train_micro_batch_size_per_gpu"], shown["gradient_accumulation_steps"]) == (4, 1)
    weights = load_file(f"{tiny_base}/model.safetensors").values()
    trained = sum(weight.numel() for weight in weights)
    assert shown["zero_optimization"]["reduce_bucket_size"] == -(-trained // BUCKET_SHARE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--documents", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--docs-per-second", "fast"], "docs-per-second"),
    ],
)
def test_a_supposition_that_cannot_be_is_one_sentence(
    config: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(config), *options, "-q"]) == 2
    assert says in capsys.readouterr().err
