"""Build locks in torch's extensions folder: one whose builder was killed would be waited on for ever.

DeepSpeed compiles its operations there at first use. None of ours is (`deepspeed_stepper.import_deepspeed`), but
a `retrain.deepspeed` block can ask for one. torch's builder keeps the lock file open until it is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "beegfs", "fuse")
"""File systems that a builder on another machine may use too."""

SHARED_SECONDS = 3600.0
"""Age at which a lock on such a file system counts as left behind."""


def dead_locks() -> list[Path]:
    """The locks that no living process holds."""
    return [path for path in _locks() if _dead(path)]


def clear_dead_locks() -> list[str]:
    """Remove the locks that no living process holds; their paths. For one process of a machine."""
    locks = dead_locks()
    for path in locks:
        path.unlink(missing_ok=True)
    return [str(path) for path in locks]


def _locks() -> Iterator[Path]:
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own) if own else Path.home() / ".cache/torch_extensions"
    yield from root.glob("*/lock")  # <operation>/lock
    yield from root.glob("*/*/lock")  # by default below py311_cu128 and the like


def _dead(path: Path) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if _held(status):
        return False
    age = time.time() - status.st_mtime
    return age > SHARED_SECONDS or not _shared(path)


def _held(file: os.stat_result) -> bool:
    """Whether a process of this machine has the file open."""
    for process in psutil.process_iter():
        folder = f"/proc/{process.pid}/fd"
        try:
            for name in os.listdir(folder):
                found = os.stat(f"{folder}/{name}")
                if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
                    return True
        except OSError:
            continue  # gone, or somebody else's
    return False


def _shared(path: Path) -> bool:
    """Whether the file lies on a file system that other machines may have mounted."""
    real = os.path.realpath(path)
    mounts = [p for p in psutil.disk_partitions(all=True) if real.startswith(p.mountpoint.rstrip("/") + "/")]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype.startswith(SHARED)
