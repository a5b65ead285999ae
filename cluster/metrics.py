"""What a run tells Ray's metrics, and through them Prometheus and Grafana: the names, and what is set when.

Ray exports a metric at the metrics port of the driver's node as `ray_<name>`, a counter with `_total` at its end;
`cluster/launch/grafana.json` draws them. Where this process has no connection to Ray nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from engine.select.greedy import Pick

COUNTERS = {
    "unbake_documents": "documents whose gradients were written",
    "unbake_tokens": "tokens of these documents",
}
GAUGES = {
    "unbake_partitions_done": "partitions of the corpus that are written",
    "unbake_partitions_left": "partitions of the corpus that are not written yet",
    "unbake_picks": "documents that greedy selection has picked since its driver started",
    "unbake_rows_per_pick": "candidates whose exact row was compared for the last pick",
    "unbake_objective": "the objective with the last pick; greedy_batched: of the pick's batch",
}
"""Name -> what it is; every one has the tag `run`, the address of the run directory."""


def exported() -> set[str]:
    """The names that Prometheus knows."""
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


class Extraction:
    """Documents, tokens and partitions of an extraction.

    Args:
        run: address of the run directory.
        partitions, left: of the corpus, and how many of them are to be written now.
    """

    def __init__(self, run: str, partitions: int, left: int) -> None:
        self._record = _recorder(run)
        self._partitions, self._left = partitions, left
        self._say()

    def written(self, record: dict[str, Any]) -> None:
        """A completion record has come in."""
        self._left -= 1
        self._record("unbake_documents", record["rows"])
        self._record("unbake_tokens", record["tokens"])
        self._say()

    def _say(self) -> None:
        self._record("unbake_partitions_done", self._partitions - self._left)
        self._record("unbake_partitions_left", self._left)


class Picks:
    """Picks, rows compared and the objective of a selection; called with each pick of a greedy strategy."""

    def __init__(self, run: str) -> None:
        self._record = _recorder(run)
        self._count = 0

    def __call__(self, pick: Pick) -> None:
        """One more pick."""
        self._count += 1
        self._record("unbake_picks", self._count)
        self._record("unbake_rows_per_pick", pick.compared)
        self._record("unbake_objective", pick.score)


def _recorder(run: str) -> Callable[[str, float], None]:
    """A function that adds to a counter, or sets a gauge, of a run."""
    if not ray.is_initialized():
        return lambda name, value: None
    counters = {name: Counter(name, about, tag_keys=("run",)) for name, about in COUNTERS.items()}
    gauges = {name: Gauge(name, about, tag_keys=("run",)) for name, about in GAUGES.items()}
    tags = {"run": run}

    def record(name: str, value: float) -> None:
        if name in gauges:
            gauges[name].set(value, tags)
        elif value:  # Ray refuses to add nothing
            counters[name].inc(value, tags)

    return record
