"""The run directory's lock: the second driver is refused by the first one's name, a dead one's lock is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError

from engine.errors import UserError
from engine.lock import LOCK, RunLock
from engine.storage import Folder

HOLD = """
    import sys, time
    from engine.lock import RunLock
    from engine.storage import Folder
    with RunLock(Folder(sys.argv[1]), beat=float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold the lock of tmp_path/run."""
    started: list[subprocess.Popen[str]] = []

    def start(beat: float = 10.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "run"), str(beat)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    found = Folder(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")
    yield found
    found.remove("")


def put_elsewhere(folder: Folder, beats: int = 3) -> None:
    """The lock of a driver on another host."""
    record = {"owner": "other", "host": "elsewhere", "pid": 7, "started": 1.0, "processes": "another boot"}
    folder.write_json(LOCK, {**record, "since": "2026-01-01 00:00:00+00:00", "beats": beats})


def test_the_second_driver_is_refused_by_host_process_and_start_of_the_first(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    first = holder()
    since = json.loads((tmp_path / "run" / LOCK).read_text())["since"]
    began = time.monotonic()
    with pytest.raises(UserError) as caught, RunLock(Folder(str(tmp_path / "run"))):
        pass
    assert time.monotonic() - began < 1
    assert f"host {socket.gethostname()}, process {first.pid}, since {since}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_lock_of_a_killed_driver_on_this_host_is_taken_over_at_once(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    first = holder()
    first.send_signal(signal.SIGKILL)
    first.wait()
    said: list[str] = []
    began = time.monotonic()
    with RunLock(Folder(str(tmp_path / "run")), said.append):
        assert time.monotonic() - began < 1
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert f"process {first.pid}" in said[0]


def test_a_process_with_the_number_of_a_dead_driver_is_not_taken_for_it(folder: Folder) -> None:
    with RunLock(folder):
        record = folder.read_json(LOCK)
    folder.write_json(LOCK, {**record, "started": record["started"] - 5})  # this process's number, and older
    with RunLock(folder):
        assert folder.read_json(LOCK)["started"] == record["started"]


def test_a_silent_lock_of_another_host_is_taken_over_after_the_stated_time_and_not_before(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.lock.SETTLE", 0.05)
    put_elsewhere(folder)
    said: list[str] = []
    began = time.monotonic()
    with RunLock(folder, said.append, beat=0.1, stale=0.6):
        assert 0.6 <= time.monotonic() - began < 2
    assert "elsewhere" in said[0]


def test_a_sign_of_life_from_another_host_is_enough_to_be_refused(folder: Folder) -> None:
    put_elsewhere(folder)
    timer = threading.Timer(0.3, put_elsewhere, (folder, 4))
    timer.start()
    began = time.monotonic()
    with pytest.raises(UserError, match="host elsewhere, process 7"), RunLock(folder, beat=0.1, stale=30):
        pass
    assert time.monotonic() - began < 5
    timer.join()
    assert folder.read_json(LOCK)["host"] == "elsewhere"


def test_the_owner_gives_signs_of_life_and_leaves_nothing(folder: Folder) -> None:
    with RunLock(folder, beat=0.05):
        deadline = time.monotonic() + 10
        while folder.read_json(LOCK)["beats"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with RunLock(folder):  # again, in the same process
            pass
        assert folder.exists(LOCK)
    assert not folder.exists(LOCK)
    assert not folder.names()


def test_a_folder_that_was_there_stays_and_what_was_written_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with RunLock(Folder(str(tmp_path / "there"))):
        pass
    assert not list((tmp_path / "there").iterdir())
    with RunLock(Folder(str(tmp_path / "new"))) as _:
        (tmp_path / "new" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(ValueError, match="mistake"), RunLock(Folder(str(tmp_path / "gone"))):
        raise ValueError("mistake")
    assert not (tmp_path / "gone").exists()


def test_a_driver_that_slept_through_a_take_over_is_told_and_leaves_the_lock_alone(folder: Folder) -> None:
    told = threading.Event()
    with RunLock(folder, lost=told.set, beat=0.05):
        put_elsewhere(folder)
        assert told.wait(10)
    assert folder.read_json(LOCK)["host"] == "elsewhere"


def test_a_lock_removed_by_hand_is_put_back(folder: Folder) -> None:
    with RunLock(folder, beat=0.05):
        folder.remove(LOCK)
        deadline = time.monotonic() + 10
        while not folder.exists(LOCK):
            assert time.monotonic() < deadline
            time.sleep(0.01)


FAILURES = [OSError("the connection was reset"), ConnectionClosedError(endpoint_url="http://s3")]


@pytest.mark.parametrize("error", FAILURES, ids=["the system's", "a client's"])
def test_storage_that_fails_for_some_beats_takes_the_lock_from_nobody(
    folder: Folder, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, failed, real = threading.Event(), [], folder.read_json

    def failing(name: str) -> object:
        if len(failed) < 3:
            failed.append(name)
            raise error
        return real(name)

    with RunLock(folder, lost=lost.set, beat=0.05):
        monkeypatch.setattr(folder, "read_json", failing)
        deadline = time.monotonic() + 10
        while len(failed) < 3 or real(LOCK)["beats"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lost.is_set()
    assert not folder.exists(LOCK)


@pytest.mark.parametrize("error", FAILURES, ids=["the system's", "a client's"])
def test_storage_that_fails_while_a_lock_is_watched_says_nothing_of_its_owner(
    folder: Folder, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_elsewhere(folder)
    calls, real = [], folder.read_json

    def failing(name: str) -> object:
        calls.append(name)
        if 2 <= len(calls) <= 4:
            raise error
        return real(name)

    monkeypatch.setattr(folder, "read_json", failing)
    timer = threading.Timer(0.4, put_elsewhere, (folder, 4))
    timer.start()
    with pytest.raises(UserError, match="host elsewhere, process 7"), RunLock(folder, beat=0.1, stale=30):
        pass
    timer.join()
    assert len(calls) > 4


def test_storage_that_fails_at_the_release_hides_no_other_error(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(name: str) -> object:
        raise FAILURES[1]

    def work() -> None:
        with RunLock(folder):
            monkeypatch.setattr(folder, "read_json", failing)
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        work()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff\xfe"])
def test_a_damaged_lock_is_watched_and_taken_over(tmp_path: Path, content: bytes) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes(LOCK, content)
    with RunLock(folder, beat=0.05, stale=0.2):
        assert folder.read_json(LOCK)["pid"] == os.getpid()


def _contend(path: str, barrier: Any, results: Any, over: Any) -> None:
    barrier.wait()
    try:
        with RunLock(Folder(path)):
            results.put("held")
            over.wait(60)
    except UserError:
        results.put("refused")


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_come_at_once_one_gets_the_lock(tmp_path: Path, dead: bool) -> None:
    path = str(tmp_path / "run")
    if dead:
        with RunLock(Folder(path)):
            record = Folder(path).read_json(LOCK)
        Folder(path).write_json(LOCK, {**record, "pid": 2**22 + 1})
    context = multiprocessing.get_context("fork")
    barrier, results, over = context.Barrier(8), context.Queue(), context.Event()
    processes = [context.Process(target=_contend, args=(path, barrier, results, over)) for _ in range(8)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    over.set()
    for process in processes:
        process.join(60)
    assert sorted(outcomes) == ["held"] + ["refused"] * 7
    assert not (tmp_path / "run" / LOCK).exists()
