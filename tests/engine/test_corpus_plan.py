"""The plan: the same documents at the same global rows however a corpus is cut, and safe reuse of a plan."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.corpus import Documents, Plan, load_plan, make_plan, read_partition, read_rows
from engine.errors import UserError
from engine.rundir import CORPUS, PLAN, RunDir
from engine.spec import Corpus

# Any text that UTF-8 can hold; surrogates are tested elsewhere.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=60)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def everything(plan: Plan, corpus: Corpus) -> Documents:
    """All documents, partition by partition."""
    parts = [read_partition(plan, p, corpus) for p in range(plan.n_partitions)]
    problems = {
        p * plan.partition_rows + i: why for p, part in enumerate(parts) for i, why in part.problems.items()
    }
    text = [text for part in parts for text in part.text]
    ids = [name for part in parts for name in part.ids]
    return Documents(text, ids, None, None, problems, sum(part.truncated for part in parts))


@settings(max_examples=60, deadline=None)
@given(
    texts=TEXTS,
    cuts=st.lists(st.integers(0, 60), max_size=4),
    kinds=st.lists(st.sampled_from(["parquet", "jsonl"]), min_size=5, max_size=5),
    group=st.integers(1, 20),
    partition_rows=st.integers(1, 25),
    part_bytes=st.sampled_from([1, 1 << 20]),
    data=st.data(),
)
def test_rows_do_not_depend_on_how_the_corpus_is_cut(
    texts: list[str],
    cuts: list[int],
    kinds: list[str],
    group: int,
    partition_rows: int,
    part_bytes: int,
    data: st.DataObject,
) -> None:
    edges = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
    with tempfile.TemporaryDirectory() as folder:
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            path = Path(folder) / "corpus" / f"{i}.{kinds[i]}"
            path.parent.mkdir(exist_ok=True)
            if kinds[i] == "parquet":
                table = pa.table(
                    {"other": range(stop - start), "text": pa.array(texts[start:stop], pa.string())}
                )
                pq.write_table(table, path, row_group_size=group)
            else:
                write_jsonl(path, texts[start:stop])
        corpus = Corpus(paths=[f"{folder}/corpus"], partition_rows=partition_rows)
        plan = make_plan(corpus, RunDir(f"{folder}/run"), part_bytes=part_bytes)

        assert plan.n_rows == len(texts)
        assert plan.n_partitions == -(-len(texts) // partition_rows)
        got = everything(plan, corpus)
        assert got.text == [text if text.strip() else "" for text in texts]
        assert got.problems == {i: "text is empty" for i, text in enumerate(texts) if not text.strip()}
        assert got.ids == [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        for p in range(plan.n_partitions):
            assert sum(piece.stop - piece.start for piece in plan.pieces(p)) == len(plan.partition_range(p))

        rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30))
        some = read_rows(plan, np.array(rows, np.int64), corpus)
        assert some.text == [got.text[row] for row in rows]
        assert some.ids == [got.ids[row] for row in rows]
        assert some.problems == {i: got.problems[row] for i, row in enumerate(rows) if row in got.problems}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [f"a {i}" for i in range(50)])
    table = pa.table({"text": [f"b {i}" for i in range(70)]})
    pq.write_table(table, tmp_path / "corpus" / "b.parquet", row_group_size=8)
    return Corpus(paths=[str(tmp_path / "corpus")], partition_rows=16)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


def tree(run: RunDir) -> dict[str, bytes]:
    return {name: run.read_bytes(name) for name in run.walk()}


def test_the_same_corpus_gives_the_same_bytes(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    plan = make_plan(corpus, run)
    other = RunDir(str(tmp_path / "other"))
    again = make_plan(corpus, other)
    assert tree(run) == tree(other)
    assert again.fingerprint == plan.fingerprint


def test_plan_parquet_has_a_row_for_every_piece(corpus: Corpus, run: RunDir) -> None:
    plan = make_plan(corpus, run)
    rows = run.read_table(PLAN).to_pylist()
    assert [row["first_row"] for row in rows] == np.cumsum([0] + [row["rows"] for row in rows])[:-1].tolist()
    pieces = [(p, piece.start, piece.stop) for p in range(plan.n_partitions) for piece in plan.pieces(p)]
    assert pieces == [(row["partition"], row["start"], row["stop"]) for row in rows]
    assert len(rows) == 9  # 8 partitions, one of them over both files


def test_a_plan_travels_to_other_processes(corpus: Corpus, run: RunDir) -> None:
    plan = make_plan(corpus, run)
    sent_plan, sent_corpus = pickle.loads(pickle.dumps((plan, corpus)))  # noqa: S301 - our own bytes
    assert read_partition(sent_plan, 3, sent_corpus) == read_partition(plan, 3, corpus)
    assert load_plan(run) == plan


def test_a_rerun_converts_nothing_again(corpus: Corpus, run: RunDir) -> None:
    calls: list[int] = []
    plan = make_plan(corpus, run, calls.append)
    assert calls
    assert calls[-1] == 50
    before = {name: os.stat(run.path(name)).st_mtime_ns for name in run.walk()}
    assert make_plan(corpus, run, calls.append) == plan
    assert {name: os.stat(run.path(name)).st_mtime_ns for name in run.walk()} == before


def test_a_touched_corpus_is_the_same_corpus(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    plan = make_plan(corpus, run)
    for path in (tmp_path / "corpus").iterdir():
        os.utime(path, (1, 1))
    assert make_plan(corpus, run) == plan


def test_a_moved_corpus_keeps_its_fingerprint_and_is_read_where_it_is(
    corpus: Corpus, run: RunDir, tmp_path: Path
) -> None:
    plan = make_plan(corpus, run)
    before = everything(plan, corpus)
    shutil.copytree(tmp_path / "corpus", tmp_path / "elsewhere" / "else")
    shutil.rmtree(tmp_path / "corpus")
    moved = corpus.model_copy(update={"paths": [str(tmp_path / "elsewhere" / "else")]})
    again = make_plan(moved, run)
    assert again.fingerprint == plan.fingerprint
    assert everything(again, moved) == before
    assert make_plan(moved, RunDir(str(tmp_path / "new"))).fingerprint == plan.fingerprint


def test_a_moved_run_directory_is_read_where_it_is(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    before = everything(make_plan(corpus, run), corpus)
    os.rename(tmp_path / "run", tmp_path / "renamed")
    moved = RunDir(str(tmp_path / "renamed"))
    assert everything(load_plan(moved), corpus) == before
    assert make_plan(corpus, moved) == load_plan(moved)


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_a_changed_file_is_named(corpus: Corpus, run: RunDir, tmp_path: Path, name: str) -> None:
    make_plan(corpus, run)
    path = tmp_path / "corpus" / name
    if name == "a.jsonl":  # the same size, other content
        path.write_text(path.read_text().replace("a 1", "A 1"))
    else:
        pq.write_table(pa.table({"text": [f"c {i}" for i in range(70)]}), path, row_group_size=8)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=rf"corpus/{name} changed since the plan was made"):
        make_plan(corpus, run)


def test_files_that_come_and_go_are_named(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    make_plan(corpus, run)
    write_jsonl(tmp_path / "corpus" / "new.jsonl", ["x"])
    with pytest.raises(UserError, match=r"new\.jsonl came, went"):
        make_plan(corpus, run)
    os.unlink(tmp_path / "corpus" / "new.jsonl")
    os.unlink(tmp_path / "corpus" / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl came, went"):
        make_plan(corpus, run)


@given(st.integers(1, 10**9))
def test_by_default_a_corpus_makes_partitions_enough_for_many_workers(documents: int) -> None:
    rows = Corpus(paths=["c"]).partition_rows_of(documents)
    assert rows % 256 == 0
    assert 256 <= rows <= 4096
    assert rows == 256 or documents / rows >= 32
    assert rows == 4096 or documents / rows < 64
    assert Corpus(paths=["c"], partition_rows=7).partition_rows_of(documents) == 7


def test_the_plan_has_the_default_partitions(run: RunDir, tmp_path: Path) -> None:
    corpus = Corpus(paths=[str(tmp_path / "c.jsonl")])
    write_jsonl(tmp_path / "c.jsonl", [f"text {i}" for i in range(600)])
    plan = make_plan(corpus, run)
    assert (plan.partition_rows, plan.n_partitions) == (256, 3)
    assert everything(plan, corpus).text == [f"text {i}" for i in range(600)]
    assert make_plan(corpus, run) == plan


def test_a_plan_that_has_partition_rows_among_its_settings_alone_is_read(corpus: Corpus, run: RunDir) -> None:
    """As plans did before there was a default by the size of the corpus."""
    plan = make_plan(corpus, run)
    table = run.read_table(PLAN)
    state = json.loads(table.schema.metadata[b"unbake"])
    assert state.pop("partition_rows") == 16
    run.write_table(PLAN, table.replace_schema_metadata({b"unbake": json.dumps(state).encode()}))
    assert make_plan(corpus, run) == load_plan(run) == plan


@pytest.mark.parametrize(
    "change", [{"partition_rows": 17}, {"max_chars": 9}, {"max_documents": 9}, {"id": "text"}]
)
def test_changed_settings_are_named(corpus: Corpus, run: RunDir, change: dict[str, object]) -> None:
    make_plan(corpus, run)
    with pytest.raises(UserError, match=f"corpus.{next(iter(change))} = "):
        make_plan(corpus.model_copy(update=change), run)


@pytest.mark.parametrize(
    "change", [{"partition_rows": 17}, {"max_chars": 9}, {"max_documents": 9}, {"id": "text"}]
)
def test_the_fingerprint_knows_what_shapes_documents(
    corpus: Corpus, run: RunDir, tmp_path: Path, change: dict[str, object]
) -> None:
    other = make_plan(corpus.model_copy(update=change), RunDir(str(tmp_path / "other")))
    assert other.fingerprint != make_plan(corpus, run).fingerprint


KILLED = """
import os, signal, sys
from engine.corpus import make_plan
from engine.rundir import RunDir
from engine.spec import Corpus

def die(converted):
    if converted > 2000:
        os.kill(os.getpid(), signal.SIGKILL)

make_plan(Corpus(paths=[sys.argv[1]], partition_rows=16), RunDir(sys.argv[2]), die, part_bytes=1)
"""


def test_a_killed_conversion_starts_over(run: RunDir, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(3000)])
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    dead = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), run.uri], env=env)
    assert dead.returncode == -signal.SIGKILL
    assert run.names(CORPUS) == ["part-00000.parquet"]
    assert not run.exists(PLAN)
    corpus = Corpus(paths=[str(tmp_path / "a.jsonl")], partition_rows=16)
    undisturbed = RunDir(str(tmp_path / "undisturbed"))
    make_plan(corpus, undisturbed)
    make_plan(corpus, run)
    assert tree(run) == tree(undisturbed)


def test_a_failing_conversion_leaves_nothing(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "z.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"z\.parquet"):
        make_plan(corpus, run, part_bytes=1)
    assert list(run.walk()) == []


def test_a_lost_converted_file_is_made_anew(corpus: Corpus, run: RunDir) -> None:
    plan = make_plan(corpus, run)
    before = tree(run)
    run.remove(CORPUS)
    assert make_plan(corpus, run) == plan
    assert tree(run) == before


def test_max_documents_reads_the_first_and_no_more(corpus: Corpus, run: RunDir, tmp_path: Path) -> None:
    limited = corpus.model_copy(update={"max_documents": 55})
    plan = make_plan(limited, run)
    assert everything(plan, limited).text == [f"a {i}" for i in range(50)] + [f"b {i}" for i in range(5)]
    (tmp_path / "corpus" / "z.parquet").write_bytes(b"beyond the limit, so never opened")
    assert make_plan(limited, run) == plan


def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(run: RunDir, tmp_path: Path) -> None:
    for name in ["b.jsonl", "a/z.jsonl", "a/b/c.jsonl", ".hidden.jsonl", "_tmp/x.jsonl", "C.jsonl"]:
        write_jsonl(tmp_path / "in" / name, [name])
    (tmp_path / "in" / "README.md").write_text("no documents here")
    corpus = Corpus(paths=[str(tmp_path / "in" / "b.jsonl"), str(tmp_path / "in")])
    assert everything(make_plan(corpus, run), corpus).text == [
        "b.jsonl",
        "C.jsonl",
        "a/b/c.jsonl",
        "a/z.jsonl",
    ]


def test_links_are_followed_once_and_pipes_left_alone(run: RunDir, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "far" / "b.jsonl", ["b"])
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "far")
    os.mkfifo(tmp_path / "in" / "pipe.jsonl")
    corpus = Corpus(paths=[str(tmp_path / "in")])
    assert everything(make_plan(corpus, run), corpus).text == ["a", "b"]


def test_globs_find_files_and_folders(run: RunDir, tmp_path: Path) -> None:
    for name in ["x1/a.jsonl", "x2/deep/b.jsonl", "y/c.jsonl", "x[3]/d.jsonl"]:
        write_jsonl(tmp_path / name, [name])
    corpus = Corpus(paths=[f"{tmp_path}/x?", f"{tmp_path}/x[3]/d.jsonl", f"{tmp_path}/**/c.jsonl"])
    text = everything(make_plan(corpus, run), corpus).text
    assert text == ["x1/a.jsonl", "x2/deep/b.jsonl", "x[3]/d.jsonl", "y/c.jsonl"]


def test_corpus_and_run_directory_on_a_uri() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/seed/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    with fs.open("/seed/b.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["three"]}), file)
    corpus = Corpus(paths=["memory://seed"], partition_rows=2)
    run = RunDir("memory://run")
    try:
        plan = make_plan(corpus, run)
        assert everything(plan, corpus).text == ["one", "two", "three"]
        assert make_plan(corpus, run) == plan
        assert plan.pieces(1)[0].file == "memory:///seed/b.parquet"
    finally:
        fs.rm("/seed", recursive=True)
        fs.rm("/run", recursive=True)


def test_a_file_changed_after_planning_is_named_by_the_reader(
    corpus: Corpus, run: RunDir, tmp_path: Path
) -> None:
    plan = make_plan(corpus, run)
    path = tmp_path / "corpus" / "b.parquet"
    pq.write_table(pa.table({"text": ["short"]}), path)
    with pytest.raises(UserError, match=r"b\.parquet is shorter than when the plan was made"):
        read_partition(plan, plan.n_partitions - 1, corpus)
    path.unlink()
    with pytest.raises(UserError, match=r"b\.parquet is gone"):
        read_partition(plan, plan.n_partitions - 1, corpus)
    path.write_bytes(b"not parquet any more")
    with pytest.raises(UserError, match=r"b\.parquet changed"):
        read_partition(plan, plan.n_partitions - 1, corpus)


def test_a_run_without_a_plan_says_so(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"has no plan\.parquet"):
        load_plan(run)
    run.write_bytes(PLAN, b"rotten")
    with pytest.raises(UserError, match=r"plan\.parquet is damaged"):
        load_plan(run)
