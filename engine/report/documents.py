"""Selected documents for the page: the first ones as a plain table, all of them as a data block to search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from engine.chat import readable
from engine.report.text import clean, cut

FIRST = 100
"""Documents in the plain table, readable without the script."""

LONGEST = 4_000
"""Bytes of a document's text at most."""

SHORTEST = 60
"""Bytes of text kept of each when there are very many."""

BUDGET = 13_000_000
"""Bytes of the data block: 100,000 documents stay searchable in a page below 15 MB."""

_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def first(selection: pa.Table, names: list[str]) -> list[dict[str, Any]]:
    """The first documents as dicts: rank, id, text, excerpt (None when the text is short), label, numbers.

    Where the selection has them, `nearest` and `distance`: the nearest true document (else None).
    """
    rows = []
    for rank, row in enumerate(_rows(selection.slice(0, FIRST)), start=1):
        text = cut(_text(row), LONGEST)
        rows.append(
            {
                "rank": rank,
                "id": str(row.get("doc_id", "")),
                "text": text,
                "excerpt": cut(text.replace("\n", " "), 180) if len(text) > 200 else None,
                "label": label_name(row.get("label"), names),
                "nearest": cut(clean(str(row["nearest"])), LONGEST) if row.get("nearest") else None,
                "distance": row.get("nearest_distance"),
                **{key: row.get(key) for key in ("confidence", "gain", "objective")},
            }
        )
    return rows


def data_block(selection: pa.Table, names: list[str]) -> tuple[Markup, int]:
    """JSON for a script element, and how many documents it holds (from the first, within BUDGET).

    One array a document: id, text, label index, confidence, gain, objective and, where known, the nearest true
    document and its distance. ``<``, ``>`` and ``&`` are
    written as escapes, so that no text can end the element it stands in.
    """
    n = max(1, selection.num_rows)
    texts = 2 if "nearest" in selection.column_names else 1
    size = max(SHORTEST, min(LONGEST, (BUDGET // n - 90) // texts))  # 90: the rest of a row
    pieces: list[str] = []
    used = 0
    for row in _rows(selection):
        label = row.get("label")
        fields = [
            clean(cut(str(row.get("doc_id", "")), 80)),
            cut(_text(row), size),
            label if isinstance(label, int) and 0 <= label < len(names) else -1,
            *(_rounded(row.get(key)) for key in ("confidence", "gain", "objective")),
        ]
        if row.get("nearest"):
            fields += [cut(clean(str(row["nearest"])), size), _rounded(row.get("nearest_distance"))]
        piece = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)
        used += len(piece.encode()) + 2
        if used > BUDGET:
            break
        pieces.append(piece)
    head = json.dumps([clean(name) for name in names], ensure_ascii=False).translate(_ESCAPES)
    return Markup('{"labels":%s,"rows":[\n%s\n]}') % (Markup(head), Markup(",\n".join(pieces))), len(pieces)


def label_name(label: Any, names: list[str]) -> str:
    """Display name of a label index; empty for none."""
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else ""


def _rows(selection: pa.Table) -> Iterator[dict[str, Any]]:
    wanted = ["doc_id", "text", "prompt", "response", "label", "confidence", "gain", "objective"]
    wanted += ["nearest", "nearest_distance"]
    table = selection.select([name for name in wanted if name in selection.column_names])
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _text(row: dict[str, Any]) -> str:
    parts = [row.get("prompt"), row.get("response")]
    if not any(parts):
        parts = [readable(str(row.get("text") or ""))]
    return clean("\n\n".join(str(part) for part in parts if part))


def _rounded(number: Any) -> float | None:
    """Four significant digits; None for what JSON cannot hold."""
    if not isinstance(number, float | int) or number != number or abs(number) == float("inf"):
        return None
    return float(f"{number:.4g}")
