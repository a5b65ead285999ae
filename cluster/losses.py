"""Which nodes a cluster has lost since it was looked at: their raylets answer no more, often before Ray knows it."""

from __future__ import annotations

import socket
import time

import ray

NOTICED = 60.0
"""Seconds in which Ray notices that a node has gone: by its own settings 15 to 65."""

ANSWER = 2.0
"""Seconds that a raylet has to take a connection."""


def nodes() -> dict[str, tuple[str, int]]:
    """Node id -> host and port of its raylet, of the nodes that Ray takes for alive."""
    return {
        node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
        if node["Alive"]
    }


def any_lost(before: dict[str, tuple[str, int]]) -> bool:
    """Whether any of these nodes has gone; returns once Ray knows it too, and gives it nothing to do any more."""
    gone = {node for node, address in before.items() if not _answers(*address)}
    deadline = time.monotonic() + NOTICED
    while gone & nodes().keys() and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(before.keys() - nodes().keys())


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), ANSWER).close()
    except OSError:
        return False
    return True
