"""The formats: each gives the same documents, and a hostile line is quarantined where it stands."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.corpus import Documents, make_plan, read_labelled, read_partition
from engine.corpus.formats import FIELD_CHARS
from engine.errors import UserError
from engine.rundir import RunDir
from engine.spec import Corpus


def load(path: Path | str, run: Path, **fields: object) -> Documents:
    """All documents of a small corpus, in one partition."""
    corpus = Corpus(paths=[str(path)], **fields)  # type: ignore[arg-type]
    return read_partition(make_plan(corpus, RunDir(str(run))), 0, corpus)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


ROWS = [{"id": f"n{i % 7}", "q": f"ask, {i}", "text": f'é "{i}", \x00\x07 ok'} for i in range(40)]
JSONL = "".join(json.dumps(row) + "\r\n\n" for row in ROWS).encode()


@pytest.mark.parametrize("mapping", [{}, {"id": "id"}, {"id": "id", "prompt": "q", "response": "text"}])
def test_every_format_gives_the_same_documents(tmp_path: Path, mapping: dict[str, str]) -> None:
    files = {
        "a.jsonl": JSONL,
        "a.ndjson": b"\xef\xbb\xbf" + JSONL,
        "a.jsonl.gz": gzip.compress(JSONL[:999]) + gzip.compress(JSONL[999:]),
        "a.jsonl.zst": zstd(JSONL),
        "a.csv": as_csv(ROWS),
        "a.csv.gz": gzip.compress(as_csv(ROWS)),
        "b.csv.zst": zstd(b"\xef\xbb\xbf" + as_csv(ROWS)),
    }
    if not mapping:
        lines = "".join(row["text"] + "\n" for row in ROWS).encode()
        files |= {"a.txt": lines, "a.txt.gz": gzip.compress(lines), "a.txt.zst": zstd(lines)}
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    expected = load(tmp_path / "a.parquet", tmp_path / "run", **mapping)
    assert len(expected) == 40
    assert not expected.problems
    assert expected.text[3] == ("ask, 3" if "prompt" in mapping else "") + 'é "3", \x00\x07 ok'
    if mapping:
        assert expected.ids == [row["id"] for row in ROWS]
    for i, (name, data) in enumerate(files.items()):
        (tmp_path / name).write_bytes(data)
        assert load(tmp_path / name, tmp_path / f"run{i}", **mapping) == expected, name


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_parquet_knows_every_type_of_string(tmp_path: Path, kind: str) -> None:
    column = pa.array(["a", None, "b", "a"])
    types = {
        "large_string": pa.large_string(),
        "string_view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    pq.write_table(pa.table({"text": column.cast(types[kind])}), tmp_path / "a.parquet")
    got = load(tmp_path / "a.parquet", tmp_path / "run")
    assert got.text == ["a", "", "b", "a"]
    assert got.problems == {1: "text is null"}


def test_shards_laid_out_as_finewebs_are_read(tmp_path: Path) -> None:
    """Nested folders a crawl, numbered shards, nine columns, several row groups; ids by `corpus.id`."""
    crawls = ("CC-MAIN-2024-10", "CC-MAIN-2024-18")
    for at, (crawl, shard) in enumerate((crawl, shard) for crawl in crawls for shard in (0, 1)):
        folder = tmp_path / "fineweb" / "data" / crawl
        folder.mkdir(parents=True, exist_ok=True)
        rows = range(5 * at, 5 * at + 5)
        table = {
            "text": [f"page {i}" for i in rows],
            "id": [f"<urn:uuid:{i:08d}>" for i in rows],
            "dump": [crawl] * 5,
            "url": [f"https://example.com/{i}" for i in rows],
            "date": ["2024-03-01T00:00:00Z"] * 5,
            "file_path": [f"s3://commoncrawl/crawl-data/{crawl}/segments/{i}.warc.gz" for i in rows],
            "language": ["en"] * 5,
            "language_score": [0.9] * 5,
            "token_count": pa.array([2] * 5, pa.int64()),
        }
        pq.write_table(pa.table(table), folder / f"{shard:03d}_00000.parquet", row_group_size=2)
    for number, path in enumerate(("fineweb", "fineweb/data/*", "fineweb/data/*/*.parquet")):
        documents = load(tmp_path / path, tmp_path / f"run-{number}", id="id")
        assert documents.text == [f"page {i}" for i in range(20)]
        assert documents.ids == [f"<urn:uuid:{i:08d}>" for i in range(20)]


def test_ids_of_any_type_are_labels(tmp_path: Path) -> None:
    values = [1, "x", None, [1, 2], True, "\ud800", "x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", "n": v}) + "\n" for v in values))
    got = load(tmp_path / "a.jsonl", tmp_path / "run", id="n")
    hashed = "e3b98a4da31a127d"  # printf t | sha256sum
    assert got.ids == ["1", "x", hashed, "[1, 2]", "true", "\\ud800", "x"]
    days = pa.array([18262, None], pa.date32())
    pq.write_table(pa.table({"text": ["t", "t"], "n": [7, None], "day": days}), tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet", tmp_path / "run2", id="n").ids == ["7", hashed]
    assert load(tmp_path / "b.parquet", tmp_path / "run3", id="day").ids == ["2020-01-01", hashed]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_long_documents_are_cut_and_counted(tmp_path: Path, kind: str) -> None:
    rows = [{"q": "pp", "text": text} for text in ["é" * 10, "é" * 8, "é" * 9, "x"]]
    rows.append({"q": "p" * 10, "text": "never reached"})
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = load(tmp_path / f"a.{kind}", tmp_path / "run", max_chars=9)
    assert plain.text == ["é" * 9, "é" * 8, "é" * 9, "x", "never rea"]
    assert plain.truncated == 2
    mapped = load(tmp_path / f"a.{kind}", tmp_path / "run2", max_chars=10, prompt="q", response="text")
    assert mapped.prompts == ["pp", "pp", "pp", "pp", ""]
    assert mapped.responses == ["é" * 8, "é" * 8, "é" * 8, "x", ""]
    assert mapped.text[0] == "pp" + "é" * 8
    assert mapped.truncated == 2
    assert mapped.problems == {4: "q alone is as long as max_chars (10)"}


def test_an_empty_prompt_is_a_document_and_an_empty_response_is_none(tmp_path: Path) -> None:
    rows = [{"q": "", "a": "yes"}, {"q": "why", "a": " "}, {"q": None, "a": "yes"}, {"q": "why"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = load(tmp_path / "a.jsonl", tmp_path / "run", prompt="q", response="a")
    assert got.text == ["yes", "", "", ""]
    assert got.problems == {1: "a is empty", 2: "q is null", 3: "a.jsonl line 4: no 'a'"}


HOSTILE_LINES: dict[bytes, str] = {
    b'{"text": ""}': "text is empty",
    b'{"text": " \\t\\u3000 "}': "text is empty",
    b'{"text": null}': "text is null",
    b'{"text": 5}': "text is of type int, not a string",
    b'{"text": {"text": "deep"}}': "text is of type dict, not a string",
    b'{"text": ["a"]}': "text is of type list, not a string",
    b'{"text": "\\ud800"}': "text cannot be encoded as UTF-8 (character 0)",
    b'{"body": "x"}': "no 'text'",
    b'["text"]': "the line is a JSON list, not an object",
    b'"text"': "the line is a JSON str, not an object",
    b"null": "the line is a JSON NoneType, not an object",
    b'{"text": "cut of': "the line is not JSON (Unterminated string starting at)",
    b"\x00\x01": "the line is not JSON (Expecting value)",
    b'{"text": "\xe9t\xe9"}': "the line is not UTF-8 (byte 10)",
    "\ufefffoo".encode("utf-16"): "the line is not UTF-8 (byte 0)",
    b"[" * 200_000: "the line is JSON nested too deeply",
    b'{"text": ' + b"9" * 5000 + b"}": "the line is not JSON (a number too long)",
    b'{"text": "raw \x01"}': "the line is not JSON (Invalid control character at)",
}


def test_hostile_jsonl_lines_are_quarantined_each_with_its_reason(tmp_path: Path) -> None:
    lines, expected = [], {}
    for i, (line, problem) in enumerate(HOSTILE_LINES.items()):
        lines += [json.dumps({"text": f"good {i}"}).encode(), line]
        by_reader = problem in ("text is empty", "text is null")
        expected[2 * i + 1] = problem if by_reader else f"a.jsonl line {2 * i + 2}: {problem}"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    got = load(tmp_path / "a.jsonl", tmp_path / "run")
    assert got.problems == expected
    assert got.text[::2] == [f"good {i}" for i in range(len(HOSTILE_LINES))]
    assert set(got.text[1::2]) == {""}


def test_text_lines_of_other_encodings_are_quarantined_and_blank_ones_are_no_documents(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n  \ncaf\xe9\r\ntwo\x00\x0b\x1b[0m\r\nthree\rfour")
    got = load(tmp_path / "a.txt", tmp_path / "run")
    assert got.text == ["one", "", "two\x00\x0b\x1b[0m", "three\rfour"]
    assert got.problems == {1: "a.txt line 4: the line is not UTF-8 (byte 3)"}


def test_strings_in_parquet_that_are_not_utf8_are_quarantined(tmp_path: Path) -> None:
    values = [b"good", b"\xff\xfe", b"\xed\xa0\x80", None, b"\x00"]
    # A string column over arbitrary bytes, as careless writers leave it.
    binary = pa.array(values, pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(values), binary.buffers())
    pq.write_table(pa.table({"text": column, "id": column}), tmp_path / "a.parquet")
    got = load(tmp_path / "a.parquet", tmp_path / "run", id="id")
    assert got.text == ["good", "", "", "", "\x00"]
    assert got.problems == {1: "text is not UTF-8", 2: "text is not UTF-8", 3: "text is null"}
    assert got.ids[:3] == ["good", "\\xff\\xfe", "\\xed\\xa0\\x80"]


def test_a_damaged_parquet_page_costs_its_row_group_and_no_other(tmp_path: Path) -> None:
    texts = [f"document {i} {i * i}" for i in range(60)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=20, use_dictionary=False, write_page_checksum=True
    )
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    got = load(path, tmp_path / "run")
    assert sorted(got.problems) == list(range(20, 40))
    assert all("a.parquet is damaged in row group 1" in problem for problem in got.problems.values())
    assert got.text == texts[:20] + [""] * 20 + texts[40:]


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1), bits=st.integers(1, 255), checksum=st.booleans())
@example(position=0.6163914142088537, bits=1, checksum=False)  # a row group's count in the footer
def test_a_flipped_byte_in_parquet_never_ends_in_a_stack_trace(
    position: float, bits: int, checksum: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        texts = [f"document {i} {i % 3}" for i in range(64)]
        pq.write_table(pa.table({"text": texts}), path, row_group_size=16, write_page_checksum=checksum)
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= bits
        path.write_bytes(data)
        try:
            got = load(path, Path(folder) / "run")
        except UserError:
            return
        assert len(got.text) == len(got.ids)
        lost = [i for i in range(len(got)) if got.text[i] == ""]
        assert lost == sorted(got.problems)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300),
    name=st.sampled_from(["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz", "a.txt.zst"]),
)
def test_arbitrary_bytes_end_in_documents_or_one_sentence(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(b"text,b\n" * (name == "a.csv") + data)
        try:
            got = load(Path(folder) / name, Path(folder) / "run")
        except UserError:
            return
        assert all(bool(text.strip()) != (i in got.problems) for i, text in enumerate(got.text))


def test_broken_csv_records_cost_their_first_line_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,one\n2,"broken " quote"\n3,"three\nlines ""and"" quotes\nof text"\n4,too,many\n5\n'
        b'6,caf\xe9\n7,"never closed\n8,eight\n9,"nine"\n10,a "quote" inside\n11,"\n12,twelve\n'
    )
    got = load(tmp_path / "a.csv", tmp_path / "run", id="id")
    good = {i: text for i, text in enumerate(got.text) if i not in got.problems}
    assert list(good.values()) == [
        "one",
        'three\nlines "and" quotes\nof text',
        "eight",
        "nine",
        'a "quote" inside',
        "twelve",
    ]
    assert [got.ids[i] for i in good] == ["1", "3", "8", "9", "10", "12"]
    assert list(got.problems.values()) == [
        "a.csv line 3: the csv record is broken (',' expected after '\"')",
        "a.csv line 7: the csv record has 3 fields, the header 2",
        "a.csv line 8: the csv record has 1 fields, the header 2",
        "a.csv line 9: text cannot be encoded as UTF-8 (character 3)",
        "a.csv line 10: the csv record is broken (',' expected after '\"')",
        "a.csv line 14: the csv record is broken (unexpected end of data)",
    ]


def test_csv_fields_of_ten_million_characters_are_read_and_longer_ones_quarantined(tmp_path: Path) -> None:
    big = "x" * FIELD_CHARS
    (tmp_path / "a.csv").write_text(f"text\n{big}\n{big}x\nlast\n")
    got = load(tmp_path / "a.csv", tmp_path / "run", max_chars=20_000_000)
    assert [len(text) for text in got.text] == [FIELD_CHARS, 0, 4]
    assert got.problems == {
        1: "a.csv line 3: the csv record is broken (field larger than field limit (10000000))"
    }


def test_csv_quotes_made_to_swallow_the_rest_do_not_hang(tmp_path: Path) -> None:
    # Each line closes the field before it and opens the next: every record runs to the end of the file.
    (tmp_path / "a.csv").write_text("text,b\n" + 'a","b\n' * 400_000)
    start = time.monotonic()
    got = load(tmp_path / "a.csv", tmp_path / "run")
    assert got.problems
    assert time.monotonic() - start < 30


def test_a_line_beyond_the_limit_is_quarantined_and_the_next_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(70):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    got = load(tmp_path / "a.jsonl", tmp_path / "run")
    assert got.text == ["first", "", "last"]
    assert got.problems == {1: "a.jsonl line 2: the line is longer than 64 MiB"}


def test_bad_rows_do_not_move_good_ones(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(100)]
    bad = list(HOSTILE_LINES)
    mixed = [line for i, line in enumerate(good) for line in ([line, bad[i % len(bad)]] if i % 3 else [line])]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good))
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(mixed))
    clean = load(tmp_path / "good.jsonl", tmp_path / "run")
    got = load(tmp_path / "mixed.jsonl", tmp_path / "run2")
    kept = [i for i in range(len(got)) if i not in got.problems]
    assert [(got.text[i], got.ids[i]) for i in kept] == list(zip(clean.text, clean.ids, strict=True))


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "t.txt"])
def test_labelled_files_keep_their_labels(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"doc {i}", "label": i % 3} for i in range(9)]
    path = tmp_path / name
    labels: list[object] | None = [row["label"] for row in rows]
    if name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "t.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "t.csv":
        path.write_bytes(as_csv([{key: str(value) for key, value in row.items()} for row in rows]))
        labels = [str(row["label"]) for row in rows]
    else:
        path.write_text("".join(f"{row['text']}\n" for row in rows))
        labels = None
    assert read_labelled([str(path)], "text", "label" if labels else None) == (
        [r["text"] for r in rows],
        labels,
    )


def test_a_bad_labelled_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for line, sentence in {
        '{"text": "", "label": 1}': "line 2 has no text",
        '{"text": "\\ud800", "label": 1}': "line 2 has a text that cannot be encoded",
        '{"text": "x"}': "line 2 has no column 'label'; its columns are: text",
        "{": "line 2: the line is not JSON",
    }.items():
        path.write_text('{"text": "good", "label": 1}\n' + line + "\n")
        with pytest.raises(UserError, match=sentence):
            read_labelled([str(path)], "text", "label")
    pq.write_table(pa.table({"text": ["x"], "y": [1]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column 'label'; its columns are: text, y"):
        read_labelled([str(tmp_path / "t.parquet")], "text", "label")
