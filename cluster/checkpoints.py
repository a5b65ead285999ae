"""Checkpoints of one training on any URI: all workers write their parts, a record written last makes it count.

`<folder>/<step>/` holds the files, `<folder>/<step>.json` the record with the size of each file. What has no
record, or files of other sizes, is no checkpoint: a worker may die at any moment. Every worker has to call
every function here, in turn; torch.distributed must be initialised.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from cluster.agreement import agree, from_first
from engine.errors import UserError
from engine.storage import Folder, failed, storage_errors


class Checkpoints:
    """The checkpoints in a folder of their own.

    Args:
        uri: folder, on storage that all workers see.
        keep: the last so many are kept.
        local_rank: number of this worker on its node.
    """

    def __init__(self, uri: str, keep: int, local_rank: int) -> None:
        self.folder, self.keep = Folder(uri), keep
        self.first, self.first_on_node = dist.get_rank() == 0, local_rank == 0

    def save(self, step: int, record: dict[str, Any], write: Callable[[str], None]) -> None:
        """Make a checkpoint, and remove those that are no longer kept.

        Args:
            write: writes this worker's files into a local folder.

        Raises:
            UserError: no space, no permission, or storage that not all workers see.
        """
        name = f"{step:09d}"
        with agree():
            if self.first:
                self.folder.remove(name)
                self.folder.make(name)
        with agree():
            if self.folder.local and not os.path.isdir(self.folder.path(name)):
                raise UserError(f"{self.folder.uri} is not seen by all nodes: use storage that they share.")
        with agree():
            try:
                self._write(name, write)
            except storage_errors() as error:
                raise failed(f"cannot write a checkpoint to {self.folder.uri}", error) from None
        with agree():
            if self.first:
                self.folder.write_json(f"{name}.json", {**record, "files": self._sizes(name)})
                for old in self._steps()[: -self.keep]:
                    self._remove(old)

    def last(self) -> dict[str, Any] | None:
        """The record of the last whole checkpoint, with its `name`; None when there is none."""

        def find() -> dict[str, Any] | None:
            for name in reversed(self._steps()):
                record = dict(self.folder.read_json(f"{name}.json"))
                if record["files"] == self._sizes(name):
                    return {**record, "name": name}
            return None

        return from_first(find)

    @contextmanager
    def opened(self, name: str) -> Iterator[str]:
        """A local folder with all files of a checkpoint: where it is, or one download for each node."""
        if self.folder.local:
            yield self.folder.path(name)
            return
        with self.shared_on_node() as scratch:
            if self.first_on_node:
                self.folder.fs.get(self.folder.path(name) + "/", scratch + "/", recursive=True)
            dist.barrier()
            yield scratch

    @contextmanager
    def shared_on_node(self) -> Iterator[str]:
        """An empty local folder that the workers of a node share; removed at the end."""
        mine = tempfile.mkdtemp(prefix="unbake-") if self.first_on_node else ""
        found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
        dist.all_gather_object(found, (os.uname().nodename, mine))
        try:
            yield next(path for node, path in found if path and node == os.uname().nodename)
            dist.barrier()  # nobody reads on; after an exception nobody else may come to it
        finally:
            if mine:
                shutil.rmtree(mine, ignore_errors=True)

    def discard(self) -> None:
        """Remove them all; for the first worker alone."""
        for name in self._steps():
            self._remove(name)
        self.folder.remove("")

    def _write(self, name: str, write: Callable[[str], None]) -> None:
        if self.folder.local:
            write(self.folder.path(name))
            return
        scratch = tempfile.mkdtemp(prefix="unbake-")
        try:
            write(scratch)
            for file in Folder(scratch).walk():
                self.folder.upload(f"{scratch}/{file}", f"{name}/{file}")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _sizes(self, name: str) -> dict[str, int]:
        self.folder.fs.invalidate_cache()
        return {file: int(self.folder.fs.size(self.folder.path(file))) for file in self.folder.walk(name)}

    def _steps(self) -> list[str]:
        """Names of recorded checkpoints, oldest first."""
        self.folder.fs.invalidate_cache()
        return [name.removesuffix(".json") for name in self.folder.names() if name.endswith(".json")]

    def _remove(self, name: str) -> None:
        self.folder.remove(f"{name}.json")  # first, so that what is half removed no longer counts
        self.folder.remove(name)
