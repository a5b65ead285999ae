"""Decisions that all workers of a training share, so that none waits for another that has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from engine.errors import UserError

T = TypeVar("T")


@contextmanager
def agree() -> Iterator[None]:
    """A UserError of one worker in the block becomes every worker's."""
    error: str | None = None
    try:
        yield
    except UserError as mine:
        error = str(mine)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise UserError(message)


def from_first(decide: Callable[[], T]) -> T:
    """What the first worker decides, on every worker."""
    answer = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]  # type: ignore[return-value]
