"""unbake report: from a run directory that may have been moved or lost its store, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import yaml

from engine.rundir import LOG, NEAREST, SELECTION, RunDir
from engine.spec import RunSpec
from engine.store import VALID, GradientStore, StoreShape
from jobs.__main__ import main
from jobs.diagnose import diagnose
from jobs.job import Job
from jobs.pipeline import cheap
from jobs.report import spent


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory as extract and select leave it, with random gradients."""
    made = RunDir(str(tmp_path / "a run"))
    rng = np.random.default_rng(0)
    store = GradientStore.create(
        made,
        StoreShape(1, 300, 16, 100),
        rng.standard_normal(16),
        {"fractions": [1.0], "delta_norm": 1.0, "projector": {"kind": "exact"}},
    )
    store._arrays["features"][0] = rng.standard_normal((300, 16)).astype(np.float16)
    store._arrays["scale"][0] = np.ones(300, np.float32)
    store._arrays["label"][:] = np.zeros(300, np.int32)
    store._arrays["state"][:] = np.full(300, VALID, np.uint8)
    fields = {
        "run_dir": str(tmp_path / "where it was"),
        "models": {"base": "b", "finetuned": "f"},
        "corpus": {"paths": ["c"]},
        "task": {"labels": tiny.LABELS},
    }
    made.save_spec(RunSpec.from_dict(fields))
    rows = np.arange(20)
    table = {
        "rank": rows,
        "row": rows * 7,
        "doc_id": [f"id{i}" for i in rows],
        "text": [f"text {i}" for i in rows],
    }
    made.write_table(SELECTION, pa.table(table | {"objective": np.linspace(0.1, 0.4, 20)}))
    for stage in ("extract", "select"):
        made.begin(stage, {"models.base": "0" * 64})
        made.finish(stage, {"models.base": "0" * 64}, {"seconds": 1.0})
    return made


def test_every_format_is_written_into_the_run_directory_named(run: RunDir) -> None:
    for kind in ("html", "md", "json"):
        assert main(["report", run.root, "--format", kind, "-q"]) == 0
        assert run.exists(f"report.{kind}")
    known = json.loads(run.read_bytes("report.json"))
    assert known["n_selected"] == 20
    assert len(known["map"]["selected"]) == 20
    assert known["hashes"]["base weights"] == "0" * 64
    assert not Path(run.root).parent.joinpath("where it was").exists()


def test_it_opens_where_asked_and_prints_where_asked(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = tmp_path / "page.html"
    assert main(["report", run.root, "--open", "-q"]) == 0
    assert main(["report", run.root, "--open", "--out", str(out), "-q"]) == 0
    assert opened == [Path(run.path("report.html")).as_uri(), out.as_uri()]
    assert "text 19" in out.read_text()
    capsys.readouterr()
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert main(["report", run.root, "--open"]) == 0
    assert f"no browser here: open {opened[0]}" in capsys.readouterr().err
    assert main(["report", run.root, "--format", "md", "--out", "-", "-q"]) == 0
    assert capsys.readouterr().out.startswith("# What f may have learned from\n")
    assert main(["report", run.root, "--format", "md", "--open"]) == 2
    assert main(["report", run.root, "--out", str(tmp_path / "no/page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_nearest_true_documents_are_those_of_the_selection(run: RunDir) -> None:
    near = {"nearest": [f"true {i}" for i in range(20)], "nearest_distance": [i / 20 for i in range(20)]}
    run.write_table(NEAREST, pa.table(near))
    main(["report", run.root, "-q"])
    page = run.read_bytes("report.html").decode()
    assert '"true 7",0.35]' in page
    run.write_table(NEAREST, pa.table(near).slice(0, 5))  # of a selection that was made anew
    main(["report", run.root, "-q"])
    assert "true 7" not in run.read_bytes("report.html").decode()


def test_the_map_outlives_the_store(run: RunDir) -> None:
    main(["report", run.root, "--format", "json", "-q"])
    before = json.loads(run.read_bytes("report.json"))["map"]
    run.remove("gradients.zarr")
    main(["report", run.root, "--format", "json", "-q"])
    assert json.loads(run.read_bytes("report.json"))["map"] == before
    run.remove("stages/map.json")
    main(["report", run.root, "--format", "json", "-q"])
    assert json.loads(run.read_bytes("report.json"))["map"] is None


def test_a_run_is_diagnosed_where_that_is_cheap_and_anew_for_another_selection(run: RunDir) -> None:
    spec = run.load_spec().model_copy(update={"run_dir": run.root})
    job = Job(spec, quiet=True)
    for size in (20, 10):
        made = {"seconds": 1.0, "label_counts": [], "mean_confidence": 0.5}
        made["confidence_histogram"] = {"edges": [0.0, 0.5, 1.0], "counts": [1, 1]}
        run.finish("extract", {"models.base": "0" * 64}, made)
        run.remove("stages/select.inputs.json")
        run.finish("select", {"size": size}, {"seconds": 1.0})
        run.write_table(SELECTION, run.read_table(SELECTION).slice(0, size))
        assert cheap(job, run.stage_result("select"))
        assert len(diagnose(job)["path"]["gain"]) == size
        assert main(["report", run.root, "-q"]) == 0
        page = run.read_bytes("report.html").decode()
        assert f"of {size}</td>" in page
        assert "unbake diagnose" not in page
    assert not cheap(job, {"seconds": 301.0})
    sharded = spec.model_copy(update={"select": spec.select.model_copy(update={"shards": 2})})
    assert not cheap(Job(sharded, quiet=True), {"seconds": 1.0})
    run.remove("gradients.zarr")
    assert not cheap(job, {"seconds": 1.0})


def test_a_selection_that_was_made_anew_gets_a_new_map(run: RunDir) -> None:
    main(["report", run.root, "--format", "json", "-q"])
    before = json.loads(run.read_bytes("report.json"))["map"]
    table = run.read_table(SELECTION)
    run.write_table(SELECTION, table.set_column(1, "row", pa.array(np.arange(20))))
    run.remove("stages/select.inputs.json")
    run.finish("select", {"size": 20}, {"seconds": 1.0})
    main(["report", run.root, "--format", "json", "-q"])
    after = json.loads(run.read_bytes("report.json"))["map"]
    assert after["selected"] != before["selected"]
    assert after["corpus"] == before["corpus"]


def test_a_report_elsewhere_leaves_the_run_as_it_was(run: RunDir, tmp_path: Path) -> None:
    before = {name: run.read_bytes(name) for name in run.walk()}
    assert main(["report", run.root, "--out", str(tmp_path / "page.html"), "-q"]) == 0
    assert {name: run.read_bytes(name) for name in run.walk()} == before


def test_time_is_that_of_all_starts_also_of_killed_ones(run: RunDir) -> None:
    events = [
        (10, "extract", "begin"), (14, "extract", "progress"),  # killed
        (100, "extract", "begin"), (101, "extract", "progress"), (103, "extract", "end"),
        (103, "select", "begin"), (108, "select", "failed"),
        (200, "retrain", "skipped"),
    ]  # fmt: skip
    lines = [json.dumps({"time": t, "stage": s, "event": e}) for t, s, e in events]
    run.write_bytes(LOG, "\n".join([*lines, '{"time": 201, "sta']).encode())
    assert spent(run) == {"extract": 7.0, "select": 5.0}


def test_a_folder_that_is_no_run_and_a_run_without_a_selection_are_said(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    run.remove("stages/select.json")
    assert main(["report", run.root]) == 2
    assert "unbake select" in capsys.readouterr().err
    spec = yaml.safe_load(run.read_bytes("spec.yaml"))
    assert spec["models"]["base"] == "b"
