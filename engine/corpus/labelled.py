"""Labelled files: test documents with their labels, in the formats of the corpus, all rows in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from engine.chat import dump_chat
from engine.corpus.formats import file_records, missing_column
from engine.corpus.parquet import check_columns, read_cells, read_footer
from engine.corpus.sources import Source, list_sources
from engine.errors import UserError


def read_labelled(
    paths: list[str],
    text: str,
    label: str | None,
    format: Literal["auto", "parquet", "jsonl", "csv", "txt"] = "auto",
    chat: bool = False,
) -> tuple[list[str], list[object] | None]:
    """Texts, and labels as the files have them (int, str, ...; csv: str) when `label` names a column.

    With `chat` the text column holds lists of messages, and the texts are `engine.chat`'s canonical ones.
    Unlike a corpus, a test set must be sound: a bad row is an error.

    Raises:
        UserError: no or unreadable files, a missing column, a document that is not text or is empty,
            no documents.
    """
    texts: list[str] = []
    labels: list[object] = []
    for source in list_sources(paths, format, "evaluate.test"):
        if source.size == 0:
            continue
        for where, value, answer in _rows(source, text, label, chat):
            if chat:
                value, problem = dump_chat(value, text)
                if problem is not None:
                    raise UserError(f"{where}: {problem}: mend or remove it.")
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where} has no text in {text!r}: mend or remove it.")
            if not _encodable(value):
                raise UserError(f"{where} has a text that cannot be encoded as UTF-8: mend or remove it.")
            texts.append(value)
            labels.append(answer)
    if not texts:
        raise UserError(f"there are no documents in evaluate.test = {paths}: every file is empty.")
    return texts, labels if label is not None else None


def _rows(source: Source, text: str, label: str | None, chat: bool) -> Iterator[tuple[str, object, object]]:
    columns = tuple(dict.fromkeys(name for name in (text, label) if name is not None))
    if source.format == "parquet":
        footer = read_footer(source.file, source.size)
        check_columns(source.file, footer.schema, [text], label, chat)
        cells = read_cells(source.file, list(columns), np.arange(footer.rows, dtype=np.int64))
        for i, problem in enumerate(cells.problems):
            if problem is not None:
                raise UserError(f"{source.file} row {i}: {problem}: replace the file.")
            yield f"{source.file} row {i}", cells.values[text][i], label and cells.values[label][i]
        return
    for record in file_records(source, columns):
        where = f"{source.file} line {record.line}"
        if record.fields is None:
            raise UserError(f"{where}: {record.problem}: mend or remove it.")
        for name in columns:
            if name not in record.fields:
                raise missing_column(where, name, list(record.fields))
        yield where, record.fields[text], label and record.fields[label]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
