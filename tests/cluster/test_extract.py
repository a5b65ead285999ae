"""Extraction through Ray: the bytes of a serial run, resumable, whatever the documents are."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tiny
from safetensors.torch import load_file, save_file

import cluster.extract
from engine.checkpoints import Endpoints
from engine.corpus import make_plan, read_partition
from engine.encode import Encoder
from engine.errors import UserError
from engine.gradients import GradientEngine
from engine.models import load_tokenizer
from engine.rundir import DONE, QUARANTINE, STORE, RunDir
from engine.spec import RunSpec
from engine.store import QUARANTINED, VALID, GradientStore, StoreShape
from engine.target import choose_target
from jobs.extract import extract, prepare
from jobs.job import Job
from jobs.select import select

pytestmark = pytest.mark.usefixtures("ray_session")


def make_spec(run: Path, models: tuple[str, str], files: str, **sections: dict[str, Any]) -> RunSpec:
    fields: dict[str, Any] = {
        "run_dir": str(run),
        "models": {"base": models[0], "finetuned": models[1]},
        "corpus": {"paths": [files], "partition_rows": 24},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32", "checkpoints": 2, "projector": "tensorsketch", "dim": 32},
        "extract": {"workers_max": 1, "cpus_per_worker": 0.5, "threads": 1},
        "select": {"size": 5},
    }
    for name, section in sections.items():
        fields[name] = {**fields[name], **section}
    return RunSpec.from_dict(fields)


def store_bytes(run: Path) -> dict[str, str]:
    """sha256 of every file of the store and of the completion records."""
    files = [path for name in (STORE, DONE) for path in (run / name).rglob("*") if path.is_file()]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def make_engine(spec: RunSpec) -> GradientEngine:
    """The engine that an actor holds, in this process."""
    endpoints = Endpoints(spec.models.base, spec.models.finetuned)
    encoder = Encoder(load_tokenizer(spec.models.base), spec.task, spec.loss_scope)
    return GradientEngine(endpoints, encoder, choose_target(spec, endpoints, encoder.label_ids), spec)


def run_job(spec: RunSpec) -> dict[str, Any]:
    return extract(Job(spec, quiet=True))


@pytest.fixture(scope="module")
def models(tiny_base: str, tiny_finetuned: str) -> tuple[str, str]:
    return tiny_base, tiny_finetuned


@pytest.fixture(scope="module")
def receipts() -> list[dict[str, Any]]:
    """What came back to the driver while `one_actor` ran."""
    return []


@pytest.fixture(scope="module")
def one_actor(
    ray_session: None,
    models: tuple[str, str],
    tiny_corpus: str,
    receipts: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished extraction by one actor."""
    run = tmp_path_factory.mktemp("one") / "run"
    job = Job(make_spec(run, models, tiny_corpus), quiet=True)
    real = cluster.extract.extract

    def spy(work: Any, todo: list[int], on_receipt: Any, say: Any) -> None:
        real(work, todo, lambda receipt: (receipts.append(receipt), on_receipt(receipt)), say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.extract, "extract", spy)
        extract(job)
    return run


def test_two_actors_write_the_bytes_of_one(
    one_actor: Path, models: tuple[str, str], tiny_corpus: str, tmp_path: Path
) -> None:
    run_job(make_spec(tmp_path / "run", models, tiny_corpus, extract={"workers_min": 2, "workers_max": 2}))
    assert store_bytes(tmp_path / "run") == store_bytes(one_actor)


@pytest.mark.usefixtures("ray_session")
def test_a_pool_grows_beyond_its_least_while_partitions_wait(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data takes another actor only when those that are there are given more than they run (GROW_AT)."""
    seen: set[str] = set()
    real = cluster.extract.extract

    def watched(job: Any, todo: list[int], on_receipt: Any, say: Any) -> None:
        def look(receipt: dict[str, Any]) -> None:
            found = ray._private.state.actors().items()
            writers = {name for name, actor in found if "WritePartition" in actor["ActorClassName"]}
            seen.update(
                name for name, actor in found if name in writers - before and actor["State"] == "ALIVE"
            )
            on_receipt(receipt)

        before = set(ray._private.state.actors())
        real(job, todo, look, say)

    monkeypatch.setattr(cluster.extract, "extract", watched)
    corpus = tiny.save_corpus(tmp_path / "long.jsonl", 64 * 150)
    result = run_job(
        make_spec(tmp_path / "run", models, corpus, extract={"workers_min": 1, "workers_max": 3})
    )
    assert result["documents"] == 64 * 150
    assert len(seen) > 1


def test_a_serial_run_without_ray_writes_the_same_bytes(
    one_actor: Path, models: tuple[str, str], tiny_corpus: str, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, models, tiny_corpus)
    engine = make_engine(spec)
    run = RunDir(str(tmp_path / "serial"))
    plan = make_plan(spec.corpus, run)
    theirs = GradientStore.open(RunDir(str(one_actor)))
    attributes = {k: v for k, v in theirs.attributes.items() if k not in ("partition_rows", "complete")}
    shape = StoreShape(2, plan.n_rows, engine.target.dim, plan.partition_rows)
    store = GradientStore.create(run, shape, engine.target.project(engine.endpoints)[0], attributes)
    for p in range(plan.n_partitions):
        documents = read_partition(plan, p, spec.corpus)
        store.write(p, engine.run(engine.encoder.encode(documents.text)), attributes["fingerprint"], {})
    assert store_bytes(tmp_path / "serial") == store_bytes(one_actor)


def test_a_finished_extraction_is_skipped(
    one_actor: Path, models: tuple[str, str], tiny_corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in one_actor.rglob("*") if path.name != "log.jsonl"}
    result = extract(Job(make_spec(one_actor, models, tiny_corpus)))
    assert "extract: complete already, skipped" in capsys.readouterr().err
    assert result["documents"] == 200
    assert {
        path: path.stat().st_mtime_ns for path in one_actor.rglob("*") if path.name != "log.jsonl"
    } == before


def test_an_interrupted_extraction_goes_on_to_the_same_bytes(
    one_actor: Path,
    models: tuple[str, str],
    tiny_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(one_actor, tmp_path / "run"))
    (run / "stages/extract.json").unlink()
    records = sorted((run / DONE).glob("*.json"))
    for record in records[::2]:
        record.unlink()
    (run / STORE / "features/c/0/0/0").unlink()  # its record is gone
    (run / STORE / "features/c/1/3/0").unlink()  # its record is there
    todo: list[int] = []
    real = cluster.extract.extract
    monkeypatch.setattr(
        cluster.extract, "extract", lambda job, t, *more: (todo.extend(t), real(job, t, *more))
    )
    result = run_job(make_spec(run, models, tiny_corpus))
    assert todo == [0, 2, 3, 4, 6, 8]
    assert result["documents"] == 200
    assert store_bytes(run) == store_bytes(one_actor)


def test_another_spec_is_refused_by_the_name_of_the_field(
    one_actor: Path, models: tuple[str, str], tiny_corpus: str
) -> None:
    before = store_bytes(one_actor)
    with pytest.raises(UserError, match=r"gradients\.dim = 32, and this run has 64"):
        run_job(make_spec(one_actor, models, tiny_corpus, gradients={"dim": 64}))
    with pytest.raises(UserError, match=r"models\.(base|finetuned) = "):
        run_job(make_spec(one_actor, models[::-1], tiny_corpus))
    with pytest.raises(UserError, match=r"corpus\.partition_rows = 24"):
        run_job(make_spec(one_actor, models, tiny_corpus, corpus={"partition_rows": 25}))
    assert store_bytes(one_actor) == before


def odd_corpus(path: Path, bad: int, good: int = 60) -> str:
    """Good documents around bad ones of every kind, and one of a million and a half characters."""
    texts: list[Any] = [text for text, _ in tiny.sentences(good)]
    kinds: list[Any] = ["", None, "   ", 17, {"a": 1}]
    for i in range(bad):
        texts.insert(3 + 5 * i, kinds[i % len(kinds)])
    texts.append("goal striker " * 120_000)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_bad_documents_keep_their_row_and_harm_nobody(models: tuple[str, str], tmp_path: Path) -> None:
    run, corpus = tmp_path / "run", odd_corpus(tmp_path / "odd.jsonl", 5)
    with pytest.raises(UserError, match=r"allowed share of 5% \(corpus\.max_quarantined\)") as caught:
        run_job(make_spec(run, models, corpus))
    assert "\n" not in str(caught.value)
    assert pq.read_table(run / QUARANTINE).num_rows == 5
    spec = make_spec(run, models, corpus, corpus={"max_quarantined": 0.2})  # the same run goes on
    result = run_job(spec)
    assert (result["documents"], result["quarantined"], result["truncated"]) == (66, 5, 1)
    store = GradientStore.open(RunDir(str(run)))
    bad = [3, 8, 13, 18, 23]
    state = store.column("state")
    assert np.flatnonzero(state == QUARANTINED).tolist() == bad
    assert (np.delete(state, bad) == VALID).all()
    table = pq.read_table(run / QUARANTINE).to_pydict()
    assert table["row"] == bad
    assert all(table["doc_id"])
    assert all(table["reason"])
    assert sum(result["quarantine_reasons"].values()) == 5
    # The good documents' gradients are those of the good documents alone.
    engine = make_engine(spec)
    texts = [text for text, _ in tiny.sentences(60)] + ["goal striker " * 120_000]
    alone = engine.run(engine.encoder.encode(texts))
    good = store.take(np.setdiff1d(np.arange(66), bad))
    for j in range(2):
        expected = alone.features[j].astype(np.float64) * alone.scale[j].astype(np.float64)[:, None]
        np.testing.assert_allclose(good.exact(j), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_a_model_without_finite_gradients_stops_the_run_with_one_sentence(
    models: tuple[str, str], tmp_path: Path
) -> None:
    """Its weights are finite and its logits are not: every document is quarantined, and more than 5% are too many."""
    broken = Path(shutil.copytree(models[1], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    run, corpus = tmp_path / "run", tiny.save_corpus(tmp_path / "c.jsonl", 40)
    with pytest.raises(UserError, match=r"allowed share of 5%.* non-finite gradient") as caught:
        run_job(make_spec(run, (models[0], str(broken)), corpus))
    assert "\n" not in str(caught.value)
    assert set(pq.read_table(run / QUARANTINE)["reason"].to_pylist()) == {"non-finite gradient"}


def test_a_mistake_that_only_a_worker_meets_is_one_sentence(models: tuple[str, str], tmp_path: Path) -> None:
    texts = [text for text, _ in tiny.sentences(60)]
    corpus = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": texts}), corpus)
    spec = make_spec(tmp_path / "run", models, str(corpus))
    job = Job(spec, quiet=True)
    ready = prepare(job)
    corpus.unlink()
    with pytest.raises(UserError, match=r"c\.parquet") as caught:
        extract(job, ready)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / DONE).glob("*"))


def test_only_receipts_come_back_to_the_driver(one_actor: Path, receipts: list[dict[str, Any]]) -> None:
    assert sorted(receipt["partition"] for receipt in receipts) == list(range(9))
    assert sum(receipt["rows"] for receipt in receipts) == 200
    assert max(len(json.dumps(receipt)) for receipt in receipts) < 300


def test_a_failed_selection_is_not_held_against_the_run(
    models: tuple[str, str], tmp_path: Path, one_actor: Path, tiny_corpus: str
) -> None:
    run = Path(shutil.copytree(one_actor, tmp_path / "run"))
    with pytest.raises(UserError, match=r"select\.size is 201"):
        select(Job(make_spec(run, models, tiny_corpus, select={"size": 201}), quiet=True))
    select(Job(make_spec(run, models, tiny_corpus, select={"size": 7}), quiet=True))
    assert pq.read_table(run / "selection.parquet").num_rows == 7


def test_a_model_that_gives_no_finite_gradients_stops_the_run_with_a_sentence(
    models: tuple[str, str], tiny_corpus: str, tmp_path: Path
) -> None:
    """More than the allowed share: the run stops, and quarantine.parquet says why of each."""
    broken = Path(shutil.copytree(models[1], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"allowed share of 5% .*: non-finite gradient; all are in") as caught:
        run_job(make_spec(tmp_path / "run", (models[0], str(broken)), tiny_corpus))
    assert "\n" not in str(caught.value)
    assert set(pq.read_table(tmp_path / "run" / QUARANTINE)["reason"].to_pylist()) == {"non-finite gradient"}
