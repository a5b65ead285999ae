"""Index shards in Ray actors: each holds some partitions' index, and all answer one request a round trip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.resources import options
from engine.errors import UserError
from engine.rows import Rows
from engine.select import Labels, ShardFactory
from engine.select.objective import Bools, RowKind, unit_target
from engine.select.shard import Found, Request, Shard
from engine.spec import Select

_AHEAD = 8  # picks asked for at once, while guesses come true


@ray.remote(max_restarts=0)
class ShardActor:
    """One shard in its own process; it opens the store itself and reads its own partitions.

    The shard is built when it is first asked, so that a mistake met on the way is an answer like any other.
    """

    def __init__(
        self, open_rows: Callable[[], Rows], start: int, stop: int, kind: RowKind, *rest: Any
    ) -> None:
        """Args: as those of `Shard`, with a function that opens the store and without the target."""
        self._open_rows, self._range, self._kind, self._rest = open_rows, (start, stop), kind, rest
        self._shard: Shard | None = None

    def answer(self, request: Request) -> list[Found]:
        """See `Shard.answer`."""
        if self._shard is None:
            rows = self._open_rows()
            self._shard = Shard(rows, *self._range, self._kind, unit_target(rows.target), *self._rest)
        return self._shard.answer(request)


class RayShards:
    """Shards of whole partitions in Ray actors; implements `engine.select.greedy.Shards`.

    An actor that dies is rebuilt from the store and asked again: what its rows answer does not depend on what
    it was asked before, so picks do not change.

    Args:
        open_rows: picklable; opens the store in the actor.
        count: shards at most; no more than there are partitions.
        attempts: times that one request may be asked before giving up.
    """

    ahead = _AHEAD

    def __init__(
        self,
        open_rows: Callable[[], Rows],
        count: int,
        rows: Rows,
        spec: Select,
        eligible: Bools,
        label: Labels | None,
        attempts: int = 3,
    ) -> None:
        self._open_rows, self._attempts = open_rows, attempts
        partitions = -(-rows.n_rows // rows.block_rows)
        edges = np.linspace(0, partitions, min(count, partitions) + 1).round().astype(int) * rows.block_rows
        edges[-1] = rows.n_rows
        self._ranges = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        memory = max(1, spec.index_memory_mb // len(self._ranges))
        self._shared = (spec.rows, ray.put(eligible), ray.put(label), memory, spec.cache_memory_mb)
        self._place = {"num_cpus": spec.cpus_per_shard, **options(spec)}
        self._closed_rows: list[np.ndarray] = []
        self._closed_labels: tuple[int, ...] = ()
        self.actors = [self._start(*r) for r in self._ranges]

    def answer(self, request: Request) -> list[list[Found]]:
        """See `Shards.answer`; one round trip, and one more for each actor that has died."""
        self._closed_rows.append(request.closed_rows)
        self._closed_labels += request.closed_labels
        shared = ray.put(request)
        waiting = [actor.answer.remote(shared) for actor in self.actors]
        return [self._answer_of(number, reply, request) for number, reply in enumerate(waiting)]

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors:
            ray.kill(actor)

    def _answer_of(self, number: int, reply: Any, request: Request) -> list[Found]:
        for _ in range(self._attempts):
            try:
                return ray.get(reply)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except RayActorError:
                self.actors[number] = self._start(*self._ranges[number])
                every = Request(
                    request.steps, np.concatenate(self._closed_rows), self._closed_labels, request.left
                )
                reply = self.actors[number].answer.remote(every)
        start, stop = self._ranges[number]
        raise UserError(
            f"the worker that indexes rows {start} to {stop - 1} died {self._attempts} times in a row: it may "
            "need more memory; lower select.index_memory_mb or use more shards."
        )

    def _start(self, start: int, stop: int) -> Any:
        return ShardActor.options(**self._place).remote(self._open_rows, start, stop, *self._shared)


def ray_shards(open_rows: Callable[[], Rows], count: int | None = None) -> ShardFactory:
    """A shard factory for `engine.select.select` that spreads the index over the connected Ray cluster.

    Args:
        open_rows: picklable, for example ``functools.partial(GradientStore.open, RunDir(uri))``.
        count: shards; default: one per CPU of the cluster.
    """

    def make(rows: Rows, spec: Select, eligible: Bools, label: Labels | None) -> RayShards:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        return RayShards(open_rows, count or max(1, cpus), rows, spec, eligible, label)

    return make
