"""Build locks: one left behind by a dead builder is cleared, a living builder's is not, and training waits for none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from cluster import extension_locks
from cluster.extension_locks import clear_dead_locks

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_a_builders_lock_is_kept_while_it_lives_and_cleared_after_its_death(extensions: Path) -> None:
    """The builder is torch's own lock in another process, killed as a lost worker is."""
    lock = extensions / "deepspeed_shm_comm/lock"
    lock.parent.mkdir()
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "building\n"
        assert clear_dead_locks() == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert not FileBaton(str(lock)).try_acquire(), "the next builder would wait for ever"
    assert clear_dead_locks() == [str(lock)]
    assert FileBaton(str(lock)).try_acquire()


def test_on_storage_that_machines_share_only_an_old_lock_counts_as_left_behind(
    extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension_locks, "_shared", lambda path: True)
    lock = extensions / "py311_cu128/fused_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert clear_dead_locks() == []
    os.utime(lock, (time.time() - 7200,) * 2)
    assert clear_dead_locks() == [str(lock)]
