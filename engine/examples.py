"""Training examples: documents of a selection, encoded, in memory or on disk in memory-mapped parts.

On disk a part is an Arrow file and an index names the parts; a worker maps them and touches the documents it
is asked for, so that its memory does not grow with the selection.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.encode import Encoder
from engine.errors import UserError, first_line
from engine.ragged import Ragged, Soft, joined
from engine.storage import Folder

INDEX = "index.json"
"""Names the parts of stored examples; written last, so that with it they are complete."""


class Examples(Protocol):
    """n encoded documents, wherever they are."""

    def __len__(self) -> int:
        """n."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, (n,)."""

    def take(self, members: npt.NDArray[np.int64]) -> Ragged:
        """The documents at the given positions, in that order, in memory."""


def load_examples(table: pa.Table, encoder: Encoder) -> Ragged:
    """`encode_documents` of a whole selection; UserError also when nothing is left to train on."""
    examples = encode_documents(table, encoder)
    check_trainable(len(examples), examples.weights is None or bool(examples.weights.any()))
    return examples


def encode_documents(table: pa.Table, encoder: Encoder, first: int = 0) -> Ragged:
    """Documents of a selection as training examples, in the table's order.

    Args:
        table: columns text (of a chat: `engine.chat`'s canonical text) and, in classification, label (index
            into task.labels); with columns prompt and response the response carries the loss (loss scope
            response). A column weight, none negative, says how much each document counts.
        first: row of the selection that the table begins with, for messages.

    Returns:
        The documents that carry loss; those that yield no loss token (empty texts) are left out.

    Raises:
        UserError: a missing column, a label that task.labels does not have, a chat that cannot be rendered.
    """
    columns = {"text"} | ({"label"} if encoder.label_ids else set())
    columns = {"prompt", "response"} if "response" in table.column_names else columns
    if missing := sorted(columns - set(table.column_names)):
        raise UserError(
            f"the training documents have no column {missing[0]}: they have {table.column_names}."
        )
    if "response" in columns:
        examples = encoder.encode(table["response"].to_pylist(), table["prompt"].to_pylist())
    else:
        examples = encoder.encode(table["text"].to_pylist())
    if examples.problems:
        row, why = min(examples.problems.items())
        raise UserError(f"row {first + row} of the training documents cannot be used: {why}.")
    if encoder.label_ids:
        labels = table["label"].to_numpy().astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(encoder.label_ids):
            raise UserError(f"the training documents have labels outside 0..{len(encoder.label_ids) - 1}.")
        examples = examples.with_labels(np.asarray(encoder.label_ids, np.int32)[labels])
    examples = replace(examples, weights=_weights(table))
    kept = np.flatnonzero(np.diff(examples.loss_offsets))
    return examples if len(kept) == len(examples) else examples.take(kept)


def check_trainable(documents: int, weighted: bool) -> None:
    """UserError when no document carries loss, or none of them any weight."""
    if not documents:
        raise UserError(
            "none of the training documents has a token that carries loss: there is nothing to train on."
        )
    if not weighted:
        raise UserError("the training documents' weights are all 0: there is nothing to train on.")


def _weights(table: pa.Table) -> npt.NDArray[np.float32] | None:
    """The documents' weights; None without the column or where all are 1."""
    if "weight" not in table.column_names:
        return None
    weights = table["weight"].to_numpy().astype(np.float32)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise UserError("the training documents' weights must be finite and none negative.")
    return None if (weights == 1).all() else weights


def write_part(folder: Folder, file: str, examples: Ragged) -> dict[str, Any]:
    """Write documents as one part, atomically; its entry in the index."""
    columns: dict[str, Any] = {
        "tokens": _lists(examples.tokens, examples.offsets),
        "targets": _lists(examples.targets, examples.offsets),
        "weight": pa.array(
            np.ones(len(examples), np.float32) if examples.weights is None else examples.weights
        ),
    }
    width = 0
    if examples.soft is not None:
        width = examples.soft.tokens.shape[1]
        columns["soft_tokens"] = _lists(examples.soft.tokens.ravel(), examples.loss_offsets * width)
        columns["soft_probs"] = _lists(examples.soft.probs.ravel(), examples.loss_offsets * width)
    batch = pa.record_batch(columns)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    folder.write_bytes(file, sink.getvalue())
    weighted = examples.weights is None or bool(examples.weights.any())
    return {"file": file, "documents": len(examples), "soft_width": width, "weighted": weighted}


def write_index(folder: Folder, parts: list[dict[str, Any]]) -> None:
    """Declare the parts complete, in the order of the selection; UserError as `check_trainable`."""
    check_trainable(sum(part["documents"] for part in parts), any(part["weighted"] for part in parts))
    folder.write_json(INDEX, {"parts": [part for part in parts if part["documents"]]})


class StoredExamples:
    """`Examples` on disk. On an object store the parts are fetched to a folder of this process first.

    Args:
        uri: the folder that `write_index` declared complete.

    Raises:
        UserError: no such examples, or damaged ones.
    """

    def __init__(self, uri: str) -> None:
        folder = Folder(uri)
        self._scratch: str | None = None
        try:
            entries = folder.read_json(INDEX)["parts"]
            if not folder.local:
                self._scratch = tempfile.mkdtemp(prefix="unbake-")
                for entry in entries:
                    folder.fs.get_file(folder.path(entry["file"]), f"{self._scratch}/{entry['file']}")
            root = self._scratch or folder.root
            self._parts = [_open_part(os.path.join(root, e["file"]), e["soft_width"]) for e in entries]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            self.close()
            raise UserError(
                f"the encoded training documents in {folder.path('')} cannot be read ({first_line(error)}): "
                "remove that folder, and run again to make them anew."
            ) from None
        self._first: npt.NDArray[np.int64] = np.cumsum([0, *map(len, self._parts)]).astype(np.int64)
        self._lengths = np.concatenate([part.lengths for part in self._parts])

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, (n,)."""
        return self._lengths

    def take(self, members: npt.NDArray[np.int64]) -> Ragged:
        """The documents at the given positions, in that order, in memory."""
        part = np.searchsorted(self._first, members, "right") - 1
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(members)]
        return joined(
            [
                self._parts[part[a]].take(members[a:b] - self._first[part[a]])
                for a, b in itertools.pairwise(edges)
                if b > a
            ]
        )

    def close(self) -> None:
        """Remove what was fetched."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _open_part(path: str, soft_width: int) -> Ragged:
    """A part as views of the mapped file; nothing is read but what is looked at."""
    table = pa.ipc.open_file(pa.memory_map(path)).read_all().combine_chunks()
    column = functools.partial(_list_column, table)
    tokens, offsets = column("tokens")
    soft = None
    if soft_width:
        soft = Soft(
            column("soft_tokens")[0].reshape(-1, soft_width), column("soft_probs")[0].reshape(-1, soft_width)
        )
    return Ragged(tokens, column("targets")[0], offsets, _flat(table["weight"]), soft)


def _list_column(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    array = table[name].chunk(0)
    return array.values.to_numpy(zero_copy_only=True), array.offsets.to_numpy(zero_copy_only=True)


def _flat(column: Any) -> npt.NDArray[Any]:
    return column.chunk(0).to_numpy(zero_copy_only=True)


def _lists(values: npt.NDArray[Any], offsets: Iterable[int]) -> Any:
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
