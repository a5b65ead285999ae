"""Conversion: records of sources without row groups -> Parquet parts in the run, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine import spec
from engine.chat import cut_chat, dump_chat
from engine.corpus.formats import Record, missing_column
from engine.corpus.sources import Source
from engine.errors import UserError
from engine.rundir import CORPUS, RunDir

PROBLEM = "unbake.problem"
"""Column of a converted file that says why a row is quarantined; null for a good one."""
GROUP_ROWS, GROUP_CHARS = 1024, 16 << 20
PART_BYTES = 32 << 20
JUDGED = 1000
"""So many jsonl records without a single one that has a column are enough to say that it is missing."""

Row = tuple[str | None, ...]
Progress = Callable[[int], None]


class Parts:
    """Writes rows to `corpus/part-*.parquet`, each file whole and at once (`RunDir.write_bytes` is atomic).

    Row groups end at multiples of `partition_rows` where texts are short, so that a partition is a row group
    or a run of them (1: not known before all is read; they end at multiples of GROUP_ROWS). Memory holds one row
    group of at most about 16 M characters and one compressed part.
    """

    def __init__(
        self, run: RunDir, names: list[str], partition_rows: int, progress: Progress | None, part_bytes: int
    ) -> None:
        self.files: list[tuple[str, int]] = []
        self._run, self._progress, self._part_bytes = run, progress, part_bytes
        self._schema = pa.schema([(name, pa.large_string()) for name in [*names, PROBLEM]])
        self._group_rows = partition_rows * -(-GROUP_ROWS // partition_rows)
        self._rows: list[Row] = []
        self._chars = self._total = self._in_part = self._number = 0
        self._sink = io.BytesIO()
        self._writer: Any = None

    def add(self, row: Row) -> None:
        """Append one row: its values in schema order."""
        self._rows.append(row)
        self._chars += sum(len(value) for value in row if value is not None)
        if (self._total + len(self._rows)) % self._group_rows == 0 or self._chars >= GROUP_CHARS:
            self._flush()
            if self._sink.tell() >= self._part_bytes:
                self.close()

    def close(self) -> None:
        """End the current part, if it has rows."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            name = f"{CORPUS}/part-{self._number:05d}.parquet"
            self._run.write_bytes(name, self._sink.getvalue())
            self.files.append((name, self._in_part))
            self._number += 1
            self._in_part, self._sink, self._writer = 0, io.BytesIO(), None

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._sink, self._schema, compression="zstd", write_page_checksum=True, use_dictionary=False
            )
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(columns, self._schema))
        self._total += len(self._rows)
        self._in_part += len(self._rows)
        self._rows, self._chars = [], 0
        if self._progress is not None:
            self._progress(self._total)


class Picker:
    """Picks the mapped columns out of records; says when no record of the corpus has one of them."""

    def __init__(self, corpus: spec.Corpus) -> None:
        self.texts = [corpus.messages or corpus.text]
        if corpus.prompt is not None:
            self.texts = [corpus.prompt, str(corpus.response)]
        self._chat = corpus.messages
        self._id = corpus.id
        self._limit = corpus.max_chars + 1  # one more than is kept, so that the reader sees the cut
        self.names = list(dict.fromkeys([*self.texts, *([corpus.id] if corpus.id else [])]))
        self._objects = 0
        self._missing: dict[str, tuple[str, list[str]]] = {}
        self._present: set[str] = set()

    def row(self, source: Source, record: Record) -> Row:
        """The record as a row in the order of `names`, its problem last."""
        where = f"{source.name} line {record.line}: " if source.format != "hub" else ""
        if record.fields is None:
            return (*[None] * len(self.names), f"{where}{record.problem}")
        values: dict[str, str | None] = {}
        problem = None
        for name in self.names:
            if name not in record.fields:
                self._missing.setdefault(name, (source.file, list(record.fields)))
                problem = problem or (f"{where}no {name!r}" if name in self.texts else None)
                continue
            self._present.add(name)
            if name in self.texts:
                make = _chat if name == self._chat else _text
                values[name], wrong = make(record.fields[name], name, self._limit)
                problem = problem or (wrong and f"{where}{wrong}")
            else:
                values[name] = id_text(record.fields[name])
        self._objects += 1
        if self._objects == JUDGED:
            self.check()
        return (*[values.get(name) for name in self.names], problem)

    def check(self) -> None:
        """UserError when a column was missing in every record so far."""
        for name, (file, keys) in self._missing.items():
            if name not in self._present:
                raise missing_column(file, name, keys)


def _text(value: object, name: str, limit: int) -> tuple[str | None, str | None]:
    """(text to store, problem). Null passes, as it does in a Parquet source: the reader judges it."""
    if value is None:
        return None, None
    if not isinstance(value, str):
        return None, f"{name} is of type {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return None, f"{name} cannot be encoded as UTF-8 (character {error.start})"
    return value[:limit], None


def _chat(value: object, name: str, limit: int) -> tuple[str | None, str | None]:
    """As `_text`, of a list of messages."""
    text, problem = (None, None) if value is None else dump_chat(value, name)
    return text and cut_chat(text, limit), problem


def id_text(value: object) -> str | None:
    """An id as a string; None (a content hash then) for null."""
    if value is None:
        return None
    if not isinstance(value, str):
        value = json.dumps(value, default=str) if isinstance(value, bool | list | dict) else str(value)
    return value.encode("utf-8", "backslashreplace").decode()


class Digest:
    """sha256 of a stream of rows; problems count as such, not by their wording.

    It is of what was read, not of the file's bytes: the same for a compressed and a plain copy.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, row: Row) -> None:
        """Take in one row, its problem last; lengths keep values apart, -1 stands for null."""
        for value in (*row[:-1], None if row[-1] is None else ""):
            data = b"" if value is None else value.encode()
            self._hash.update((-1 if value is None else len(data)).to_bytes(8, "big", signed=True))
            self._hash.update(data)

    def hex(self) -> str:
        """The digest of the rows so far."""
        return self._hash.hexdigest()


def no_documents(corpus: spec.Corpus) -> UserError:
    """The error for a corpus without a single row."""
    where = f"the data set {corpus.hub}" if corpus.hub else f"corpus.paths = {corpus.paths}"
    return UserError(f"there are no documents in {where[:300]}: every file is empty; mend the corpus.")
