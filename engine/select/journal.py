"""A selection's journal: picks kept in small durable steps, so that a killed selection goes on."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.select.objective import Ints
from engine.storage import Folder

HEADER = "journal.json"
_EVERY_PICKS, _EVERY_SECONDS = 64, 1.0


def digest(array: npt.NDArray[Any] | None) -> str | None:
    """A short content hash for a journal's inputs."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


class Journal:
    """Appends picks to a folder on any URI; each step is one file, written atomically.

    A step holds the picks since the step before. What is lost by a kill is at most the last second of picks,
    and those come out the same again, for each pick depends on the picks before it alone.

    Args:
        inputs: JSON-able; all that the picks depend on.

    Raises:
        UserError: the folder holds a journal of other inputs.
    """

    def __init__(self, folder: Folder, inputs: dict[str, Any]) -> None:
        self._folder = folder
        if folder.exists(HEADER):
            before = folder.read_json(HEADER)
            for field in sorted(before.keys() | inputs.keys()):
                if before.get(field) != inputs.get(field):
                    raise UserError(
                        f"{folder.path('')} is the journal of a selection with {field} = {before.get(field)}"
                        f", and this one has {inputs.get(field)}: remove that folder to start over."
                    )
        else:
            folder.write_json(HEADER, inputs)
        self._steps = [
            self._step(name) for name in folder.names() if name[0].isdigit() and name.endswith(".json")
        ]
        self.restored = [pick for step in self._steps for pick in step]
        self._written, self._pending = len(self.restored), list[dict[str, Any]]()
        self._last = time.monotonic()

    @property
    def rows(self) -> Ints:
        """Rows picked before this process, in pick order."""
        return np.array([pick["row"] for pick in self.restored], np.int64)

    def append(self, pick: dict[str, Any]) -> None:
        """Keep one pick (JSON-able, with its `row`); on disk within a second or 64 picks."""
        self._pending.append(pick)
        if len(self._pending) >= _EVERY_PICKS or time.monotonic() - self._last >= _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put what is pending on disk."""
        if self._pending:
            self._folder.write_json(f"{self._written:010d}.json", self._pending)
            self._written += len(self._pending)
            self._pending = []
        self._last = time.monotonic()

    def _step(self, name: str) -> list[dict[str, Any]]:
        return list(self._folder.read_json(name))
