"""Folders: the same on local paths and object stores; a write is seen whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from engine.errors import UserError
from engine.storage import Folder


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    name = uuid.uuid4().hex
    uri = {
        "local": str(tmp_path / name),
        "file": f"file://{tmp_path}/{name}",
        "memory": f"memory://{name}/run",
    }
    found = Folder(uri[request.param])
    yield found
    found.remove("")


def test_bytes_json_and_tables_come_back(folder: Folder) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    folder.write_bytes("a/b.bin", b"\0\1")
    folder.write_json("c.json", {"z": 1, "a": ["é"]})
    folder.write_table("t.parquet", table)
    assert folder.read_bytes("a/b.bin") == b"\0\1"
    assert folder.read_json("c.json") == {"z": 1, "a": ["é"]}
    assert folder.read_table("t.parquet") == table
    assert folder.read_table("t.parquet", ["b"]).column_names == ["b"]
    assert list(folder.walk()) == ["a/b.bin", "c.json", "t.parquet"]
    assert folder.names() == ["a", "c.json", "t.parquet"]
    assert folder.sub("a").read_bytes("b.bin") == b"\0\1"


def test_absent_names_are_absent(folder: Folder) -> None:
    assert not folder.exists("a")
    assert folder.names("a") == []
    folder.remove("a")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a")


def test_removing_takes_files_and_folders(folder: Folder) -> None:
    folder.write_bytes("a/b/c", b"1")
    folder.write_bytes("d", b"1")
    folder.remove("a")
    folder.remove("d")
    assert not folder.exists("a/b/c")
    assert folder.names() == []


def test_equal_values_give_equal_bytes(folder: Folder) -> None:
    folder.write_json("a", {"x": 1, "y": 2})
    folder.write_json("b", {"y": 2, "x": 1})
    folder.write_table("c", pa.table({"n": [1]}))
    folder.write_table("d", pa.table({"n": [1]}))
    assert folder.read_bytes("a") == folder.read_bytes("b")
    assert folder.read_bytes("c") == folder.read_bytes("d")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    sizes, stop = {1 << 16, 1 << 20}, threading.Event()
    folder.write_bytes("x", b"a" * (1 << 16))

    def write() -> None:
        while not stop.is_set():
            for size in sizes:
                folder.write_bytes("x", b"a" * size)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {len(folder.read_bytes("x")) for _ in range(300)} <= sizes
    finally:
        stop.set()
        writer.join()


def test_a_full_disk_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from engine.storage import Folder
from engine.errors import UserError
folder = Folder({str(tmp_path)!r})
folder.write_bytes("x", b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    folder.write_bytes("x", b"n" * 2000)
except UserError as error:
    print(error)
"""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot write" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_without_permission_the_old_file_stays_and_with_it_again_writing_goes_on(unprivileged: Path) -> None:
    folder = Folder(str(unprivileged))
    folder.write_bytes("in/x", b"old")
    (unprivileged / "in").chmod(0o500)
    for act in (
        lambda: folder.write_bytes("in/x", b"new"),
        lambda: folder.create_json("in/y", {}),
        lambda: folder.make("in/z"),
    ):
        with pytest.raises(UserError, match=r"cannot (write|create) .*/in/\w: permission denied\.$"):
            act()
    assert folder.read_bytes("in/x") == b"old"
    assert folder.names("in") == ["x"]
    (unprivileged / "in").chmod(0o700)
    folder.write_bytes("in/x", b"new")
    assert folder.read_bytes("in/x") == b"new"


def test_a_path_below_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = Folder(str(tmp_path / "file" / "run"))
    assert folder.names() == []
    for act in (folder.make, lambda: folder.write_bytes("x", b"")):
        with pytest.raises(UserError, match=r"cannot (create|write) .*/file/run"):
            act()


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="nope://x"):
        Folder("nope://x")
