"""Main memory of a CPU's passes: what is freed stays with the process, so that no page is faulted in twice."""

from __future__ import annotations

import ctypes

LARGEST = 2**31 - 1
"""Free bytes at the heap's end above which it still shrinks: the most that mallopt takes."""

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST),
}
"""The same for a process that is to be started, for all of its threads."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed; nothing where there is no glibc.

    By default each activation of a few megabytes is mapped anew and given back: a fifth of the CPU time of a
    forward pass went into page faults (docs/extraction.md), and a tenth of a training step's
    (docs/retraining.md). The process then holds its peak to its end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, LARGEST)
    mallopt(_MMAP_MAX, 0)
