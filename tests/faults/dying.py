"""Workers that die by plan; the classes stand in for those of `cluster.extract`, in the worker's process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import cluster.extract

FILES = 11
"""Files of a partition at two checkpoints: two shards, eight columns and, last, the completion record."""


def die() -> None:
    """As kill -9 from outside: nothing is flushed, closed or said."""
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAtEachFile(cluster.extract.WritePartition):
    """Partition p dies once, when it has written its n-th file beside its place and before it gets its name."""

    points: ClassVar[dict[int, int]] = {p: p for p in range(FILES)}

    def _write(self, row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        partition = int(row["partition"])
        marker = Path(f"{self.job.run_uri}-died-{partition}")
        if partition not in self.points or marker.exists():
            return super()._write(row, about)
        left, real = self.points[partition], os.replace

        def replace(*arguments: Any, **options: Any) -> None:
            nonlocal left
            if left == 0:
                marker.touch()
                die()
            left -= 1
            real(*arguments, **options)

        os.replace = replace  # Zarr's writes end in it, and so do ours
        try:
            return super()._write(row, about)
        finally:
            os.replace = real


class DiesAtTheRecord(DiesAtEachFile):
    """Partition 4 dies once between its data and its completion record."""

    points: ClassVar[dict[int, int]] = {4: FILES - 1}


class AlwaysDies(cluster.extract.WritePartition):
    """Partition 5 takes its worker down whenever it is tried."""

    def _write(self, row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        if int(row["partition"]) == 5:
            die()
        return super()._write(row, about)


class AlwaysDiesEncoding(cluster.extract.EncodePartition):
    """Partition 5 takes its encoder down whenever it is tried."""

    def _encode(self, partition: int) -> dict[str, Any]:
        if partition == 5:
            die()
        return super()._encode(partition)


class ToldToGo(cluster.extract.WritePartition):
    """Partition 3's worker gets SIGTERM as it begins; every worker notes which partitions it begins and ends."""

    def _write(self, row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        partition, marker = int(row["partition"]), Path(f"{self.job.run_uri}-told")
        self._note("begins", partition)
        if partition == 3 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # without a notice the worker would be gone by now
        record = super()._write(row, about)
        self._note("ends", partition)
        return record

    def _note(self, what: str, partition: int) -> None:
        with open(f"{self.job.run_uri}-{what}", "a") as file:  # one write of a short line is not torn
            file.write(f"{os.getpid()} {partition}\n")
