"""A user's mistake about the corpus is one sentence that names file or field, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.corpus import make_plan, read_labelled, read_partition
from engine.errors import UserError
from engine.rundir import RunDir
from engine.spec import Corpus


def sentence(folder: Path, **fields: object) -> str:
    """The one sentence that planning fails with; the run directory must stay empty."""
    run = RunDir(str(folder / "run"))
    with pytest.raises(UserError) as caught:
        make_plan(Corpus(**fields), run)  # type: ignore[arg-type]
    assert list(run.walk()) == []
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_no_file_matches(tmp_path: Path) -> None:
    for entry in ["none.jsonl", "*.jsonl", "nowhere/"]:
        assert f"no file matches {tmp_path}/{entry}: mend corpus.paths." in sentence(
            tmp_path, paths=[f"{tmp_path}/{entry}"]
        )
    assert "cannot read nosuch://x" in sentence(tmp_path, paths=["nosuch://x"])
    with pytest.raises(UserError, match=r"no file matches .*: mend evaluate\.test"):
        read_labelled([f"{tmp_path}/none.csv"], "text", None)


def test_unknown_extensions(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.json"
    path.parent.mkdir()
    path.write_text('{"text": "x"}\n')
    assert "a.json has an unknown extension" in sentence(tmp_path, paths=[str(path)])
    assert "holds no file of a known format" in sentence(tmp_path, paths=[str(path.parent)])
    corpus = Corpus(paths=[str(path.parent)], format="jsonl")
    assert make_plan(corpus, RunDir(str(tmp_path / "run"))).n_rows == 1


def test_missing_columns_name_those_there_are(tmp_path: Path) -> None:
    table = pa.table({"body": ["x"], "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("body,n\nx,1\n")
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n' * 3)
    (tmp_path / "a.txt").write_text("x\n")
    for name in ["a.parquet", "a.csv", "a.jsonl"]:
        said = sentence(tmp_path, paths=[f"{tmp_path}/{name}"])
        assert said.startswith(
            f"{tmp_path}/{name} has no column 'text'; its columns are: body, n; corpus.text "
        )
        said = sentence(tmp_path, paths=[f"{tmp_path}/{name}"], text="body", id="key")
        assert said.startswith(
            f"{tmp_path}/{name} has no column 'key'; its columns are: body, n; fields of corpus "
        )
        said = sentence(tmp_path, paths=[f"{tmp_path}/{name}"], prompt="body", response="reply")
        assert "no column 'reply'" in said
    assert "has no column 'key'" in sentence(tmp_path, paths=[f"{tmp_path}/a.txt"], id="key")


def test_a_long_jsonl_without_the_column_is_not_read_to_its_end(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"body": "x"}\n' * 200_000)
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole + b"junk that is never reached")
    assert "no column 'text'" in sentence(tmp_path, paths=[f"{tmp_path}/a.jsonl.gz"])


def test_columns_of_another_type_or_there_twice(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "title": ["x"]}), tmp_path / "a.parquet")
    said = sentence(tmp_path, paths=[f"{tmp_path}/a.parquet"])
    assert said.endswith("a.parquet is of type int64, not string; its string columns are: title.")
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "b.parquet")
    (tmp_path / "b.csv").write_text("text,text\nx,y\n")
    for name in ["b.parquet", "b.csv"]:
        assert f"{name} has 2 columns called 'text'" in sentence(tmp_path, paths=[f"{tmp_path}/{name}"])


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"] * 100}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for data in [
        b"PAR1",
        b"hello",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:-8] + b"\xff\xff\xff\xffPAR1",
    ]:
        (tmp_path / "a.parquet").write_bytes(data)
        assert "a.parquet is not a readable Parquet file (" in sentence(
            tmp_path, paths=[f"{tmp_path}/a.parquet"]
        )


def test_compressed_files_that_break_off_name_the_line(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": os.urandom(20).hex()}).encode() + b"\n" for _ in range(100_000))
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    for name, packed in {
        "a.jsonl.gz": gzip.compress(data),
        "a.jsonl.zst": sink.getvalue().to_pybytes(),
    }.items():
        (tmp_path / name).write_bytes(packed[: len(packed) * 2 // 3])
        said = sentence(tmp_path, paths=[f"{tmp_path}/{name}"])
        assert f"{name} breaks off after line " in said
        assert 10_000 < int(said.split("after line ")[1].split()[0]) < 70_000
        (tmp_path / name).write_bytes(b"not compressed at all")
        assert f"{name} cannot be read (" in sentence(tmp_path, paths=[f"{tmp_path}/{name}"])


def test_no_documents(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"")
    (tmp_path / "in" / "b.txt").write_bytes(b"\n\n")
    (tmp_path / "in" / "c.csv").write_bytes(b"text\n")
    (tmp_path / "in" / "d.parquet").write_bytes(b"")
    (tmp_path / "in" / "e.txt.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in" / "f.parquet")
    assert "there are no documents in corpus.paths = " in sentence(tmp_path, paths=[f"{tmp_path}/in"])
    with pytest.raises(UserError, match=r"no documents in evaluate\.test"):
        read_labelled([f"{tmp_path}/in"], "text", None)
    (tmp_path / "in" / "g.txt").write_text("one\n")
    corpus = Corpus(paths=[f"{tmp_path}/in"])
    plan = make_plan(corpus, RunDir(str(tmp_path / "run")))
    assert read_partition(plan, 0, corpus).text == ["one"]
    assert make_plan(corpus, RunDir(str(tmp_path / "run"))) == plan


def test_files_without_permission(unprivileged: Path) -> None:
    for name in ["a.jsonl", "a.parquet"]:
        (unprivileged / name).write_text("x")
        (unprivileged / name).chmod(0)
        assert "permission denied" in sentence(unprivileged, paths=[f"{unprivileged}/{name}"]).lower()


def test_without_the_extra_a_hub_data_set_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python itself records for "not importable"
    assert "pip install 'unbake[datasets]'" in sentence(tmp_path, hub="someone/something")


def test_hub_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"text": ["one", None, "three"], "n": [1, 2, 3], "more": [[1], [2], [3]]}
    )
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(str(tmp_path / "split"))

    corpus = Corpus(hub=str(tmp_path / "plain"), id="n")
    run = RunDir(str(tmp_path / "out"))
    plan = make_plan(corpus, run)
    got = read_partition(plan, 0, corpus)
    assert (got.text, got.ids, got.problems) == (["one", "", "three"], ["1", "2", "3"], {1: "text is null"})
    for parent, _, names in os.walk(tmp_path / "plain"):
        for name in names:
            os.utime(os.path.join(parent, name), (1, 1))
    assert make_plan(corpus, run) == plan

    corpus = Corpus(hub=str(tmp_path / "split"), hub_split="test")
    plan = make_plan(corpus, RunDir(str(tmp_path / "out2")))
    assert read_partition(plan, 0, corpus).text == ["three"]

    said = sentence(tmp_path, hub=str(tmp_path / "split"), hub_split="dev")
    assert said.endswith("has no split 'dev': set corpus.hub_split to one of test, train.")
    assert "has no column 'body'; its columns are: text, n, more; fields of corpus" in sentence(
        tmp_path, hub=str(tmp_path / "plain"), text="body"
    )
    (tmp_path / "files").mkdir()
    assert "give a folder of plain files as corpus.paths" in sentence(tmp_path, hub=str(tmp_path / "files"))


def test_a_changed_hub_folder_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = str(tmp_path / "data")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(folder)
    corpus, run = Corpus(hub=folder), RunDir(str(tmp_path / "out"))
    make_plan(corpus, run)
    datasets.Dataset.from_dict({"text": ["two"]}).save_to_disk(folder)
    with pytest.raises(UserError, match="data changed since the plan was made"):
        make_plan(corpus, run)
