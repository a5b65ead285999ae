"""Ray nodes on this machine that come and go: a cluster beside the process's own Ray, lost hosts and new ones."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

GRADIENTS, INDEX, TRAINING = "WritePartition", "ShardActor", "RayTrainWorker"
"""What the workers of the stages call themselves."""

SPREAD = {"workers_min": 2, "workers_max": 3, "cpus_per_worker": 0.75, "max_attempts": 3}
"""Extraction with a gradient actor to each node of one CPU."""

NOTICED = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
"""A lost node is noticed in seconds; by Ray's own settings it takes ten times as long."""


class Nodes:
    """A head that runs nothing but drivers, and nodes that all have the same resources."""

    def __init__(self, count: int, **resources: Any) -> None:
        """Args: resources: as `Cluster.add_node` takes them."""
        self._resources = {"num_cpus": 1, "object_store_memory": 100 << 20, **resources}
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths end at 107 bytes
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
        with self._own_folder():  # Ray notes there which cluster a process of this machine may join unasked
            self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": NOTICED})
        self.live: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        """Of the cluster, for drivers."""
        return str(self._cluster.address)

    def add(self, **resources: Any) -> Any:
        """One more node, which is there when this returns; it may have other resources than the rest."""
        with self._own_folder():
            node = self._cluster.add_node(**{**self._resources, **resources})
        self.live.append(node)
        return node

    def lose(self, node: Any) -> None:
        """A host that loses its power: its raylet and all its workers die at once, and say nothing."""
        for process in [raylet_of(node), *self.workers(node)]:
            process.kill()
        self.live.remove(node)

    def tell(self, node: Any) -> None:
        """A host that is told to go: its raylet gets SIGTERM, ends its workers and leaves the cluster."""
        raylet_of(node).terminate()
        self.live.remove(node)

    def workers(self, node: Any, *kinds: str) -> list[psutil.Process]:
        """Live worker processes of a node whose title names one of the kinds; without kinds all."""
        return [p for p in raylet_of(node).children(recursive=True) if not kinds or named(p, *kinds)]

    def holding(self, *kinds: str) -> list[Any]:
        """Live nodes with a worker of one of the kinds."""
        return [node for node in self.live if self.workers(node, *kinds)]

    def close(self) -> None:
        """Stop everything."""
        with self._own_folder():
            self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before


def named(process: psutil.Process, *kinds: str) -> bool:
    """Whether a process is a live Ray worker whose title names one of the kinds."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and any(kind in title for kind in kinds)


def raylet_of(node: Any) -> psutil.Process:
    """The raylet of a node, whose children are the node's workers."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def wait_until(condition: Callable[[], Any], alive: Callable[[], bool], seconds: float = 300) -> Any:
    """The condition's first true value, while something lives that may bring it about."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert alive(), "it ended before its time"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)
    return found
