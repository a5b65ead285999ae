"""Corpora of chats: one canonical text from every format, wrong shapes quarantined where they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.chat import chat_text
from engine.corpus import Documents, make_plan, read_labelled, read_partition
from engine.errors import UserError
from engine.rundir import RunDir
from engine.spec import Corpus, RunSpec

CHATS = [
    [{"role": "user", "content": f"who won match {i}"}, {"role": "assistant", "content": f"team {i}, 2:1"}]
    for i in range(5)
]


def corpus(path: Path, **fields: object) -> Corpus:
    return Corpus(paths=[str(path)], messages="messages", partition_rows=4, **fields)  # type: ignore[arg-type]


def read(path: Path, run: Path, **fields: object) -> list[Documents]:
    settings = corpus(path, **fields)
    plan = make_plan(settings, RunDir(str(run)))
    return [read_partition(plan, p, settings) for p in range(plan.n_partitions)]


def write(path: Path, chats: list[object], kind: str) -> Path:
    file = path / f"chats.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"messages": chats}), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    else:
        import csv

        with file.open("w", newline="") as handle:
            csv.writer(handle).writerows([["messages"], *[[json.dumps(chat)] for chat in chats]])
    return file


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_every_format_gives_the_same_documents_and_ids(tmp_path: Path, kind: str) -> None:
    parts = read(write(tmp_path, list(CHATS), kind), tmp_path / "run")
    assert [text for part in parts for text in part.text] == [chat_text(chat) for chat in CHATS]
    expected = read(write(tmp_path, list(CHATS), "jsonl"), tmp_path / "other")
    assert [part.ids for part in parts] == [part.ids for part in expected]
    assert all(not part.problems and part.prompts is None for part in parts)


def test_chats_of_a_wrong_shape_are_quarantined_and_move_nobody(tmp_path: Path) -> None:
    bad = [None, "hello", [{"role": "user", "content": "hello"}], [{"from": "gpt", "value": "x"}]]
    (part, last) = read(
        write(tmp_path, [CHATS[0], bad[1], bad[2], bad[3], CHATS[1]], "jsonl"), tmp_path / "a"
    )
    assert part.text == [chat_text(CHATS[0]), "", "", ""]
    assert last.text == [chat_text(CHATS[1])]
    reasons = list(part.problems.values())
    assert "text that is not JSON" in reasons[0]
    assert "no message of the role assistant" in reasons[1]
    assert "message 0 has no role" in reasons[2]
    (part,) = read(write(tmp_path, [CHATS[0], bad[0], bad[2]], "parquet"), tmp_path / "b")
    assert part.problems[1] == "messages is null"
    assert "no message of the role assistant" in part.problems[2]
    assert part.text[0] == chat_text(CHATS[0])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_long_chat_is_cut_and_counted(tmp_path: Path, kind: str) -> None:
    (part, _) = read(write(tmp_path, list(CHATS), kind), tmp_path / "run", max_chars=20)
    assert part.truncated == 4
    assert json.loads(part.text[0])[1] == {"role": "assistant", "content": "team "}


def test_a_column_that_cannot_hold_chats_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"messages": [1, 2]}), file)
    with pytest.raises(UserError, match=r"column 'messages' .* is of type int64"):
        read(file, tmp_path / "run")


def test_test_files_hold_chats_too_and_must_be_sound(tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        texts, _ = read_labelled([str(write(tmp_path, list(CHATS), kind))], "messages", None, chat=True)
        assert texts == [chat_text(chat) for chat in CHATS]
    file = write(tmp_path, [CHATS[0], [{"role": "user", "content": "x"}]], "jsonl")
    with pytest.raises(UserError, match=r"chats.jsonl line 2: messages: no message of the role assistant"):
        read_labelled([str(file)], "messages", None, chat=True)


def spec(**changes: dict) -> RunSpec:
    fields = {
        "models": {"base": "b", "finetuned": "f"},
        "corpus": {"paths": ["x"], "messages": "messages"},
        "task": {"kind": "language_modelling"},
        "retrain": {"strategies": ["greedy"]},
    }
    return RunSpec.from_dict({name: {**value, **changes.get(name, {})} for name, value in fields.items()})


def test_the_spec_knows_what_goes_with_chats() -> None:
    assert spec().loss_scope == "response"
    assert spec(task={"loss_scope": "all_tokens"}).loss_scope == "all_tokens"
    with pytest.raises(UserError, match=r"either corpus\.messages or corpus\.prompt"):
        spec(corpus={"prompt": "p", "response": "r"})
    with pytest.raises(UserError, match=r"corpus\.messages .* language_modelling"):
        spec(task={"kind": "classification", "labels": ["a", "b"]})
