"""Formats: jsonl, csv and txt, compressed or not, as a stream of records; a broken line is a record too."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa

from engine.corpus.sources import Source, cause, open_source, split_extension
from engine.errors import UserError
from engine.extend import is_named, load

LINE_BYTES = 64 << 20
"""A longer line or csv record is broken: it bounds the memory that one can take."""
FIELD_CHARS = 10_000_000
"""The longest csv field; an opening quote that is never closed is given up after so many characters."""


class Record(NamedTuple):
    """One document as its file has it: `fields`, or None and the `problem` with its line."""

    line: int
    fields: dict[str, object] | None
    problem: str | None


def file_records(source: Source, columns: tuple[str, ...]) -> Iterator[Record]:
    """Stream a jsonl, csv or txt source in file order; blank lines are no records.

    Args:
        columns: columns asked for; csv must have them, jsonl records may lack them (the caller judges), and
            txt names its only one `columns[0]`.

    Raises:
        UserError: the file cannot be opened or breaks off, or a csv header lacks a column.
    """
    if is_named(source.format):
        read: Callable[[Source, tuple[str, ...]], Iterator[Record]] = load(source.format, "corpus.format")
        return read(source, columns)
    if source.format == "jsonl":
        return _jsonl(source)
    if source.format == "csv":
        return _csv(source, columns)
    return _txt(source, columns)


def missing_column(file: str, column: str, present: list[str]) -> UserError:
    """The error for a column that a file does not have; it names the fields of the spec that choose another."""
    fields = {"text": "corpus.text (in a test set: evaluate.text) names", "label": "evaluate.label names"}
    field = fields.get(column, "fields of corpus (in a test set: evaluate.text and evaluate.label) name")
    return UserError(
        f"{file} has no column {column!r}; its columns are: {', '.join(present)[:500] or 'none'}; {field} another."
    )


def _lines(source: Source) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, bytes with the line's end) of each line; None in place of one that is too long."""
    number = 0
    compression = split_extension(source.file)[1]
    try:
        with open_source(source) as raw:
            stream = raw
            if compression:
                plain = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
                stream = io.BufferedReader(plain, 1 << 20)
            while line := stream.readline(LINE_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                too_long = len(line) > LINE_BYTES
                tail = line
                while too_long and tail and not tail.endswith(b"\n"):
                    tail = stream.readline(1 << 20)
                yield number, None if too_long else line
    except (OSError, EOFError, pa.ArrowException) as error:
        broken = f"breaks off after line {number}" if number else "cannot be read"
        raise UserError(
            f"{source.file} {broken} ({cause(error)}): replace the file, or leave it out of the corpus."
        ) from None


def _too_long(number: int) -> Record:
    return Record(number, None, f"the line is longer than {LINE_BYTES >> 20} MiB")


def _jsonl(source: Source) -> Iterator[Record]:
    for number, line in _lines(source):
        if line is None:
            yield _too_long(number)
        elif line.strip():
            yield _json_record(number, line)


def _json_record(number: int, line: bytes) -> Record:
    try:
        value = json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Record(number, None, f"the line is not UTF-8 (byte {error.start})")
    except RecursionError:
        return Record(number, None, "the line is JSON nested too deeply")
    except ValueError as error:
        return Record(number, None, f"the line is not JSON ({getattr(error, 'msg', 'a number too long')})")
    if not isinstance(value, dict):
        return Record(number, None, f"the line is a JSON {type(value).__name__}, not an object")
    return Record(number, value, None)


def _txt(source: Source, columns: tuple[str, ...]) -> Iterator[Record]:
    if len(columns) > 1:
        raise UserError(
            f"{source.file} is a text file, a document a line: it has no column {columns[1]!r}, "
            "so remove that column from the spec, or convert the file."
        )
    for number, line in _lines(source):
        if line is None:
            yield _too_long(number)
        elif line.strip():
            try:
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                yield Record(number, None, f"the line is not UTF-8 (byte {error.start})")
            else:
                yield Record(number, {columns[0]: text}, None)


class _CsvLines:
    """Lines for a csv reader, which can be put back when a record turns out to be broken."""

    def __init__(self, source: Source) -> None:
        self._lines = _lines(source)
        self._returned: list[tuple[int, str | None]] = []  # a stack: the next line is at the end
        self.taken: list[tuple[int, str | None]] = []
        self._chars = self._read = self._rescanned = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        number, text = self._returned.pop() if self._returned else self._next()
        self.taken.append((number, text))
        if text is None:
            raise csv.Error(f"a line is longer than {LINE_BYTES >> 20} MiB")
        self._chars += len(text)
        if self._chars > LINE_BYTES:
            raise csv.Error(f"it is longer than {LINE_BYTES >> 20} MiB")
        return text

    def _next(self) -> tuple[int, str | None]:
        number, line = next(self._lines)
        if line is None:
            return number, None
        self._read += len(line)
        # Bytes that are no UTF-8 matter only in the columns asked for: they are found there.
        return number, line.decode("utf-8", "surrogateescape")

    def start(self) -> None:
        """Begin a record: what was taken so far is done with."""
        self.taken, self._chars = [], 0

    def give_up(self) -> None:
        """The record that was begun is broken: only its first line is lost, the rest is read again.

        A file made so that every line swallows the ones after it would be read once for every line; reading
        again stops paying for itself beyond eight times the file, and the whole record is lost then.
        """
        if self._rescanned + self._chars <= 8 * self._read + FIELD_CHARS:
            self._rescanned += self._chars
            self._returned.extend(reversed(self.taken[1:]))


def _csv(source: Source, columns: tuple[str, ...]) -> Iterator[Record]:
    csv.field_size_limit(FIELD_CHARS)
    lines = _CsvLines(source)
    reader = csv.reader(lines, strict=True)
    where: dict[str, int] | None = None
    width = 0
    while True:
        lines.start()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number = lines.taken[0][0] if lines.taken else 1
            if where is None:
                raise UserError(f"{source.file} has a broken header line ({error}): mend it.") from None
            lines.give_up()
            reader = csv.reader(lines, strict=True)
            yield Record(number, None, f"the csv record is broken ({error})")
            continue
        if not row:
            continue
        if where is None:
            where, width = _header(source, row, columns), len(row)
        elif len(row) != width:
            problem = f"the csv record has {len(row)} fields, the header {width}"
            yield Record(lines.taken[0][0], None, problem)
        else:
            yield Record(lines.taken[0][0], {name: row[i] for name, i in where.items()}, None)


def _header(source: Source, header: list[str], columns: tuple[str, ...]) -> dict[str, int]:
    for column in columns:
        if column not in header:
            raise missing_column(source.file, column, header)
        if header.count(column) > 1:
            raise UserError(
                f"{source.file} has {header.count(column)} columns called {column!r}: rename them."
            )
    return {column: header.index(column) for column in columns}
