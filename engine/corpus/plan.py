"""Plan: which rows of which Parquet files make each partition; the same corpus always gives the same plan."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine import spec
from engine.ahead import ahead
from engine.corpus import convert, parquet
from engine.corpus.formats import Record, file_records
from engine.corpus.hub import hub_records, hub_source
from engine.corpus.sources import Source, list_sources
from engine.errors import UserError
from engine.rundir import CORPUS, PLAN, RunDir, fingerprint

_SETTINGS = (
    "text",
    "id",
    "prompt",
    "response",
    "messages",
    "hub_config",
    "hub_split",
    "hub_revision",
    "partition_rows",
    "max_documents",
    "max_chars",
)


@dataclass(frozen=True)
class Columns:
    """Column names in the plan's Parquet files; `text` is None when others make the text."""

    text: str | None
    id: str | None
    prompt: str | None
    response: str | None
    messages: str | None = None

    @property
    def read(self) -> list[str]:
        """The columns that make the text."""
        names = [self.prompt, self.response] if self.prompt else [self.messages or self.text]
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a Parquet file, an absolute path or URI."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Documents 0..n_rows-1: those of `files` in order; file i begins at global row offsets[i].

    Small whatever the corpus (two entries a file), so it travels to every task. `offsets` has one entry more
    than `files`, n_rows. `fingerprint` depends on the sources' relative names, sizes and contents (Parquet:
    the footer; else all that was read) and on the settings that shape documents, never on where they lie.
    """

    n_rows: int
    partition_rows: int
    columns: Columns
    fingerprint: str
    files: tuple[str, ...]
    offsets: tuple[int, ...]

    @property
    def n_partitions(self) -> int:
        """Number of partitions; only the last may be shorter than `partition_rows`."""
        return -(-self.n_rows // self.partition_rows)

    def partition_range(self, partition: int) -> range:
        """Global rows of a partition."""
        start = partition * self.partition_rows
        return range(start, min(start + self.partition_rows, self.n_rows))

    def pieces(self, partition: int) -> list[Piece]:
        """The rows of a partition, file by file, in row order."""
        rows = self.partition_range(partition)
        first = int(np.searchsorted(self.offsets, rows.start, "right")) - 1
        pieces = []
        for i in range(first, len(self.files)):
            if self.offsets[i] >= rows.stop:
                break
            start, stop = max(rows.start, self.offsets[i]), min(rows.stop, self.offsets[i + 1])
            pieces.append(Piece(self.files[i], start - self.offsets[i], stop - self.offsets[i]))
        return pieces


@dataclass(frozen=True)
class _Read:
    """A source as it was read: `rows` of it, with a hash `check` of what they are."""

    source: Source
    rows: int
    check: str


def make_plan(
    corpus: spec.Corpus,
    run: RunDir,
    progress: convert.Progress | None = None,
    part_bytes: int = convert.PART_BYTES,
) -> Plan:
    """The plan of a corpus, made anew or taken from the run directory; written last, and atomically.

    Parquet files stay where they are; every other source is streamed once into `corpus/` of the run. A plan
    that is there is used again if the sources are the same: equal name and size, and equal modification time
    or, failing that, equal content, so that a corpus may move and a run be resumed on another host.

    Args:
        corpus: what to read.
        run: run directory.
        progress: called with the number of documents converted so far, from time to time.
        part_bytes: size from which a converted file is closed and the next begun.

    Raises:
        UserError: no or unreadable files, missing columns, no documents; or sources or settings that differ
            from those of the plan that is there (the message names the file or the field).
    """
    sources = (
        [hub_source(corpus)] if corpus.hub else list_sources(corpus.paths, corpus.format, "corpus.paths")
    )
    if not run.exists(PLAN):
        return _build(corpus, sources, run, progress, part_bytes)
    state = _load_state(run)
    reads = _unchanged(corpus, sources, run, state)
    there = set(run.names(CORPUS))
    if any(_inside(file) and file.rsplit("/", 1)[-1] not in there for file, _ in state["files"]):
        plan = _build(corpus, sources, run, progress, part_bytes)
        if plan.fingerprint != state["fingerprint"]:
            raise UserError(
                f"{run.path(CORPUS)} lost a file, and the corpus changed since: use another run_dir."
            )
        return plan
    if reads != _reads(state):  # the corpus moved, or was copied: same documents, other places
        moved = {old.source.file: new.source.file for old, new in zip(_reads(state), reads, strict=True)}
        _write(corpus, run, reads, [(moved.get(file, file), rows) for file, rows in state["files"]])
    return load_plan(run)


def load_plan(run: RunDir) -> Plan:
    """The plan in a run directory; UserError when there is none."""
    state = _load_state(run)
    rows = [count for _, count in state["files"]]
    return Plan(
        n_rows=sum(rows),
        partition_rows=state.get("partition_rows") or state["settings"]["partition_rows"],  # old plans: there
        columns=Columns(**state["columns"]),
        fingerprint=state["fingerprint"],
        files=tuple(f"{run.uri}/{file}" if _inside(file) else file for file, _ in state["files"]),
        offsets=tuple(itertools.accumulate(rows, initial=0)),
    )


def _build(
    corpus: spec.Corpus,
    sources: list[Source],
    run: RunDir,
    progress: convert.Progress | None,
    part_bytes: int,
) -> Plan:
    run.remove(CORPUS)  # what a killed conversion left
    with run.not_half_written(CORPUS):
        reads, files = _convert(corpus, sources, run, progress, part_bytes)
        _write(corpus, run, reads, files)
    return load_plan(run)


def _convert(
    corpus: spec.Corpus,
    sources: list[Source],
    run: RunDir,
    progress: convert.Progress | None,
    part_bytes: int,
) -> tuple[list[_Read], list[tuple[str, int]]]:
    """Read the sources up to max_documents: what was read, and the (file, rows) that hold it, in order."""
    picker = convert.Picker(corpus)
    parts = convert.Parts(run, picker.names, corpus.partition_rows or 1, progress, part_bytes)
    footers = _footers(sources)
    reads: list[_Read] = []
    left = corpus.max_documents
    for source in sources:
        if left == 0:
            break
        if source.size == 0:
            rows, check = 0, ""
        elif source.format == "parquet":
            footer = next(footers)
            chat = corpus.messages is not None
            parquet.check_columns(source.file, footer.schema, picker.texts, corpus.id, chat)
            rows, check = footer.rows if left is None else min(footer.rows, left), footer.check
            parts.close()
            if rows:
                parts.files.append((source.file, rows))
        else:
            rows, digest = 0, convert.Digest()
            for row in _rows(corpus, source, picker, left):
                parts.add(row)
                digest.add(row)
                rows += 1
            check = digest.hex()
        reads.append(_Read(source, rows, check))
        left = None if left is None else left - rows
    picker.check()
    parts.close()
    if not parts.files:
        raise convert.no_documents(corpus)
    return reads, parts.files


def _rows(
    corpus: spec.Corpus, source: Source, picker: convert.Picker, limit: int | None
) -> Iterator[convert.Row]:
    names = tuple(picker.names)
    records: Iterator[Record]
    records = hub_records(corpus, names) if source.format == "hub" else file_records(source, names)
    return (picker.row(source, record) for record in itertools.islice(records, limit))


def _footers(sources: list[Source]) -> Iterator[parquet.Footer]:
    """Footers of the Parquet sources in order, read ahead: on object stores latency is what they cost."""
    files = [source for source in sources if source.format == "parquet" and source.size != 0]
    return ahead(lambda source: parquet.read_footer(source.file, source.size), files, count=64, threads=8)


def _settings(corpus: spec.Corpus) -> dict[str, Any]:
    return {name: getattr(corpus, name) for name in _SETTINGS}


def _write(corpus: spec.Corpus, run: RunDir, reads: list[_Read], files: list[tuple[str, int]]) -> None:
    text = None if corpus.prompt or corpus.messages else corpus.text
    columns = Columns(text, corpus.id, corpus.prompt, corpus.response, corpus.messages)
    contents = [
        [read.source.name, read.source.format, read.source.size, read.rows, read.check] for read in reads
    ]
    partition_rows = corpus.partition_rows_of(sum(rows for _, rows in files))
    state = {
        "partition_rows": partition_rows,
        "columns": asdict(columns),
        "settings": _settings(corpus),
        "sources": [asdict(read) for read in reads],
        "files": files,
        "fingerprint": fingerprint({"sources": contents, "settings": _settings(corpus)}),
    }
    metadata = {b"unbake": json.dumps(state, sort_keys=True).encode()}
    table = _pieces_table([file for file, _ in files], [rows for _, rows in files], partition_rows)
    run.write_table(PLAN, table.replace_schema_metadata(metadata))


def _pieces_table(files: list[str], rows: list[int], partition_rows: int) -> pa.Table:
    """One row per piece, for people and other programs; `load_plan` needs the schema's metadata alone."""
    offsets: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    cuts = np.union1d(offsets, np.arange(0, offsets[-1], partition_rows, dtype=np.int64))
    first, last = cuts[:-1], cuts[1:]
    file = np.searchsorted(offsets, first, "right") - 1
    return pa.table(
        {
            "partition": first // partition_rows,
            "first_row": first,
            "rows": last - first,
            "file": pa.array(files, pa.string()).take(pa.array(file)),
            "start": first - offsets[file],
            "stop": last - offsets[file],
        }
    )


def _load_state(run: RunDir) -> Any:
    if not run.exists(PLAN):
        raise UserError(f"{run.uri} has no {PLAN}: run `unbake plan` or `unbake extract` first.")
    try:
        return json.loads(run.read_table(PLAN, columns=["partition"]).schema.metadata[b"unbake"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{run.path(PLAN)} is damaged: remove it, and run again to make it anew.") from None


def _inside(file: str) -> bool:
    """Whether a file of the plan is the run's own (a relative name), not the corpus's."""
    return file.startswith(f"{CORPUS}/")


def _reads(state: Any) -> list[_Read]:
    return [_Read(Source(**read["source"]), read["rows"], read["check"]) for read in state["sources"]]


def _unchanged(corpus: spec.Corpus, sources: list[Source], run: RunDir, state: Any) -> list[_Read]:
    """The sources as they are now, known to hold what the plan was made of; UserError names what does not."""
    mend = f"restore it, or use another run_dir than {run.uri}"
    for field, now in _settings(corpus).items():
        if state["settings"].get(field) != now:
            before = state["settings"].get(field)
            raise UserError(f"the plan was made with corpus.{field} = {before!r}, not {now!r}: {mend}.")
    old = _reads(state)
    if corpus.max_documents is not None and sum(read.rows for read in old) == corpus.max_documents:
        sources = sources[: len(old)]  # the files after the last one that was needed do not matter
    before, names = [read.source.name for read in old], [source.name for source in sources]
    if before != names:
        odd = sorted(set(before) ^ set(names)) or ["(the order of the files)"]
        raise UserError(f"the corpus changed since the plan was made: {odd[0]} came, went or moved: {mend}.")
    reads = [_Read(source, read.rows, read.check) for source, read in zip(sources, old, strict=True)]
    for read, was in zip(reads, old, strict=True):
        source = read.source
        same = (source.size, source.format) == (was.source.size, was.source.format)
        known = (source.stamp, source.file) == (was.source.stamp, was.source.file)
        if not same or (not known and _check(corpus, read) != read.check):
            raise UserError(f"{source.file} changed since the plan was made: {mend}.")
    return reads


def _check(corpus: spec.Corpus, read: _Read) -> str:
    """The content check of a source as it is now, over as many rows as were read."""
    if read.source.size == 0:
        return ""
    if read.source.format == "parquet":
        return parquet.read_footer(read.source.file, read.source.size).check
    digest = convert.Digest()
    for row in _rows(corpus, read.source, convert.Picker(corpus), read.rows):
        digest.add(row)
    return digest.hex()
