"""Work begun in threads before its results are asked for, and given in order: reading overlaps what is done with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], count: int = 1, threads: int = 1) -> Iterator[R]:
    """`work(item)` of each item in order; so many are under way or done before the one in hand is let go.

    A generator that is not read to its end waits for none of its threads. The garbage collector may be what ends
    it, in a thread that is just starting even, and to join a thread there is to wait for a lock that is held (CPython
    3.11 and 3.12): no thread of the process would ever start again.

    Raises:
        Exception: what `work` raised, where its result would be.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    coming: deque[Future[R]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
