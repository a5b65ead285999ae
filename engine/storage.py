"""Files on any fsspec URI, written atomically: a reader sees the old bytes, the new bytes, or no file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import StorageError, UserError, first_line

GROUP_ROWS = 4096
"""Rows of a row group: what a reader of a part of a table has to take in."""

TRIES, BACK_OFF = 4, 0.5
"""Tries of an upload; seconds before the second, doubled each time, and up to as much again by chance."""

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Storage that is full or closed to us: not a fault of the program, and no second try mends it."""

T = TypeVar("T")

_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients of object stores raise when they have given up, mostly no OSError.

    Nothing is imported for it: a client that is not loaded has not raised.
    """
    loaded = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


def storage_errors() -> tuple[type[Exception], ...]:
    """The exceptions of storage that fails, for an `except` clause."""
    return (OSError, *client_errors())


def failed(doing: str, error: Exception) -> UserError:
    """What could not be done and why, of one of `storage_errors`: a StorageError where another try may do it."""
    lasts = isinstance(error, PermissionError | FileNotFoundError) or getattr(error, "errno", None) in LASTING
    return (UserError if lasts else StorageError)(f"{doing}: {reason(error)}.")


def again(work: Callable[[], T], tries: int = TRIES) -> T:
    """The work's result; where storage fails it is done again, after growing pauses, and at last a UserError."""
    for last in range(1, tries + 1):
        try:
            return work()
        except Exception as error:  # of modules that the work itself may have loaded
            outage = isinstance(error, StorageError)
            if not (outage or isinstance(error, storage_errors())) or (outage and last == tries):
                raise
            if last == tries:
                raise UserError(f"storage failed {tries} times: {first_line(error)}.") from None
            time.sleep(BACK_OFF * 2 ** (last - 1) * (1 + random.random()))
    raise AssertionError("tries is at least 1")


class Folder:
    """A folder named by a path or an fsspec URI (``runs/x``, ``s3://bucket/x``)."""

    def __init__(self, uri: str) -> None:
        """Args: uri: path or URI; local paths are made absolute, so workers on this host can share them."""
        try:
            # A listing that is kept would not show what other processes have written since.
            self.fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {uri}: {error}.") from None
        self.local: bool = "file" in _protocols(self.fs)
        self.root: str = os.path.abspath(path) if self.local else path.rstrip("/")
        self.uri: str = self.root if self.local else uri.rstrip("/")

    def path(self, name: str) -> str:
        """Path of `name` as the underlying file system spells it; UserError for a name that leads elsewhere.

        Names come from records and manifests too, and a run directory may be somebody else's.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(
                f"{self.root} names the file {name!r}, which lies outside of it: it is not touched."
            )
        return f"{self.root}/{name}" if name else self.root

    def sub(self, name: str) -> Folder:
        """The folder `name` inside this one."""
        return Folder(f"{self.uri}/{name}")

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name exists."""
        return bool(self.fs.exists(self.path(name)))

    def make(self, name: str = "") -> str:
        """Create a folder (a no-op on object stores) and return its path; UserError when not permitted."""
        try:
            self.fs.makedirs(self.path(name), exist_ok=True)
        except storage_errors() as error:
            raise failed(f"cannot create {self.path(name)}", error) from None
        return self.path(name)

    def names(self, name: str = "") -> list[str]:
        """Sorted names directly inside the folder `name`; empty when it does not exist."""
        try:
            found = self.fs.ls(self.path(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def remove(self, name: str) -> None:
        """Remove a file or folder if it is there."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)

    def read_bytes(self, name: str) -> bytes:
        """The whole file; FileNotFoundError when it is not there, UserError when it may not be read."""
        path = self.path(name)
        with _permitted(path):
            return bytes(self.fs.cat_file(path))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole file atomically; UserError for no space or no permission, StorageError for an outage."""
        path = self.path(name)
        try:
            if self.local:
                _write_local(path, data)
            else:
                self.fs.pipe_file(path, data)
        except storage_errors() as error:
            raise failed(f"cannot write {path}", error) from None

    def upload(self, path: str, name: str) -> None:
        """Copy a local file to `name`, with more than one try; UserError when none succeeds."""
        again(lambda: self._upload(path, self.path(name)))

    def _upload(self, path: str, goal: str) -> None:
        try:
            self.fs.put_file(path, goal)
        except storage_errors() as error:
            raise failed(f"cannot write {goal}", error) from None

    def digest(self, name: str) -> str:
        """sha256 (hex) of a file; errors as those of `read_bytes`."""
        path = self.path(name)
        with _permitted(path), self.fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def sync(self, names: list[str]) -> None:
        """Bring files that others wrote to the disk, where there is one; an object store has done so already."""
        if self.local:
            for name in names:
                handle = os.open(self.path(name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def read_json(self, name: str) -> Any:
        """Parse a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON atomically, keys sorted so that equal values give equal bytes."""
        self.write_bytes(name, _json_bytes(value))

    def create_json(self, name: str, value: Any) -> bool:
        """Write JSON unless the file is there; whether it was written.

        Of several writers one succeeds, on a local disk and on stores with conditional writes (S3, GCS).
        """
        path, data = self.path(name), _json_bytes(value)
        try:
            if self.local:
                _create_local(path, data)
            else:
                self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except storage_errors() as error:
            if not self.local and self.exists(name):  # a store's own words for "it is there"
                return False
            raise failed(f"cannot write {path}", error) from None
        return True

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file."""
        return pq.read_table(self.path(name), columns=columns, filesystem=self.fs)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file atomically; equal tables give equal bytes."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS)
        self.write_bytes(name, sink.getvalue())

    def walk(self, name: str = "") -> Iterator[str]:
        """Paths, relative to this folder and sorted, of all files below `name`."""
        prefix = self.path("") + "/"
        for path in sorted(self.fs.find(self.path(name))):
            yield path.removeprefix(prefix)


@contextlib.contextmanager
def _permitted(path: str) -> Iterator[None]:
    """Permission that lacks in the block, as a sentence that says to what."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {reason(error)}.") from None


def is_outage(error: BaseException) -> bool:
    """Whether the storage failed, as against bytes that are wrong or a file that is not there.

    Arrow and others report what they cannot decode as a bare OSError; the system's have an errno, or a type. A seek
    to where a file cut short has nothing is "invalid argument", and no outage.
    """
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    if not isinstance(error, storage_errors()):
        return False
    return type(error) is not OSError or error.errno not in (None, errno.EINVAL)


def reason(error: Exception) -> str:
    """The cause of one of `storage_errors` in a few words, without errno or path."""
    return (getattr(error, "strerror", None) or str(error).rstrip(".")).lower()


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _create_local(path: str, data: bytes) -> None:
    """Write a file that is not there, whole from its first moment; FileExistsError when it is there."""
    whole = f"{path}.{uuid.uuid4().hex}"
    _write_local(whole, data)
    try:
        os.link(whole, path)
    finally:
        os.unlink(whole)


def _write_local(path: str, data: bytes) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
