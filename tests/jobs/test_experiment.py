"""experiment: cells share their stages, a killed run goes on, and the tables say what the models did."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from scipy import stats

from engine.checkpoints import Endpoints
from engine.errors import UserError
from engine.experiment import Grid, expand, summarise
from engine.experiment.figures import figures
from engine.experiment.grid import COLUMNS, extraction_key, finetune_recipe
from engine.models import load_model
from engine.rundir import RunDir
from engine.select import Columns, View, select
from engine.spec import Select
from engine.store import GradientStore
from engine.target import choose_target
from jobs import rounds
from jobs.__main__ import main
from jobs.evaluate import measure
from jobs.grids import read_grid, recipes
from jobs.job import Job
from jobs.samples import write_samples
from jobs.select import select_with


def grid(folder: Path, base: str, corpus: str, test: Path, **changes: Any) -> dict[str, Any]:
    """Two projected sizes by two strategies by two seeds, from a model that the experiment fine-tunes itself."""
    return {
        "run_dir": str(folder / "experiment"),
        "data_dir": str(test.parent),
        "data": {"hidden": {"path": test.name, "rows": 24, "where": {"label": [0, 1, 2]}}},
        "finetune": {
            "documents": "data:hidden", "epochs": 2, "trajectory_steps": 2, "retrain": {"learning_rate": 1e-2},
        },
        "spec": {
            "models": {"base": base},
            "corpus": {"paths": [corpus], "partition_rows": 64},
            "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
            "gradients": {"dtype": "float32", "projector": "rademacher"},
            "extract": {"threads": 1, "workers_max": 1},
            "select": {"size": 8},
            "retrain": {
                "epochs": 1, "batch_size": 8, "dtype": "float32", "checkpoint_steps": 0, "threads": 1,
                "parallel": 2,  # of eight pretended CPUs two are there, and each lane is six processes
            },
            "evaluate": {
                "test": [str(test)], "validation_share": 0.0, "train": ["data:hidden"], "embedder": "base",
            },
        },
        "grid": {"gradients.dim": [16, 32], "strategy": ["random", "greedy"], "seed": [0, 1]},
        **changes,
    }  # fmt: skip


REPEATS = 20
"""Documents of the corpus that stand in it a second time, at its end."""


@pytest.fixture(scope="module")
def ready(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: str,
    tiny_corpus: str,
    tiny_test: Path,
    ray_session: None,
) -> tuple[Path, Path]:
    """A finished experiment: its file and its folder."""
    pytest.importorskip("ot")
    folder = tmp_path_factory.mktemp("grid")
    path, corpus = folder / "grid.yaml", folder / "corpus.jsonl"
    lines = Path(tiny_corpus).read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines + lines[:REPEATS]))
    path.write_text(yaml.safe_dump(grid(folder, tiny_base, str(corpus), tiny_test)))
    assert main(["experiment", "--config", str(path), "--quiet"]) == 0
    return path, folder / "experiment"


def events(folder: Path, stage: str) -> list[str]:
    """Events of a stage in all logs below a folder."""
    lines = [line for log in folder.rglob("log.jsonl") for line in log.read_text().splitlines()]
    return [r["event"] for r in map(json.loads, lines) if r["stage"] == stage]


def test_every_cell_has_one_tidy_row(ready: tuple[Path, Path]) -> None:
    rows = pq.read_table(ready[1] / "results.parquet").to_pylist()
    assert len(rows) == len({(r["gradients.dim"], r["strategy"], r["seed"]) for r in rows}) == 8
    for row in rows:
        assert 0 <= row["value"] <= 1
        assert (row["selected"], row["metric"], row["dim"]) == (8, "accuracy", row["gradients.dim"])
        assert row["distance_emd"] > 0
    assert len({(row["base"], row["finetuned"]) for row in rows}) == 1
    names = {name for name in rows[0] if not name.startswith("distance_")}
    assert names == {"gradients.dim", "strategy", "seed", *COLUMNS}
    by_dim = {row["dim"]: row["store_bytes"] for row in rows}
    assert by_dim[32] > by_dim[16]


def test_what_cells_share_is_done_once(ready: tuple[Path, Path]) -> None:
    """random does not look at gradients: its selections of a seed are one training, whatever the store."""
    folder = ready[1]
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert len(list((folder / "extractions").iterdir())) == 2
    for stage, times in (("fine-tune", 1), ("extract", 2), ("evaluate-base", 1), ("evaluate-finetuned", 1)):
        assert events(folder, stage).count("begin") == times
    assert len(list((folder / "extractions").glob("*/comparisons/greedy-*.parquet"))) == 2
    trained = {(row["gradients.dim"], row["strategy"], row["seed"]): row["training"] for row in rows}
    assert len(set(trained.values())) == 2 + 4
    assert trained[16, "random", 1] == trained[32, "random", 1] != trained[16, "random", 0]
    assert len(list((folder / "stages").glob("judge-*.inputs.json"))) == 2 + 6
    assert not list(
        (folder / "models").glob("????????????????/model.safetensors")
    )  # judged ones are not kept


def test_the_fine_tuned_model_learned_the_sample(ready: tuple[Path, Path], tiny_base: str) -> None:
    import torch

    hidden = pq.read_table(ready[1] / "data/hidden.parquet").to_pydict()
    assert len(hidden["text"]) == 24
    assert set(hidden["label"]) <= {0, 1, 2}
    (made,) = (ready[1] / "models").glob("finetuned-????????????????")
    ids = torch.arange(10)[None]
    models = [load_model(path, torch.float32)(input_ids=ids).logits for path in (str(made), tiny_base)]
    assert not torch.allclose(*models)


def test_means_and_intervals_are_those_of_the_rows(ready: tuple[Path, Path]) -> None:
    rows = pq.read_table(ready[1] / "results.parquet").to_pylist()
    summary = summarise(rows, ["gradients.dim"])
    assert len(summary) == 4
    for line in summary:
        keys = ("gradients.dim", "strategy")
        values = [row["value"] for row in rows if all(row[key] == line[key] for key in keys)]
        error = stats.sem(values)
        low, high = stats.t.interval(0.95, 1, np.mean(values), error) if error else (values[0], values[0])
        assert (line["mean"], line["low"], line["high"]) == pytest.approx((np.mean(values), low, high))
        of = {
            (row["strategy"], row["seed"]): row["value"]
            for row in rows
            if row["gradients.dim"] == line["gradients.dim"]
        }
        apart = [of[line["strategy"], seed] - of["random", seed] for seed in (0, 1)]
        expected = (np.mean(apart), stats.sem(apart))
        assert (line["minus_random"], line["minus_random_stderr"]) == pytest.approx(expected)


def test_tables_and_plots_are_written(ready: tuple[Path, Path]) -> None:
    folder = ready[1]
    assert (folder / "results.md").read_text().count("\n| ") == 1 + 4  # the rule and its lines
    assert {path.name for path in (folder / "plots").iterdir()} == {"gradients.dim.svg"}
    text = "".join(ET.parse(folder / "plots/gradients.dim.svg").getroot().itertext())
    for word in ("random", "greedy", "accuracy", "gradients.dim"):
        assert word in text


def test_choices_never_open_the_test_and_grids_of_one_folder_keep_their_results_apart(
    ready: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = ready
    before, results = set((folder / "stages").iterdir()), (folder / "results.parquet").read_bytes()
    few = ["--grid.gradients.dim", "[16]", "--grid.seed", "[0]", "--name", "choice", "--judge", "validation"]
    assert main(["experiment", str(path), "--quiet", *few]) == 2
    assert "validation_share above 0" in capsys.readouterr().err
    few += ["--spec.evaluate.validation_share", "0.5"]
    assert main(["experiment", str(path), "--quiet", *few]) == 0
    rows = pq.read_table(folder / "results/choice/results.parquet").to_pylist()
    assert {(row["strategy"], row["judged"]) for row in rows} == {
        ("random", "validation"),
        ("greedy", "validation"),
    }
    assert all(row["value"] == row["validation"] for row in rows)
    new = [
        p
        for p in set((folder / "stages").iterdir()) - before
        if re.fullmatch(r"judge-[0-9a-f]+\.json", p.name)
    ]
    assert len(new) == 4
    assert all(json.loads(p.read_text())["result"]["test"] is None for p in new)
    assert "Judged on the validation documents" in (folder / "results/choice/results.md").read_text()
    assert (folder / "results.parquet").read_bytes() == results
    assert events(folder, "extract").count("begin") == 2


def test_a_second_start_does_nothing_and_a_wider_grid_only_what_is_new(ready: tuple[Path, Path]) -> None:
    path, folder = ready
    before = {p: p.stat().st_mtime_ns for p in (folder / "stages").iterdir()}
    results = (folder / "results.parquet").read_bytes()
    assert main(["experiment", str(path), "--quiet"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "stages").iterdir()} == before
    assert (folder / "results.parquet").read_bytes() == results
    more = ["--grid.strategy", "[random, greedy, topk]", "--grid.gradients.dim", "[16]", "--grid.seed", "[0]"]
    assert main(["experiment", str(path), "--quiet", *more]) == 0
    new = {p.name for p in (folder / "stages").iterdir()} - {p.name for p in before}
    assert len([name for name in new if name.endswith(".inputs.json")]) == 1  # topk
    assert events(folder, "extract").count("begin") == 2
    assert main(["experiment", str(path), "--quiet"]) == 0
    assert (folder / "results.parquet").read_bytes() == results


@pytest.mark.slow
def test_a_judgement_that_fails_ends_those_that_wait_and_no_model_is_lost(
    ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = ready
    more = "--name failing --grid.strategy [random] --grid.gradients.dim [16] --grid.seed [5,6,7]"
    command = ["experiment", str(path), "--quiet", *more.split()]
    asked = []

    def fail(job: Job, name: str, *_: Any) -> Any:
        asked.append(name)
        time.sleep(1)
        raise UserError("the test documents are gone.")

    with monkeypatch.context() as context:
        context.setattr("jobs.experiment.measure", fail)
        assert main(command) == 2
    assert len(asked) < 3  # one more may have begun
    models = {p: p.stat().st_mtime_ns for p in (folder / "models").glob("????????????????/model.safetensors")}
    assert len(models) == 3
    seen = []

    def look(job: Job, name: str, folder: str, *others: Any) -> Any:
        seen.append(Path(folder, "model.safetensors"))
        assert seen[-1].stat().st_mtime_ns == models[seen[-1]]
        return measure(job, name, folder, *others)

    monkeypatch.setattr("jobs.experiment.measure", look)
    assert main(command) == 0
    assert set(seen) == set(models)


def test_a_runs_selection_is_diagnosed_along_the_recorded_training(
    ready: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The extraction is a run directory like any other, and fine-tuning kept a model every two steps."""
    (run,) = (ready[1] / "extractions").glob(extraction_of(ready[1], 32))
    (recorded,) = (ready[1] / "models").glob("finetuned-*-trajectory")
    assert sorted(path.name for path in recorded.iterdir()) == ["step-000002", "step-000004"]
    chosen = ["--select.strategy", "greedy", "--quiet"]
    assert main(["select", str(run), *chosen]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(run), *chosen, "--trajectory", str(recorded)]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "diagnostics.json").read_text())
    assert set(found["sets"]) == {"greedy", "random", "topk"}
    assert len(found["path"]["gain"]) == 8
    assert found["projection"]["target_error"] > 0.01  # 32 dimensions
    ways = [row["way"] for row in found["trajectory"]["recorded"]]
    assert 0 < ways[0] < ways[1] < 1
    first = found["trajectory"]["synthetic"][0]
    assert first["cosine"] > 0.1  # at theta_0 the true gradient points along Delta
    assert f"synthetic 0: gradient's cosine {first['cosine']:.3f}" in said
    for warning in found["warnings"]:
        assert warning["try"] in said
    assert main(["report", str(run), *chosen]) == 0
    page = (run / "report.html").read_text()
    for words in ("Trajectory fidelity", "step-000004", "Redundancy and balance"):
        assert words in page


def test_repeats_and_unsure_documents_are_left_out_of_a_runs_selection(ready: tuple[Path, Path]) -> None:
    run = RunDir(str(ready[1] / "extractions" / extraction_of(ready[1], 32)))
    job = Job(run.load_spec(), quiet=True)
    store = GradientStore.open(run)
    kept = store.n_rows - REPEATS
    every = Select(strategy="loss_max", size=kept, dedupe="exact")
    select_with(job, every, "select-once", "comparisons/once.parquet")
    assert sorted(run.read_table("comparisons/once.parquet")["row"].to_pylist()) == list(range(kept))
    assert run.stage_result("dedupe-exact") == {"documents": kept + REPEATS, "repeats": REPEATS}
    confidence = store.column("confidence")
    floor = float(np.sort(confidence)[-30])
    sure = Select(strategy="topk", size=30, min_confidence=floor)
    select_with(job, sure, "select-sure", "comparisons/sure.parquet")
    assert (confidence[run.read_table("comparisons/sure.parquet")["row"].to_numpy()] >= floor).all()
    with pytest.raises(UserError, match="only 30 valid documents that the fine-tuned model is at least"):
        select_with(job, sure.model_copy(update={"size": 31}), "select-more", "comparisons/more.parquet")
    with pytest.raises(UserError, match=r"rademacher projection: extract with gradients\.projector=exact"):
        select_with(job, Select(size=3, precondition="second_moment"), "select-p", "comparisons/p.parquet")


def test_shards_in_actors_see_the_same_view(ready: tuple[Path, Path]) -> None:
    run = RunDir(str(ready[1] / "extractions" / extraction_of(ready[1], 32)))
    job = Job(run.load_spec(), quiet=True)
    tables = []
    for shards in (1, 2):
        settings = Select(size=12, target="negative", shards=shards)
        select_with(job, settings, f"select-shards-{shards}", f"comparisons/shards-{shards}.parquet")
        tables.append(run.read_table(f"comparisons/shards-{shards}.parquet"))
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_rounds_aim_at_what_training_on_the_picks_so_far_has_left_of_delta(
    ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(str(ready[1] / "extractions" / extraction_of(ready[1], 32)))
    spec = run.load_spec()
    job = Job(spec, quiet=True)
    settings = spec.select.model_copy(update={"strategy": "greedy", "size": 9, "rounds": 2})
    aimed = []

    def towards(job: Job, store: Any, rows: Any, folder: str, number: int) -> Any:
        view = rounds._towards_itself(job, store, rows, folder, number)
        target = choose_target(spec, job.endpoints, job.encoder.label_ids)
        gone, norm = target.project(Endpoints(job.endpoints.base, f"{folder}/model-{number}"))
        aimed.append((view.target, gone, norm))
        return view

    monkeypatch.setattr(rounds, "_towards_itself", rounds._towards, raising=False)
    monkeypatch.setattr(rounds, "_towards", towards)
    result = select_with(job, settings, "select-rounds", "comparisons/rounds.parquet")
    table = run.read_table("comparisons/rounds.parquet")
    store = GradientStore.open(run)
    ((left, gone, norm),) = aimed
    assert norm > 0  # training did move the model
    np.testing.assert_allclose(left + gone, store.target, rtol=1e-4, atol=1e-5 * np.abs(store.target).max())
    first = select(store, Columns(), settings.model_copy(update={"size": 5, "rounds": 1})).rows
    rows = table["row"].to_pylist()
    assert rows[:5] == first.tolist()
    again = Columns(repeats=np.isin(np.arange(store.n_rows), first))
    second = select(View(store, left), again, settings.model_copy(update={"size": 4, "rounds": 1})).rows
    assert rows[5:] == second.tolist()
    assert len(result["path"]) == len(set(rows)) == 9
    assert not run.exists("rounds/select-rounds/model-0")
    assert select_with(job, settings, "select-rounds", "comparisons/rounds.parquet") == result


def extraction_of(folder: Path, dim: int) -> str:
    """Name of the extraction of a projected size."""
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    return next(row["extraction"] for row in rows if row["dim"] == dim)


@pytest.mark.slow
def test_a_killed_experiment_goes_on_from_where_it_was(
    tmp_path: Path,
    ready: tuple[Path, Path],
    tiny_base: str,
    tiny_finetuned: str,
    tiny_corpus: str,
    tiny_test: Path,
) -> None:
    """Killed once a model is judged; what was done is not done again, and the results are the undisturbed run's."""
    path = tmp_path / "grid.yaml"
    fields = grid(tmp_path, tiny_base, str(ready[0].parent / "corpus.jsonl"), tiny_test, models_at_once=1)
    fields["grid"] |= {"gradients.dim": [16]}
    path.write_text(yaml.safe_dump(fields))
    folder = tmp_path / "experiment"
    command = [sys.executable, "-m", "jobs", "experiment", "--config", str(path), "--quiet"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    deadline = time.monotonic() + 400
    while len(list(folder.glob("stages/judge-*.inputs.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in folder.glob("stages/judge-*.json")}
    assert done
    assert not (folder / "results.parquet").exists()
    assert main(["experiment", "--config", str(path), "--quiet"]) == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert events(folder, "extract").count("begin") == 1
    undisturbed = {
        row["training"]: row["value"] for row in pq.read_table(ready[1] / "results.parquet").to_pylist()
    }
    for row in pq.read_table(folder / "results.parquet").to_pylist():
        assert undisturbed[row["training"]] == row["value"]


# ---- grids


def minimal(**changes: Any) -> dict[str, Any]:
    spec = {
        "models": {"base": "b", "finetuned": "f"},
        "corpus": {"paths": ["c.jsonl"]},
        "task": {"labels": ["yes", "no"]},
    }
    return {"spec": spec, **changes}


def test_cells_are_the_product_of_the_axes_and_share_extractions_where_they_can() -> None:
    axes = {
        "gradients.dim": [64, 128],
        "select.target": ["delta", "negative"],
        "mix": {"one": {"corpus.paths": ["a"]}, "both": {"corpus.paths": ["a", "b"]}},
        "strategy": ["random", "greedy"],
        "seed": [3, 4],
    }
    cells = expand(Grid.model_validate(minimal(grid=axes)))
    assert len(cells) == 2 * 2 * 2 * 2 * 2
    assert len({cell.spec.run_dir for cell in cells}) == 4
    last = cells[-1]
    assert last.axes == {"gradients.dim": 128, "select.target": "negative", "mix": "both"}
    assert (last.spec.corpus.paths, last.spec.select.target) == (["a", "b"], "negative")
    assert last.spec.run_dir.endswith(extraction_key(last.spec))
    assert {cell.spec.select.seed for cell in cells if cell.strategy == "random"} == {3, 4}
    assert {cell.spec.select.seed for cell in cells if cell.strategy == "greedy"} == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"select.sizes": [1]}}, r"cell select\.sizes=1: unknown field select\.sizes"),
        ({"grid": {"select.size": [0]}}, "cell select.size=0: select.size"),
        ({"grid": {"seed": []}}, "axis seed has no values"),
        ({"grid": {"value": {"a": {}}}}, "axis value has the name of a column"),
        ({"grid": {"seed": [1, 1]}}, "axis seed has a value twice"),
        ({"grid": {"leak": [0.1]}}, "axis leak needs finetune"),
        ({"grid": {"leak": [2]}}, "shares between 0 and 1"),
        ({"finetune": {"documents": "data:gone"}}, "data:gone is no sample of data"),
        ({"data": {"x": {"rows": 3}}}, "a sample needs a path or a hub data set"),
        ({"speck": {}}, "unknown field speck"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_grid_that_means_nothing_is_refused_in_a_sentence(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(minimal(run_dir=str(tmp_path / "run"), **changes)))
    assert main(["experiment", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_samples_of_one_source_need_not_overlap_and_are_drawn_once(tmp_path: Path, tiny_test: Path) -> None:
    one = {"path": tiny_test.name, "rows": 30, "columns": {"text": "text"}}
    fields = minimal(run_dir=str(tmp_path / "run"), data_dir=str(tiny_test.parent))
    fields["data"] = {"first": one, "rest": {**one, "rows": 50, "skip": 30}}
    write_samples(Grid.model_validate(fields))
    first, rest = (pq.read_table(tmp_path / f"run/data/{name}.parquet") for name in ("first", "rest"))
    every = [json.loads(line)["text"] for line in tiny_test.read_text().splitlines()]
    drawn = first["text"].to_pylist() + rest["text"].to_pylist()
    assert first.column_names == ["text"]
    assert len(drawn) == 80
    assert sorted(drawn) == sorted(every)
    fields["data"]["first"] = {**one, "seed": 1}
    with pytest.raises(UserError, match="drawn with other settings"):
        write_samples(Grid.model_validate(fields))
    (tmp_path / "run/data/first.parquet").unlink()  # as that sentence says
    write_samples(Grid.model_validate(fields))
    assert pq.read_table(tmp_path / "run/data/first.parquet")["text"].to_pylist() != first["text"].to_pylist()
    fields["data"] = {"gone": {"path": "no.parquet"}}
    with pytest.raises(UserError, match=r"no\.parquet does not exist"):
        write_samples(Grid.model_validate(fields))


def test_samples_come_from_a_data_set_where_no_file_is_there(tmp_path: Path) -> None:
    """A data set in a folder, as the Hub's client reads it: whole or streamed, the first of a list, no empty rows."""
    (tmp_path / "set").mkdir()
    table = pa.table({"query": ["a", "b", "c", "d"], "answers": [["one", "uno"], [], ["three"], ["four"]]})
    pq.write_table(table, tmp_path / "set/train-0.parquet")
    source = {"path": "nowhere.parquet", "hub": str(tmp_path / "set"), "columns": {"text": "answers.0"}}
    fields = minimal(run_dir=str(tmp_path / "run"))
    fields["data"] = {"whole": source, "part": {**source, "hub_rows": 3}}
    write_samples(Grid.model_validate(fields))
    whole, part = (pq.read_table(tmp_path / f"run/data/{name}.parquet") for name in ("whole", "part"))
    assert whole.to_pydict() == {"text": ["one", "three", "four"]}
    assert part.to_pydict() == {"text": ["one", "three"]}
    fields["data"] = {"wrong": {**source, "columns": {"text": "title"}}}
    with pytest.raises(UserError, match="no column title"):
        write_samples(Grid.model_validate(fields))


@pytest.mark.parametrize(("base", "seen"), [(0.5, False), (0.74, True)])
def test_a_base_model_far_below_the_rest_does_not_flatten_the_plot(base: float, seen: bool) -> None:
    runs = [("random", 0, 0.800), ("random", 1, 0.802), ("greedy", 0, 0.850), ("greedy", 1, 0.852)]
    rows = [
        {"strategy": name, "seed": seed, "metric": "accuracy", "value": value, "base": base, "finetuned": 0.9}
        | {"judged": "test"}
        for name, seed, value in runs
    ]
    text = figures(summarise(rows, []), [])["strategies.svg"].decode()
    assert ("off the scale" not in text) == seen
    ticks = [float(tick) for tick in re.findall(r">(\d+\.?\d*)</text>", text)]
    assert (min(ticks) <= 75) == seen
    assert max(ticks) >= 87.5


def test_leaked_documents_are_hidden_ones_and_join_the_corpus(tmp_path: Path, tiny_test: Path) -> None:
    fields = grid(tmp_path, "base", "corpus.jsonl", tiny_test)
    described = Grid.model_validate(
        {**fields, "grid": {"leak": [0, 0.5], "strategy": ["greedy"], "seed": [0]}}
    )
    write_samples(described)
    hidden, leaked = (
        pq.read_table(tmp_path / f"experiment/data/{name}.parquet") for name in ("hidden", "leak-0.5")
    )
    assert leaked.column_names == ["text"]  # no label goes with them
    assert len(leaked) == 12
    assert set(leaked["text"].to_pylist()) <= set(hidden["text"].to_pylist())
    none, half = (cell.spec.corpus.paths for cell in expand(described))
    assert none == ["corpus.jsonl"]
    assert half == ["corpus.jsonl", str(tmp_path / "experiment/data/leak-0.5.parquet")]


GRIDS = sorted((Path(__file__).parents[2] / "benchmarks/grids").glob("*.yaml"))
"""The grids of docs/results.md and docs/ablations.md."""


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_of_the_results_are_valid_and_named_beside_their_tables(path: Path) -> None:
    assert len(expand(read_grid(str(path), []))) > 1
    docs = path.parents[2] / "docs"
    said = "".join((docs / page).read_text() for page in ("results.md", "ablations.md"))
    assert f"experiment benchmarks/grids/{path.name}" in said or f"`benchmarks/grids/{path.name}`" in said


def test_a_grid_extends_a_file_of_its_own_folder_and_never_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids/small.yaml").write_text("extends: agnews_baseline\nspec: {select: {size: 7}}\n")
    (tmp_path / "grids/top.yaml").write_text("extends: small.yaml\nspec: {select: {min_confidence: 0.5}}\n")
    select = read_grid("grids/top.yaml", []).spec["select"]
    assert (select["size"], select["min_confidence"]) == (7, 0.5)
    (tmp_path / "grids/small.yaml").write_text("extends: top.yaml\n")
    with pytest.raises(UserError, match=r"grids/small\.yaml: extends: grids/top\.yaml extends itself"):
        read_grid("grids/top.yaml", [])
    (tmp_path / "grids/small.yaml").write_text("extends: absent.yaml\n")
    with pytest.raises(UserError, match=r"cannot read the grid grids/absent\.yaml"):
        read_grid("grids/top.yaml", [])


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_grid_whose_every_cell_is_valid(name: str) -> None:
    recipe = read_grid(name, [])
    cells = expand(recipe)
    assert len(cells) > 1
    assert {"random"} < {cell.strategy for cell in cells} or name == "negative_control"


def test_a_model_is_fine_tuned_on_hard_labels_whatever_its_retraining_learns() -> None:
    """Soft ones are the fine-tuned model's own: both recipes have one model to recover from, and one extraction."""
    hard, soft = read_grid("agnews_baseline", []), read_grid("agnews_distilled", [])
    assert finetune_recipe(soft) == finetune_recipe(hard)
    (one,), (other,) = ({cell.spec.models.finetuned for cell in expand(made)} for made in (hard, soft))
    assert one == other
    assert {cell.spec.run_dir for cell in expand(hard)} == {cell.spec.run_dir for cell in expand(soft)}
    assert {(cell.spec.retrain.labels, cell.spec.retrain.temperature) for cell in expand(soft)} == {
        ("soft", 4)
    }


def test_options_change_a_recipe(tmp_path: Path) -> None:
    changed = read_grid(
        "agnews_baseline", ["--spec.select.size", "77", "--grid.seed", "[5]", "--run_dir", "x"]
    )
    cells = expand(changed)
    assert {cell.spec.select.size for cell in cells} == {77}
    assert {cell.seed for cell in cells} == {5}
    with pytest.raises(UserError, match="options are --field VALUE"):
        read_grid("agnews_baseline", ["--run_dir"])
    with pytest.raises(UserError, match="recipes are"):
        read_grid("no_such_recipe", [])
    with pytest.raises(
        UserError,
        match=r"did you mean agnews_baseline or agnews_distilled or agnews_preconditioned or paper_agnews\?",
    ):
        read_grid("agnews", [])
