"""What each stage asks of the cluster, and whether the cluster has it or could start it.

Ray leaves a request that no node can ever meet pending for ever. Here it is compared with the nodes that are there
and, where an autoscaler runs, with the node types it could start, and refused in one sentence. Where nobody says
what could be started nothing is refused: a wait is better than a wrong refusal. Extraction's pool grows with the
cluster, so that it is refused only where not one of its workers finds a place.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import yaml

from engine.errors import UserError
from engine.estimate import human
from engine.spec import Placement, RunSpec

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's configuration, on the head alone."""

STATUS = "__autoscaling_status"
"""Key of what the autoscaler reports in Ray's internal store (v1)."""

FIRST_REPORT = 20.0
"""Seconds until a head that has just started has an autoscaler's first report: five, where nothing else runs."""

REPLACED = 60.0
"""Seconds in which a first node may join, or another in place of one that was lost, before a stage is refused."""

MANY = 1 << 20


@dataclass(frozen=True)
class Node:
    """What one node offers: resources by Ray's names (memory in bytes), and labels."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """Nodes that are there and that could be started; `more`: there may be others of which nothing is known."""

    now: list[Node]
    startable: list[tuple[Node, int]] = field(default_factory=list)
    more: bool = False

    def most(self, name: str) -> float:
        """The most of a resource that any one node has or would have."""
        nodes = self.now + [node for node, _ in self.startable]
        return max((node.resources.get(name, 0.0) for node in nodes), default=0.0)


@dataclass(frozen=True)
class Need:
    """`count` workers of a stage at once, each with these resources on one node with these labels.

    fields: of the spec, to be named where the need cannot be met. beside: CPUs that have to be left for work
    without which the stage cannot begin. grows: it begins with as many as there is room for, if only one.
    """

    stage: str
    count: int
    resources: dict[str, float]
    labels: dict[str, str]
    fields: str
    beside: float = 0.0
    grows: bool = False


def options(settings: Placement) -> dict[str, Any]:
    """What of a section goes to Ray as it is: options of an actor or of `Dataset.map`."""
    found: dict[str, Any] = {}
    if settings.memory_mb is not None:
        found["memory"] = settings.memory_mb << 20
    if settings.accelerator_type is not None:
        found["accelerator_type"] = settings.accelerator_type
    if settings.node_labels:
        found["label_selector"] = dict(settings.node_labels)
    return found


def need(stage: str, count: int, cpus: float, gpus: float, settings: Placement, fields: str) -> Need:
    """A need with what the section asks of a node."""
    resources = {"CPU": cpus, "GPU": gpus, "memory": float((settings.memory_mb or 0) << 20)}
    if settings.accelerator_type is not None:
        resources[f"accelerator_type:{settings.accelerator_type}"] = 0.001
    resources = {name: amount for name, amount in resources.items() if amount}
    return Need(stage, count, resources, dict(settings.node_labels), fields)


def needs(spec: RunSpec, stages: tuple[str, ...], threads: int | None = None) -> list[Need]:
    """What the given stages (extract, select, retrain) need to begin; a connection to Ray is needed."""
    from cluster.extract import ENCODE_CPUS, actor_resources, threads_per_worker
    from cluster.train import worker_resources

    found = []
    if "extract" in stages:
        settings = spec.extract
        cpus, gpus = actor_resources(settings, threads or threads_per_worker(settings))
        names = "extract.workers_min, threads, cpus_per_worker, gpus_per_worker"
        pool = need("extract", settings.workers_min, cpus, gpus, settings, names)
        found.append(replace(pool, beside=ENCODE_CPUS, grows=True))
    if "select" in stages and spec.select.shards > 1:
        names = "select.shards, cpus_per_shard"
        found.append(need("select", spec.select.shards, spec.select.cpus_per_shard, 0, spec.select, names))
    if "retrain" in stages:
        each = worker_resources(spec.retrain)
        names = "retrain.workers, cpus_per_worker, gpus_per_worker"
        found.append(
            need("retrain", spec.retrain.workers, each["CPU"], each.get("GPU", 0), spec.retrain, names)
        )
    return found


def check(spec: RunSpec, stages: tuple[str, ...]) -> None:
    """Refuse what the connected cluster can never give.

    Raises:
        UserError: a stage's need; it says what is missing and which fields ask for it.
    """
    wanted = needs(spec, stages)
    deadline = time.monotonic() + REPLACED
    while not all(missing(one, Offer(_nodes())) is None for one in wanted):
        could = offer()
        lacks = [] if could.more else [why for one in wanted if (why := missing(one, could))]
        if not lacks:
            return
        if not _comes_and_goes() or time.monotonic() > deadline:
            raise UserError(lacks[0])
        time.sleep(1)


def missing(wanted: Need, could: Offer) -> str | None:
    """Why nodes can never meet a need, as a sentence; None when they can."""
    nodes = [(node, 1) for node in could.now] + could.startable
    fitting = [(node, count) for node, count in nodes if _labelled(node, wanted.labels)]
    room = sum(count * _holds(node, wanted.resources) for node, count in fitting)
    grows = " and could start" if could.startable else ""
    asked = f"{wanted.stage} needs {wanted.count} x ({_words(wanted.resources, wanted.labels)})"
    if room >= wanted.count or (wanted.grows and room):
        if _left_beside(nodes, wanted):
            return None
        return (
            f"{asked} and {wanted.beside:g} CPU beside them for reading, and the cluster has{grows} no CPU left for "
            f"that: lower {wanted.fields}, or add nodes."
        )
    if room:
        return f"{asked} at once, and the cluster has{grows} room for {room}: lower {wanted.fields}, or add nodes."
    if wanted.labels and not fitting:
        labels = ", ".join(f"{name}={value}" for name, value in wanted.labels.items())
        return f"{asked}, and the cluster has{grows} no node with the labels {labels}: mend {wanted.stage}.node_labels."
    return f"{asked}, and the cluster has{grows} {_shortest(wanted, could)}: lower {wanted.fields}, or add nodes."


def _shortest(wanted: Need, could: Offer) -> str:
    """What is short where not even one worker finds a place."""
    for name, amount in wanted.resources.items():
        most = could.most(name)
        if most < amount:
            kind = name.partition(":")[2]
            if kind:
                types = {n.partition(":")[2] for node in _all(could) for n in node.resources if _is_type(n)}
                return f"no {kind} ({', '.join(sorted(types)) or 'no accelerator of a known type'})"
            if not most:
                return f"no {name}"
            return f"no node with more than {_amount(name, most)}"
    return "no node with all of that together"


def _all(could: Offer) -> list[Node]:
    return could.now + [node for node, _ in could.startable]


def _is_type(name: str) -> bool:
    return name.startswith("accelerator_type:")


def _words(resources: dict[str, float], labels: dict[str, str]) -> str:
    words = [name.partition(":")[2] if _is_type(name) else _amount(name, n) for name, n in resources.items()]
    return ", ".join(words + [f"{name}={value}" for name, value in labels.items()])


def _amount(name: str, amount: float) -> str:
    return f"{human(amount)} of memory" if name == "memory" else f"{amount:g} {name}"


def _holds(node: Node, resources: dict[str, float]) -> int:
    """How many workers with these resources a node has room for when it is empty."""
    if not resources:
        return MANY
    # Ray counts in ten-thousandths
    return min(
        int(round(1e4 * node.resources.get(name, 0.0)) // max(1, round(1e4 * amount)))
        for name, amount in resources.items()
    )


def _left_beside(nodes: list[tuple[Node, int]], wanted: Need) -> bool:
    """Whether some node keeps CPUs for `beside`, when the fewest nodes that can hold the workers do."""
    if not wanted.beside:
        return True
    left, cpus = wanted.count, wanted.resources.get("CPU", 0.0)
    for node, count in sorted(nodes, key=lambda pair: not _labelled(pair[0], wanted.labels)):
        each = _holds(node, wanted.resources) if _labelled(node, wanted.labels) else 0
        for _ in range(min(count, left + 1)):
            placed = min(each, left)
            left -= placed
            if node.resources.get("CPU", 0.0) - placed * cpus >= wanted.beside - 1e-6:
                return True
    return False


def _labelled(node: Node, selector: dict[str, str]) -> bool:
    """Whether a node's labels match a selector: value, !value, in(a, b), !in(a, b), as Ray writes them."""
    for name, text in selector.items():
        negated, listed = text.startswith("!"), re.fullmatch(r"!?in\((.*)\)", text)
        values = [v.strip() for v in listed[1].split(",")] if listed else [text.removeprefix("!")]
        if (node.labels.get(name) in values) == negated:
            return False
    return True


def offer() -> Offer:
    """What the connected cluster has, and what an autoscaler could add to it."""
    now = _nodes()
    types = _reported_types() or _bootstrap_types()
    if types:
        return Offer(now, types)
    return Offer(now, more=_grows(now))


def could_have_gpus() -> bool:
    """Whether the cluster has a GPU, or an autoscaler that is known to be able to start a node with one."""
    if ray.cluster_resources().get("GPU", 0) > 0:
        return True
    return any(node.resources.get("GPU", 0) > 0 for node, _ in _reported_types() or _bootstrap_types())


def _nodes() -> list[Node]:
    """The nodes that are there."""
    return [Node(found["Resources"], found.get("Labels") or {}) for found in ray.nodes() if found["Alive"]]


def _comes_and_goes() -> bool:
    """Whether the cluster has ever had a node that is gone, or has none yet that computes."""
    nodes = ray.nodes()
    computing = any(found["Resources"].get("CPU", 0) > 0 for found in nodes)
    return not (computing and all(found["Alive"] for found in nodes))


def _reported_types() -> list[tuple[Node, int]]:
    """Node types that the cluster's manager has reported to Ray; open-source autoscalers do not (Ray 2.60)."""
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [
        (Node(dict(group.resources)), MANY if group.max_count < 0 else group.max_count) for group in groups
    ]


def _bootstrap_types() -> list[tuple[Node, int]]:
    """Node types of a cluster that `ray up` made, where this is its head: submitted jobs run there."""
    try:
        config = yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8"))
        types = config["available_node_types"]
        most = config.get("max_workers", MANY)
        return [
            (
                Node(
                    {n: float(a) for n, a in (kind.get("resources") or {}).items()}, kind.get("labels") or {}
                ),
                min(most, kind.get("max_workers", most)),
            )
            for name, kind in types.items()
            if name != config.get("head_node_type")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return []


def _grows(now: list[Node]) -> bool:
    """Whether an autoscaler that can start nodes may be at work, though of which types nobody says.

    A head without one reports its nodes as types of their own, `node_<id>`. The second autoscaler reports no
    types at all, so that with it anything may come.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    deadline = time.monotonic() + FIRST_REPORT
    while not (report := _report()) and time.monotonic() < deadline:
        time.sleep(0.2)
    counts = ("active_nodes", "idle_nodes", "pending_launches")
    types = {name for part in counts for name in report.get(part) or {}}
    # a head with nothing to do may be in the mapping alone
    types.update((report.get("node_type_mapping") or {}).values())
    return any(not name.startswith("node_") for name in types)


def _report() -> dict[str, Any]:
    """The autoscaler's last report of nodes, empty before its first."""
    text = ray.experimental.internal_kv._internal_kv_get(STATUS)
    return dict(json.loads(text).get("autoscaler_report") or {}) if text else {}
