"""A corpus format of one's own, in one file: text files whose documents are set apart by empty lines.

PYTHONPATH=examples unbake recover run.yaml --corpus.format paragraphs:records
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.corpus.formats import Record
from engine.corpus.sources import Source, open_source


def records(source: Source, columns: tuple[str, ...]) -> Iterator[Record]:
    """Every paragraph as a record: the line it begins at, its fields, or None and what is wrong with it.

    Args:
        source: one file of corpus.paths, on any storage.
        columns: the columns that are asked for; the first is the text.
    """
    lines: list[str] = []
    with open_source(source) as file:
        number = 0
        for number, raw in enumerate(file, start=1):
            text = raw.decode("utf-8", "surrogateescape").strip()
            if text:
                lines.append(text)
            elif lines:
                yield Record(number - len(lines), {columns[0]: " ".join(lines)}, None)
                lines = []
        if lines:
            yield Record(number - len(lines) + 1, {columns[0]: " ".join(lines)}, None)
