"""Sources: which files a list of paths, folders and globs stands for, in which order and in which state."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from engine.errors import UserError

EXTENSIONS = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "txt": "txt",
}
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
_KNOWN = "parquet, jsonl, csv or txt, the last three also with .gz or .zst"
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Source:
    """One file, or one Hub data set (format "hub").

    name: relative to the entry it was found through, so that it survives a move of the corpus; file: absolute
    path or URI; size: bytes, -1 when unknown; stamp: etag or modification time, "" when there is none.
    """

    name: str
    file: str
    format: str
    size: int
    stamp: str


def split_extension(path: str) -> tuple[str | None, str | None]:
    """(format, compression) that a file name stands for; None for unknown or none."""
    parts = path.rsplit("/", 1)[-1].lower().split(".")
    compression = COMPRESSIONS.get(parts.pop()) if parts[-1] in COMPRESSIONS else None
    kind = EXTENSIONS.get(parts[-1]) if len(parts) > 1 else None
    return (None if compression and kind == "parquet" else kind), compression


def list_sources(paths: Iterable[str], kind: str, field: str) -> list[Source]:
    """The files behind `paths`: entries in the given order, files of a folder or glob sorted, none twice.

    Folders are walked recursively; names that begin with a dot or an underscore are skipped there, and so are
    files of unknown extension unless `kind` says what they are.

    Args:
        paths: files, folders or globs on any fsspec URI.
        kind: "auto" (by extension) or the format of every file.
        field: spec field the paths come from, for messages.

    Raises:
        UserError: an entry matches nothing or cannot be read, or a file's format is unknown.
    """
    found: dict[str, Source] = {}
    for entry in paths:
        for source in _expand(entry, kind, field):
            found.setdefault(source.file, source)
    return list(found.values())


def open_source(source: Source) -> Any:
    """The source's bytes as a binary file object; OSError when it cannot be opened."""
    return fsspec.open(source.file, "rb").open()


def cause(error: Exception) -> str:
    """What an exception says, on one line, without errno or a closing full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")[:200]


def _expand(entry: str, kind: str, field: str) -> list[Source]:
    try:
        fs, path = fsspec.core.url_to_fs(entry)
        infos, base, explicit = _matches(fs, path)
    except Exception as error:  # file systems raise types of their own (botocore, aiohttp, google.auth)
        raise UserError(f"cannot read {entry} ({field}): {cause(error)}.") from None
    if not infos:
        raise UserError(f"no file matches {entry}: mend {field}.")
    sources = []
    for path in sorted(infos):
        guess, _ = split_extension(path)
        if kind == "auto" and guess is None:
            if not explicit:
                continue
            raise UserError(f"{path} has an unknown extension (known: {_KNOWN}): set the format ({field}).")
        if kind != "auto" and not explicit and guess not in (None, kind):
            continue
        sources.append(_source(fs, path, base, infos[path], guess if kind == "auto" else kind))
    if not sources:
        raise UserError(
            f"{entry} holds no file of a known format ({_KNOWN}): mend {field}, or set the format."
        )
    return sources


def _matches(fs: Any, path: str) -> tuple[dict[str, Any], str, bool]:
    """Files as {path: info}, the folder their names are relative to, and whether they were named outright."""
    if fs.isfile(path):
        return {path: fs.info(path)}, path.rsplit("/", 1)[0], True
    if fs.isdir(path):
        return dict(_below(fs, path)), path.rstrip("/"), False
    if not any(character in path for character in "*?["):
        return {}, path, True
    files: dict[str, Any] = {}
    for name, info in fs.glob(path, detail=True).items():
        files.update(_below(fs, name) if info["type"] == "directory" else [(name, info)])
    fixed = min(path.find(character) for character in "*?[" if character in path)
    return files, path[:fixed].rsplit("/", 1)[0], True


def _below(fs: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """(path, info) of every file in a folder and those below it that is not hidden."""
    prefix = folder.rstrip("/") + "/"
    found = _walk_local(fs, folder) if _is_local(fs) else fs.find(folder, detail=True).items()
    for path, info in found:
        if not any(part[:1] in "._" for part in path.removeprefix(prefix).split("/")):
            yield path, info


def _walk_local(fs: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """As `find`; but that leaves out folders it may not read, and walks a link to a parent many times."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders.sort()
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for path in (os.path.join(parent, name) for name in names):
            if os.path.isfile(path):  # a named pipe would be waited on for ever
                yield path, fs.info(path)


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _source(fs: Any, path: str, base: str, info: dict[str, Any], kind: str | None) -> Source:
    file = os.path.abspath(path) if _is_local(fs) else fs.unstrip_protocol(path)
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key) is not None), "")
    size = info.get("size")
    assert kind is not None
    return Source(
        path.removeprefix(base).lstrip("/"), str(file), kind, -1 if size is None else int(size), stamp
    )
