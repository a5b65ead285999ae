"""Parquet in place: footers for planning, and given rows read from the row groups that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus.convert import PROBLEM
from engine.corpus.formats import missing_column
from engine.corpus.sources import cause
from engine.errors import UserError

_TAIL = 64 << 10
_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Footer:
    """rows: number of rows; schema: Arrow schema; check: sha256 of the footer's bytes."""

    rows: int
    schema: Any
    check: str


@dataclass
class Cells:
    """Values by column, and for each row the problem with it or None; all lists have one entry a row.

    A string that is not UTF-8 is left as bytes, for the caller to judge.
    """

    values: dict[str, list[object]]
    problems: list[str | None] = field(default_factory=list)


def read_footer(file: str, size: int) -> Footer:
    """Read the footer alone, in one or two requests.

    Args:
        file: absolute path or URI.
        size: bytes, or -1.

    Raises:
        UserError: the file is not readable or not Parquet.
    """
    try:
        fs, path = fsspec.core.url_to_fs(file)
        size = fs.size(path) if size < 0 else size
        tail = fs.cat_file(path, start=max(0, size - _TAIL), end=size)
        if size < 12 or tail[-4:] != b"PAR1":
            raise ValueError("it does not end as a Parquet file does")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length + 4 > size:
            raise ValueError("its footer is broken")
        if length > len(tail):
            tail = fs.cat_file(path, start=size - length, end=size)
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:]))
        if sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) != metadata.num_rows:
            raise ValueError("its footer is broken: the rows of its row groups do not add up")
        return Footer(
            metadata.num_rows,
            metadata.schema.to_arrow_schema(),
            hashlib.sha256(tail[-length:]).hexdigest(),
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{file} is not a readable Parquet file ({cause(error)}): replace it, or leave it out."
        ) from None


def check_columns(file: str, schema: Any, texts: list[str], other: str | None, chat: bool = False) -> None:
    """UserError when a mapped column is missing, there twice, or (texts) not of a string type.

    Args:
        chat: texts are chats, which may also be lists.
    """
    for name in [*texts, *([other] if other else [])]:
        if name not in schema.names:
            raise missing_column(file, name, schema.names)
        if schema.names.count(name) > 1:
            raise UserError(f"{file} has {schema.names.count(name)} columns called {name!r}: rename them.")
        kind = schema.field(name).type
        if name in texts and not (_is_string(kind) or pa.types.is_null(kind) or (chat and _is_list(kind))):
            strings = [column.name for column in schema if _is_string(column.type)]
            raise UserError(
                f"the column {name!r} of {file} is of type {kind}, not string; its string columns are: "
                f"{', '.join(strings)[:500] or 'none'}."
            )


def read_cells(file: str, columns: list[str], rows: npt.NDArray[np.int64]) -> Cells:
    """Read the given rows and columns; nothing but the row groups that hold them is read, a batch at a time.

    A row group with a damaged page costs its rows from the damaged batch on: each gets a problem.

    Args:
        file: absolute path or URI.
        columns: their names.
        rows: (n,) rows of the file, ascending, repetitions allowed.

    Raises:
        UserError: the file is gone or shorter than planned, or is the run's own and damaged.
        OSError: the storage fails while reading (worth trying again).
    """
    cells = Cells({name: [] for name in columns})
    try:
        handle = fsspec.open(file, "rb").open()
    except FileNotFoundError:
        raise UserError(f"{file} is gone since the plan was made: restore it.") from None
    with handle:
        source, schema = _open(file, handle, rows)
        own = PROBLEM in schema.names
        wanted = [*cells.values, *([PROBLEM] if own else [])]
        start = 0
        for group in range(source.num_row_groups):
            stop = start + source.metadata.row_group(group).num_rows
            low, high = np.searchsorted(rows, [start, stop])
            before = len(cells.problems)
            try:
                if high > low:
                    for batch in _batches(source, group, wanted, rows[low:high] - start):
                        new = {name: _values(batch.column(name)) for name in wanted}
                        cells.problems.extend(new[PROBLEM] if own else [None] * len(batch))
                        for name, values in cells.values.items():
                            values.extend(new[name])
            except (OSError, pa.ArrowException) as error:
                if not _is_damage(error):
                    raise
                if own:
                    raise UserError(
                        f"{file} is damaged ({cause(error)}): remove it, and run again to make it anew."
                    ) from None
                lost = int(high - low) - (len(cells.problems) - before)
                for values in cells.values.values():
                    values.extend([None] * lost)
                name = file.rsplit("/", 1)[-1]
                cells.problems.extend([f"{name} is damaged in row group {group} ({cause(error)})"] * lost)
            start = stop
    return cells


def _open(file: str, handle: Any, rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
    """The file as a streaming Parquet reader, and its schema."""
    try:
        # A stream of small reads: pre-buffering would hold whole column chunks in memory.
        source = pq.ParquetFile(
            handle, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
        schema = source.schema_arrow
    except (OSError, pa.ArrowException) as error:
        if not _is_damage(error):
            raise
        raise UserError(f"{file} changed since the plan was made ({cause(error)}): restore it.") from None
    if len(rows) and rows[-1] >= source.metadata.num_rows:
        raise UserError(f"{file} is shorter than when the plan was made: restore it, or use another run_dir.")
    return source, schema


def _batches(source: Any, group: int, columns: list[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
    """Batches of just the given rows (ascending, counted from the row group's start)."""
    metadata = source.metadata.row_group(group)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    size = int(np.clip(_BATCH_BYTES // row_bytes, 16, 4096))
    start = 0
    for batch in source.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
        low, high = np.searchsorted(rows, [start, start + len(batch)])
        if high > low:
            picked = rows[low:high] - start
            consecutive = picked[-1] - picked[0] + 1 == len(picked) == len(np.unique(picked))
            yield batch.slice(picked[0], len(picked)) if consecutive else batch.take(pa.array(picked))
        start += len(batch)
        if high == len(rows):
            return
    raise pa.ArrowInvalid("it ends early")


def _values(array: Any) -> list[Any]:
    """Python values of an Arrow array; a string that is not UTF-8 as bytes."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        if _is_list(array.type):
            return [_listed(value) for value in array]
        return [_decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]


def _listed(value: Any) -> object:
    """A list as Python has it, or bytes in place of one with a string that is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""


def _decoded(value: bytes | None) -> object:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _is_string(kind: Any) -> bool:
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind))


def _is_damage(error: Exception) -> bool:
    """Whether the bytes are wrong, as against the storage that failed to give them.

    Arrow reports what it cannot decode as its own exceptions or as a bare OSError; errors of the system carry
    an errno, and those of remote file systems a type of their own or an errno.
    """
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
