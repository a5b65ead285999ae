"""recover, end to end on a tiny model: every file is there, a second run skips, and the written spec replays."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers
import yaml

from engine.models import load_model
from engine.rundir import RunDir
from engine.spec import RunSpec
from engine.store import GradientStore
from jobs.__main__ import main
from jobs.job import local_copy


@pytest.fixture(scope="module")
def spec(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: str,
    tiny_finetuned: str,
    tiny_corpus: str,
    tiny_test: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    fields = {
        "run_dir": str(folder / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32"},
        "extract": {"threads": 1, "workers_max": 1},
        "select": {"size": 16},
        "retrain": {
            "strategies": ["random", "greedy"], "seeds": [0, 1], "epochs": 1, "batch_size": 8, "dtype": "float32",
            "checkpoint_steps": 0, "threads": 1, "parallel": 2,
        },
        "evaluate": {"test": [str(tiny_test)]},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def run(spec: Path, ray_session: None) -> Path:
    """A finished run."""
    assert main(["recover", "--config", str(spec), "--quiet"]) == 0
    return spec.parent / "run"


def contents(run: Path) -> dict[str, str]:
    """sha256 of every file but the log."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_output_is_there(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    wanted = (
        "spec.yaml plan.parquet gradients.zarr done selection.parquet models metrics.json quarantine.parquet"
    )
    assert set(f"{wanted} report.html log.jsonl stages".split()) <= names
    assert {path.name for path in (run / "models").iterdir()} == {
        "random-0",
        "random-1",
        "greedy-0",
        "greedy-1",
    }
    assert not list(run.rglob("*.part"))


def test_a_run_ends_with_its_diagnostics_on_the_page(run: Path) -> None:
    found = json.loads((run / "diagnostics.json").read_text())
    assert {"path", "control", "sets", "confidence"} < found.keys()
    page = (run / "report.html").read_text()
    assert "negative control" in page
    assert "unbake diagnose" not in page


def test_the_selection_has_its_columns_and_its_texts(run: Path, tiny_corpus: str) -> None:
    table = pq.read_table(run / "selection.parquet")
    columns = "rank row doc_id partition text label confidence loss alignment norm weight objective gain"
    assert table.column_names == columns.split()
    rows = table.to_pydict()
    texts = [json.loads(line)["text"] for line in Path(tiny_corpus).read_text().splitlines()]
    assert rows["rank"] == list(range(16))
    assert rows["text"] == [texts[row] for row in rows["row"]]
    assert rows["partition"] == [row // 64 for row in rows["row"]]
    np.testing.assert_allclose(np.cumsum(rows["gain"]), rows["objective"], atol=1e-12)
    store = GradientStore.open(RunDir(str(run)))
    for name, column in (("label", "label"), ("confidence", "confidence")):
        assert rows[name] == store.column(column)[rows["row"]].tolist()


def test_every_pick_has_its_certificate(run: Path) -> None:
    rows = pq.read_table(run / "stages" / "select.certificate.parquet").to_pydict()
    selected = pq.read_table(run / "selection.parquet").to_pydict()
    assert rows["row"] == selected["row"]
    assert rows["score"] == selected["objective"]
    assert all(bound < score for bound, score in zip(rows["bound"], rows["score"], strict=True))
    assert {"compared", "rows_read", "bytes_read"} < rows.keys()


def test_a_report_says_what_kind_of_gradients_were_selected_by(run: Path, tmp_path: Path) -> None:
    words = "each coordinate divided by the root of its mean square"
    assert words not in (run / "report.html").read_text()
    other = tmp_path / "run"
    assert main(["fork", str(run), str(other)]) == 0
    command = ["select", str(other), "--select.precondition", "second_moment", "--quiet"]
    assert main(command) == 0
    assert main(["report", str(other), "--quiet"]) == 0
    picks = [pq.read_table(folder / "selection.parquet")["row"].to_pylist() for folder in (run, other)]
    assert picks[0] != picks[1]
    assert words in (other / "report.html").read_text()
    assert "their summed preconditioned gradient has cosine" in (other / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "options", "field"),
    [
        ("retrain", ["--select.size", "8", "--retrain.strategies", "[greedy]"], "select.size = 16"),
        ("diagnose", ["--select.strategy", "topk"], 'select.strategy = "greedy"'),
    ],
)
def test_a_selection_made_with_other_settings_is_refused(
    run: Path, command: str, options: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main([command, str(run), *options]) == 2
    assert f"holds output of the stage select made with {field}" in capsys.readouterr().err
    assert contents(run) == before


def test_picks_of_a_finished_selection_are_checked_against_a_full_scan(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main(["select", str(run), "--verify", "5"]) == 0
    assert "5 random picks are what a full scan of the store finds" in capsys.readouterr().err
    assert contents(run) == before


def test_retrained_models_load_and_moved(run: Path, tiny_base: str) -> None:
    ids = torch.arange(10)[None]
    base = load_model(tiny_base, torch.float32)
    for name in ("random-0", "random-1", "greedy-0", "greedy-1"):
        model = transformers.AutoModelForCausalLM.from_pretrained(run / "models" / name, dtype=torch.float32)
        assert not torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_metrics_hold_every_model(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["metric"] == "accuracy"
    assert [row["strategy"] for row in metrics["strategies"]] == ["random", "greedy"]
    assert all(row["n"] == 2 for row in metrics["strategies"])
    for name in ("base", "finetuned"):
        assert 0 <= metrics[name] <= 1


def test_the_log_can_be_read_by_a_machine(run: Path) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all({"time", "stage", "event"} <= record.keys() for record in records)
    for stage in ("extract", "select", "retrain", "evaluate-base", "evaluate-greedy-1"):
        events = [record["event"] for record in records if record["stage"] == stage]
        assert events[0] == "begin"
        assert "end" in events
    end = next(r for r in records if r["stage"] == "extract" and r["event"] == "end")
    assert end["done"] == 200
    assert end["rate"] > 0


def test_both_endpoints_are_judged_before_the_long_work(run: Path) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    begun = [record["stage"] for record in records if record["event"] == "begin"]
    assert begun[:3] == ["evaluate-base", "evaluate-finetuned", "extract"]


def test_a_finetuned_model_no_better_than_its_base_is_warned_of_before_ray_and_may_be_mended(
    spec: Path, tiny_base: str, tiny_finetuned: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The tiny model that was moved at random judges worse than its base."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.pipeline.session", stop)
    there = ["recover", "--config", str(spec), "--run_dir", str(tmp_path / "run")]
    assert main(there) == 130
    assert "the two models may be swapped" in " ".join(capsys.readouterr().err.split())
    assert main([*there, "--models.base", tiny_finetuned, "--models.finetuned", tiny_base]) == 130
    err = capsys.readouterr().err
    assert "swapped" not in err
    assert "evaluate-finetuned: " in err


def test_a_second_run_skips_every_stage_says_so_and_changes_nothing(
    run: Path, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(["recover", "--config", str(spec)]) == 0
    said = capsys.readouterr().err
    stages = [path.stem for path in (run / "stages").glob("*.json") if not path.stem.endswith(".inputs")]
    stages.remove("map")  # a part of the report
    assert len(stages) >= 10
    for stage in stages:
        assert f"{stage}: complete already, skipped" in said
    after = contents(run)
    assert {name for name in before if before[name] != after[name]} <= {"metrics.json", "report.html"}
    assert before.keys() == after.keys()


def test_quiet_prints_the_table_alone(run: Path, spec: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["recover", "--config", str(run / "spec.yaml"), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = [line for line in out.splitlines() if line.strip()]
    assert "accuracy on the test share" in lines[0]
    assert sum("greedy" in line for line in lines) == 1
    assert "test documents" in lines[-1]


def test_the_written_spec_is_the_runs_own(run: Path, spec: Path) -> None:
    assert RunSpec.from_yaml((run / "spec.yaml").read_text()) == RunSpec.from_yaml(spec.read_text())


def test_the_written_spec_replays_the_run(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In another folder it gives the same store, selection and weights, byte for byte, and quietly."""
    capfd.readouterr()
    arguments = [
        "--config",
        str(run / "spec.yaml"),
        "--run_dir",
        str(tmp_path / "again"),
        "--retrain.seeds",
        "[0]",
    ]
    assert main(["recover", *arguments, "--retrain.strategies", "[greedy]", "--quiet"]) == 0
    assert capfd.readouterr().err == ""
    first, again = contents(run), contents(tmp_path / "again")
    kinds = ("gradients.zarr", "done", "selection.parquet", "plan.parquet", "quarantine.parquet")
    same = [name for name in again if name.startswith(kinds) or name.endswith("model.safetensors")]
    assert len(same) > 30
    assert {name for name in same if first.get(name) != again[name]} == set()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--gradients.dtype", "bfloat16"], "gradients.dtype"),
        (["--task.max_tokens", "20"], "task.max_tokens"),
        (["--select.strategy", "topk"], "select.strategy"),
        (["--retrain.epochs", "2"], "retrain.epochs"),
        (["--corpus.max_documents", "100"], "corpus.max_documents"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_of_another_spec_is_refused_by_the_field(
    change: list[str], field: str, run: Path, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(["recover", "--config", str(spec), "--quiet", *change]) == 2
    out, err = capsys.readouterr()
    assert field in err
    assert (out, err.count("\n")) == ("", 1)
    assert contents(run) == before


def test_a_fork_selects_anew_from_the_same_extraction(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select", str(run), "--select.size", "8"]) == 2
    assert f"unbake fork {run} NEW" in capsys.readouterr().err
    before = contents(run)
    assert main(["fork", str(run), str(tmp_path / "fork")]) == 0
    capsys.readouterr()
    assert main(["select", str(tmp_path / "fork"), "--select.size", "8"]) == 0
    assert main(["extract", str(tmp_path / "fork")]) == 0
    assert "extract: complete already, skipped" in capsys.readouterr().err
    picks = [pq.read_table(folder / "selection.parquet")["row"] for folder in (tmp_path / "fork", run)]
    assert picks[0].to_pylist() == picks[1].to_pylist()[:8]
    assert RunDir(str(tmp_path / "fork")).load_spec().run_dir == str(tmp_path / "fork")
    assert main(["fork", str(run), str(tmp_path / "fork")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents(run) == before


def test_one_more_strategy_repeats_nothing(run: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    more: list[Any] = ["--retrain.strategies", "[random, greedy, loss_min]", "--retrain.seeds", "[0]"]
    assert main(["recover", "--config", str(spec), *more]) == 0
    said = capsys.readouterr().err
    assert "retrain-greedy-0: complete already, skipped" in said
    assert "retrain-loss_min-0: complete already" not in said
    after = contents(run)
    assert {n for n in before if before[n] != after[n]} <= {"metrics.json", "report.html", "spec.yaml"}
    assert "models/loss_min-0/model.safetensors" in after


def test_a_folder_of_a_remote_run_is_copied_to_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = RunDir(f"memory://{tmp_path.name}/run")
    remote.write_bytes("models/greedy-0/config.json", b"{}")
    for content in (b"1", b"2"):
        remote.write_bytes("models/greedy-0/deep/er", content)
        copy = Path(local_copy(remote, "models/greedy-0"))
        assert copy.is_relative_to(tmp_path)
        assert {p.name: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == {
            "config.json": b"{}",
            "er": content,
        }
    remote.remove("")
    local = RunDir(str(tmp_path / "run"))
    assert local_copy(local, "models/x") == str(tmp_path / "run/models/x")
