"""Freed activations stay with the process: the next forward pass faults no page in again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from engine.memory import ENVIRONMENT

FAULTS = """
import concurrent.futures, resource, sys, torch
from engine.memory import keep_freed_memory
if sys.argv[1] == "call":
    keep_freed_memory()
def work():
    for _ in range(10):  # until the heap's holes have their sizes
        torch.ones(10 << 20) + torch.ones(10 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 << 20) + torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(work() if sys.argv[2] == "main" else concurrent.futures.ThreadPoolExecutor(1).submit(work).result())
"""


def faults(how: str, thread: str, environment: dict[str, str]) -> int:
    """Page faults of 20 sums of 40 MiB arrays, more than glibc ever keeps by itself."""
    command = [sys.executable, "-c", FAULTS, how, thread]
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    usual = faults("leave", "main", {})
    assert usual > 200_000  # else there is nothing to gain here
    assert faults("call", "main", {}) < usual / 10
    assert faults("leave", "thread", ENVIRONMENT) < usual / 10  # as in a gradient actor
