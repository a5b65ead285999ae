"""The lock of a run directory: one driver at a time, and a dead one's lock is taken over after a stated time.

The lock is a small JSON file that its owner rewrites every BEAT seconds. A second driver on the same host knows
whether the owner lives by its process; on another host it watches: a new beat means alive, none for STALE
seconds means dead. It measures on its own clock, so that hosts' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Self

import psutil

from engine.errors import UserError
from engine.storage import Folder, storage_errors

LOCK = "lock.json"
BEAT = 10.0
"""Seconds between signs of life."""
STALE = 60.0
"""Seconds without a sign of life after which a lock of another host counts as a dead driver's."""
SETTLE = 2.0
"""Seconds after which a lock taken over on an object store is read back: the last of several takers has it."""

Record = dict[str, Any]

_held: dict[str, RunLock] = {}  # by URI: a process may lock a folder again inside the lock


class RunLock:
    """Holds a folder for the length of a block; reentrant within a process.

    Args:
        folder: the run directory; made if need be, and removed again if nothing was put into it.
        say: called with a sentence when there is something to wait for, or a lock was taken over.
        lost: called, from a thread, when another driver has taken the lock from this one, which then must
            stop. (It can happen to a process that was suspended for longer than `stale`.)

    Raises:
        UserError: another driver has the folder; the message names its host, process and start.
    """

    def __init__(
        self,
        folder: Folder,
        say: Callable[[str], None] = lambda _: None,
        lost: Callable[[], None] = lambda: None,
        beat: float = BEAT,
        stale: float = STALE,
    ) -> None:
        self._folder, self._say, self._lost, self._beat, self._stale = folder, say, lost, beat, stale
        self._record: Record = {}
        self._depth = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._made = False

    def __enter__(self) -> Self:
        outer = _held.setdefault(self._folder.uri, self)
        if outer._depth == 0:
            try:
                outer._acquire()
            except BaseException:
                _held.pop(self._folder.uri, None)
                raise
        outer._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        outer = _held[self._folder.uri]
        outer._depth -= 1
        if outer._depth == 0:
            del _held[self._folder.uri]
            outer._release()

    def _acquire(self) -> None:
        self._made = not self._folder.exists("")
        self._folder.make()
        self._record = _myself()
        if not self._folder.create_json(LOCK, self._record):
            self._contend()
        self._stop.clear()
        self._thread = threading.Thread(target=self._keep, name="unbake-lock", daemon=True)
        self._thread.start()

    def _contend(self) -> None:
        """Take a dead driver's lock, or refuse to go on."""
        first = _read(self._folder)
        alive = None if first is None else _alive(first)
        if alive or (alive is None and first is not None and self._watched(first)):
            raise UserError(
                f"{self._folder.uri} is in use by another unbake: {_name(first or {})}. Stop that one, or wait "
                f"for its end; when it has died, its lock is taken over, on another host {self._stale:.0f} s "
                "after its last sign of life."
            )
        if not _take_over(self._folder, first, self._record):
            self._contend()  # another was faster
        elif first is not None:
            self._say(f"the lock of a driver that has died was taken over: {_name(first)}")

    def _watched(self, first: Record) -> bool:
        """Whether the owner of another host gives a sign of life."""
        self._say(
            f"{self._folder.uri} is locked by {_name(first)}; waiting up to {self._stale:.0f} s for a sign of life"
        )
        began = time.monotonic()
        while time.monotonic() - began < self._stale:
            time.sleep(min(1.0, self._beat / 2))
            try:
                now = _read(self._folder)
            except storage_errors():
                continue  # which says nothing of the owner
            if now is None:
                return False
            if now != first:
                return True
        return False

    def _keep(self) -> None:
        """Give signs of life until stopped; when the lock is another's, say so once."""
        while not self._stop.wait(self._beat):
            ours = True
            with contextlib.suppress(UserError, *storage_errors()):  # it may not fail at the next beat
                ours = self._renewed()
            if not ours:
                self._lost()
                return

    def _renewed(self) -> bool:
        """Give one sign of life; False when the lock is another's."""
        now = _read(self._folder)
        if now is None:  # somebody removed the file
            return self._folder.create_json(LOCK, self._record)
        if now and now.get("owner") != self._record["owner"]:
            return False
        self._record["beats"] += 1
        self._folder.write_json(LOCK, self._record)
        return True

    def _release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(UserError, *storage_errors()):  # a lock that stays is a dead driver's
            now = _read(self._folder)
            if now is not None and now.get("owner") == self._record["owner"]:
                self._folder.remove(LOCK)
            if self._made and not self._folder.names():
                self._folder.remove("")


def owner(folder: Folder) -> str | None:
    """Who drives a run now, in words; None when nobody does, as far as can be told without waiting."""
    record = _read(folder)
    return None if not record or _alive(record) is False else _name(record)


def _myself() -> Record:
    process = psutil.Process()
    return {
        "owner": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "processes": _process_space(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds"),
        "beats": 0,
    }


def _process_space() -> str:
    """What process numbers mean here: this boot of this host, and this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _alive(record: Record) -> bool | None:
    """Whether the owner lives; None when its processes cannot be seen from here."""
    if record.get("processes") != _process_space():
        return None
    try:
        return bool(psutil.Process(record["pid"]).create_time() == record["started"])
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _name(record: Record) -> str:
    return f"host {record.get('host')}, process {record.get('pid')}, since {record.get('since')}"


def _read(folder: Folder, name: str = LOCK) -> Record | None:
    """The lock as it is; None when there is none, {} when it is damaged: nobody's that is known.

    Raises:
        UserError, or one of `storage_errors`: the storage fails.
    """
    try:
        return dict(folder.read_json(name))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}


def _take_over(folder: Folder, dead: Record | None, record: Record) -> bool:
    """Replace a dead driver's lock (None: it has gone); False when another driver was faster."""
    if dead is None:
        return folder.create_json(LOCK, record)
    if folder.local:
        aside = folder.path(f".{LOCK}.{record['owner']}.dead")
        try:
            os.rename(folder.path(LOCK), aside)  # of several, one succeeds
        except FileNotFoundError:
            return False
        try:
            if _read(folder, os.path.basename(aside)) != dead:  # a new owner's, put it back
                with contextlib.suppress(FileExistsError):
                    os.link(aside, folder.path(LOCK))
                return False
            return folder.create_json(LOCK, record)
        finally:
            os.unlink(aside)
    if _read(folder) != dead:
        return False
    folder.write_json(LOCK, record)
    time.sleep(SETTLE)
    return _read(folder) == record
