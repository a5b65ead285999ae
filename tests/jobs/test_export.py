"""unbake export: what it writes is read by the tools it is for, and says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import yaml

from engine.chat import chat_text
from engine.rundir import METRICS, SELECTION, RunDir
from engine.spec import RunSpec
from jobs.__main__ import main

TASKS: dict[str, dict[str, Any]] = {
    "classification": {
        "corpus": {"paths": ["c"]},
        "task": {"labels": tiny.LABELS, "display_names": ["W", "S", "B", "<b>T"], "template": "Text: {text}\nTopic:"},
    },
    "text": {"corpus": {"paths": ["c"]}, "task": {"kind": "language_modelling"}},
    "prompts": {
        "corpus": {"paths": ["c"], "prompt": "q", "response": "a"}, "task": {"kind": "language_modelling"},
    },
    "chat": {"corpus": {"paths": ["c"], "messages": "m"}, "task": {"kind": "language_modelling"}},
}  # fmt: skip
CHAT = [{"role": "user", "content": "Hi {there}"}, {"role": "assistant", "content": "Hello"}]


def finished(folder: Path, kind: str) -> RunDir:
    """A run directory with two selections, as the stages leave it."""
    run = RunDir(str(folder / "run"))
    fields = {
        "run_dir": run.root,
        "models": {"base": "org/base", "finetuned": "f"},
        "retrain": {"seeds": [3]},
    }
    run.save_spec(RunSpec.from_dict(fields | TASKS[kind]))
    n = 6
    columns: dict[str, Any] = {
        "rank": np.arange(n, dtype=np.int32),
        "row": np.arange(n) * 10,
        "doc_id": [f"d{i}" for i in range(n)],
        "partition": np.zeros(n, np.int32),
        "text": [chat_text(CHAT) if kind == "chat" else f"text {i}\n{{x}}" for i in range(n)],
        "label": pa.array([i % 4 if kind == "classification" else -1 for i in range(n)], pa.int32()),
        "objective": np.linspace(0.1, 0.2, n),
    }
    if kind == "prompts":
        columns |= {"prompt": [f"q{i}" for i in range(n)], "response": [f"a{i}" for i in range(n)]}
    run.write_table(SELECTION, pa.table(columns))
    run.write_table("comparisons/random-3.parquet", pa.table(columns).slice(0, 2))
    for stage, strategy in (("select", "greedy"), ("select-random-3", "random")):
        run.finish(stage, {"s": strategy}, {"strategy": strategy, "candidates": 50})
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("classification", {"prompt": "Text: text 0\n{x}\nTopic:", "completion": " world"}),
        ("text", {"text": "text 0\n{x}"}),
        ("prompts", {"prompt": "q0", "completion": "a0"}),
        ("chat", {"messages": CHAT}),
    ],
)
def test_training_rows_are_those_that_trl_takes(kind: str, first: dict[str, Any], tmp_path: Path) -> None:
    run = finished(tmp_path, kind)
    assert main(["export", run.root, "--to", "jsonl", "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = lines(tmp_path / "rows.jsonl")
    assert rows[0] == first
    assert len(rows) == 6


@pytest.mark.parametrize("kind", TASKS)
def test_datasets_reads_the_folder_with_its_types(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    run = finished(tmp_path, kind)
    out = tmp_path / "out"
    assert main(["export", run.root, "--out", str(out)]) == 0
    data = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 6
    assert data["row"][5] == 50
    if kind == "classification":
        assert data.features["label"].names == ["W", "S", "B", "<b>T"]
        assert data.features["label"].int2str(data["label"][3]) == "<b>T"
    if kind == "chat":
        assert data["messages"][0] == CHAT
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["size_categories"] == ["n<1K"]
    assert "not evidence of membership" in card
    assert "Out of 50 documents, greedy chose 6" in card


def test_a_compared_strategy_is_exported_under_its_own_name(tmp_path: Path) -> None:
    run = finished(tmp_path, "text")
    assert main(["export", run.root, "--strategy", "random", "--out", str(tmp_path / "out")]) == 0
    assert "random chose 2" in (tmp_path / "out/README.md").read_text()


def test_a_model_leaves_with_its_card_and_loads(tmp_path: Path) -> None:
    import transformers

    run = finished(tmp_path, "classification")
    tiny.save_model(Path(run.path("models/greedy-3")))
    run.finish("retrain-greedy-3", {"a": 1})
    model = {"model": "retrained", "strategy": "greedy", "seed": 3, "test": {"accuracy": 0.75}}
    row = {"strategy": "greedy", "mean": 0.75, "spread": None, "gap_closed": 0.5, "gap_spread": None, "n": 1}
    metrics = {
        "metric": "accuracy", "models": [model], "strategies": [row], "base": 0.25, "finetuned": 1.0, "warnings": ["w"],
    }  # fmt: skip
    run.write_json(METRICS, metrics)
    out = tmp_path / "out"
    assert main(["export", run.root, "--to", "model", "--out", str(out)]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(out)
    head, text = (out / "README.md").read_text().split("---\n")[1:3]
    card = yaml.safe_load(head)
    assert card["base_model"] == "org/base"
    assert card["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert "| greedy | 75.0% | 50% | 1 |" in text


def test_what_is_not_there_and_what_would_be_overwritten_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path, "text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, words in (
        (["--out", str(tmp_path / "full")], "is not empty"),
        (["--to", "model", "--out", str(tmp_path / "m")], "has no model of greedy with seed 3"),
        (
            ["--strategy", "topk", "--out", str(tmp_path / "m")],
            "no selection of topk; compared ones: random-3",
        ),
    ):
        assert main(["export", run.root, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
