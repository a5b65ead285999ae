"""Results come in order, so many ahead and no more, and a generator that is dropped waits for nobody."""

from __future__ import annotations

import threading
import time

import pytest

from engine.ahead import ahead


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (3, 2), (8, 8)])
@pytest.mark.parametrize("items", [0, 1, 2, 30])
def test_results_come_in_order(items: int, count: int, threads: int) -> None:
    def late(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(ahead(late, range(items), count, threads)) == [i * i for i in range(items)]


def test_so_many_are_begun_before_they_are_asked_for_and_no_more() -> None:
    begun: list[int] = []
    results = ahead(begun.append, range(20), count=3, threads=8)
    assert begun == []
    for taken in range(1, 5):
        next(results)
        deadline = time.monotonic() + 10
        while len(begun) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sorted(begun) == list(range(taken + 3))


def test_an_error_comes_where_its_result_would_be() -> None:
    results = ahead(lambda i: 1 // i, [2, 1, 0, 3], count=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_generator_that_is_dropped_waits_for_no_thread_and_begins_nothing_more() -> None:
    there, held, begun = threading.Event(), threading.Event(), []

    def work(i: int) -> int:
        begun.append(i)
        if i == 1:
            there.set()
            assert held.wait(30)
        return i

    results = ahead(work, range(10), count=3)
    assert next(results) == 0
    assert there.wait(10)
    before = time.monotonic()
    del results  # its thread is in `work`, which would go on for half a minute
    assert time.monotonic() - before < 5
    held.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ahead"):
            thread.join(10)
    assert begun == [0, 1]
