"""A Ray for drivers in processes of their own, whose workers begin in a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.forked_workers import forked_ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where it is; this process has no connection to it."""
    with forked_ray() as address:
        yield address
