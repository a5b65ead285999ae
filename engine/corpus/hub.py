"""Hub data sets: a name on the Hub, or a `save_to_disk` folder, as a stream of records (extra `datasets`)."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from engine import spec
from engine.corpus.formats import Record, missing_column
from engine.corpus.sources import Source, cause
from engine.errors import UserError, install


def hub_source(corpus: spec.Corpus) -> Source:
    """The data set as a source. A local folder's stamp is made of its files; the Hub itself is not asked."""
    assert corpus.hub is not None
    if not os.path.isdir(corpus.hub):
        return Source(corpus.hub, corpus.hub, "hub", -1, corpus.hub_revision or "")
    folder = os.path.abspath(corpus.hub)
    files = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            state = os.stat(os.path.join(parent, name))
            files.append(
                (os.path.relpath(os.path.join(parent, name), folder), state.st_size, state.st_mtime_ns)
            )
    stamp = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return Source(os.path.basename(folder), folder, "hub", -1, stamp)


def hub_records(corpus: spec.Corpus, columns: tuple[str, ...]) -> Iterator[Record]:
    """Stream the data set in its order; `line` counts rows from 1.

    Raises:
        UserError: `datasets` is not installed, the data set cannot be opened, or lacks the split or a column.
    """
    data = _open(corpus)
    names = data.column_names
    for column in columns if names is not None else ():
        if column not in names:
            raise missing_column(f"the data set {corpus.hub}", column, names)
    if names is not None:
        data = data.select_columns(list(dict.fromkeys(columns)))
    line = itertools.count(1)
    try:
        for batch in data.iter(batch_size=256):
            for row in zip(*batch.values(), strict=True):
                yield Record(next(line), dict(zip(batch, row, strict=True)), None)
    except Exception as error:  # the libraries below raise types of their own
        raise UserError(
            f"the data set {corpus.hub} breaks off after row {next(line) - 1} ({cause(error)}): run again."
        ) from None


def _open(corpus: spec.Corpus) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"corpus.hub = {corpus.hub} needs the package datasets: {install('datasets')}."
        ) from None
    assert corpus.hub is not None
    local = os.path.isdir(corpus.hub)
    try:
        if not local:
            return datasets.load_dataset(
                corpus.hub,
                corpus.hub_config,
                split=corpus.hub_split,
                revision=corpus.hub_revision,
                streaming=True,
            )
        data = datasets.load_from_disk(corpus.hub)
    except Exception as error:  # the libraries below raise types of their own
        hint = "give a folder of plain files as corpus.paths" if local else "check its name and the network"
        raise UserError(f"cannot open the data set {corpus.hub} ({cause(error)}): {hint}.") from None
    if isinstance(data, dict):  # a DatasetDict
        if corpus.hub_split not in data:
            raise UserError(
                f"{corpus.hub} has no split {corpus.hub_split!r}: set corpus.hub_split to one of "
                f"{', '.join(sorted(data))}."
            )
        data = data[corpus.hub_split]
    return data
