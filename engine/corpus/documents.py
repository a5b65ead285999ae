"""Documents: rows of a plan as texts with ids; bad ones are quarantined where they stand."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import spec
from engine.chat import cut_chat, dump_chat
from engine.corpus.convert import id_text
from engine.corpus.parquet import read_cells
from engine.corpus.plan import Columns, Plan


@dataclass(frozen=True)
class Documents:
    """n documents in row order; all lists have length n.

    text: the document, cut to max_chars; "" for a quarantined one. ids: labels, by default the first 16
    hex digits of the text's sha256; rows are what identifies a document. prompts, responses: when mapped,
    and text is then prompt + response. With messages mapped text is `engine.chat`'s canonical text.
    problems: position -> reason, for the quarantined ones. truncated: how many were cut.
    """

    text: list[str]
    ids: list[str]
    prompts: list[str] | None
    responses: list[str] | None
    problems: dict[int, str]
    truncated: int

    def __len__(self) -> int:
        return len(self.text)


def read_partition(plan: Plan, partition: int, corpus: spec.Corpus) -> Documents:
    """The documents of one partition, in row order; errors as `read_rows`."""
    rows = plan.partition_range(partition)
    return read_rows(plan, np.arange(rows.start, rows.stop, dtype=np.int64), corpus)


def read_rows(plan: Plan, rows: npt.NDArray[np.int64], corpus: spec.Corpus) -> Documents:
    """The documents at the given global rows, in that order; only the row groups that hold them are read.

    Args:
        plan: where rows are.
        rows: (n,) global rows, in any order.
        corpus: for max_chars.

    Raises:
        UserError: a file is gone, shorter than planned, or the run's own and damaged.
        OSError: the storage fails while reading (worth trying again).
    """
    assert len(rows) == 0 or (rows.min() >= 0 and rows.max() < plan.n_rows), "rows outside the plan"
    columns = plan.columns
    names = [name for name in dict.fromkeys([*columns.read, columns.id]) if name is not None]
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    found: list[_Document] = []
    edges = np.searchsorted(ascending, plan.offsets)
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        if high > low:
            cells = read_cells(plan.files[i], names, ascending[low:high] - plan.offsets[i])
            for j, problem in enumerate(cells.problems):
                row = {name: values[j] for name, values in cells.values.items()}
                found.append(_judge(row, problem, columns, corpus.max_chars))
    documents: list[_Document] = [found[0]] * len(found) if found else []
    for position, document in zip(order, found, strict=True):
        documents[position] = document
    mapped = columns.prompt is not None
    return Documents(
        text=[document.prompt + document.response for document in documents],
        ids=[document.id for document in documents],
        prompts=[document.prompt for document in documents] if mapped else None,
        responses=[document.response for document in documents] if mapped else None,
        problems={i: document.problem for i, document in enumerate(documents) if document.problem},
        truncated=sum(document.cut for document in documents),
    )


@dataclass(frozen=True)
class _Document:
    """One row, judged; a document without a prompt column is all response."""

    id: str
    prompt: str
    response: str
    problem: str | None
    cut: bool


def _judge(row: dict[str, object], problem: str | None, columns: Columns, max_chars: int) -> _Document:
    if columns.messages is not None:
        return _judge_chat(row, problem, columns.messages, columns.id, max_chars)
    main = columns.text if columns.prompt is None else columns.response
    assert main is not None
    prompt = "" if columns.prompt is None else row[columns.prompt]
    response = row[main]
    if problem is None and columns.prompt is not None:
        problem = _problem(prompt, columns.prompt)
        if problem is None and isinstance(prompt, str) and len(prompt) >= max_chars:
            problem = f"{columns.prompt} alone is as long as max_chars ({max_chars})"
    problem = problem or _problem(response, main) or (None if str(response).strip() else f"{main} is empty")
    own = _own_id(row, columns.id)
    if problem is not None:
        parts = [part for part in (prompt, response) if isinstance(part, str | bytes)]
        raw = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
        return _Document(own or _digest(raw), "", "", problem, False)
    assert isinstance(prompt, str)
    assert isinstance(response, str)
    kept = response[: max_chars - len(prompt)]
    return _Document(own or _digest((prompt + kept).encode()), prompt, kept, None, len(kept) < len(response))


def _judge_chat(
    row: dict[str, object], problem: str | None, name: str, id_column: str | None, max_chars: int
) -> _Document:
    """A row of messages; the canonical text counts as the response."""
    value, own = row[name], _own_id(row, id_column)
    text, wrong = None, _problem(value, name)
    if wrong is None:
        text, wrong = dump_chat(value, name)
    problem = problem or wrong
    if problem is not None or text is None:
        return _Document(own or _digest(repr(value).encode("utf-8", "replace")), "", "", problem, False)
    kept = cut_chat(text, max_chars)
    return _Document(own or _digest(kept.encode()), "", kept, None, kept != text)


def _own_id(row: dict[str, object], column: str | None) -> str | None:
    own = None if column is None else row[column]
    return id_text(own.decode("utf-8", "backslashreplace") if isinstance(own, bytes) else own)


def _problem(value: object, name: str) -> str | None:
    if value is None:
        return f"{name} is null"
    return f"{name} is not UTF-8" if isinstance(value, bytes) else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
