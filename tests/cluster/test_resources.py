"""What a stage asks of the cluster reaches Ray, and what the cluster can never give is refused at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
import yaml

import cluster.extract
from cluster import resources
from cluster.extract import WritePartition
from cluster.resources import Need, Node, Offer, check, missing, needs, offer, options
from cluster.session import gpus_per_worker
from engine.errors import UserError
from engine.spec import RunSpec, Select
from jobs.extract import extract
from jobs.job import Job

GB = 1 << 30
A100 = Node({"CPU": 12, "GPU": 1, "accelerator_type:A100": 1, "memory": 80 * GB}, {"zone": "a"})
CPUS = Node({"CPU": 16, "memory": 32 * GB}, {"zone": "b"})


def spec_of(**sections: dict[str, Any]) -> RunSpec:
    fields: dict[str, Any] = {
        "models": {"base": "a", "finetuned": "b"},
        "corpus": {"paths": ["c"]},
        "task": {"labels": tiny.LABELS},
    }
    return RunSpec.from_dict({**fields, **sections})


def need(
    count: int = 1,
    labels: dict[str, str] | None = None,
    beside: float = 0.0,
    grows: bool = False,
    **amounts: float,
) -> Need:
    return Need("extract", count, amounts, labels or {}, "extract.workers_min", beside, grows)


TYPE = {"accelerator_type:A100": 0.001}


@pytest.mark.parametrize(
    ("wanted", "nodes", "lacks"),
    [
        (need(1, CPU=1, GPU=1), [A100, CPUS], None),
        (need(4, CPU=1, GPU=0.25), [A100], None),
        (need(5, CPU=1, GPU=0.25), [A100], "has room for 4"),
        (need(2, CPU=1, GPU=1), [A100], "has room for 1"),
        (need(1, CPU=1, GPU=2), [A100, A100], "no node with more than 1 GPU"),
        (need(1, CPU=1, GPU=1), [CPUS], "has no GPU"),
        (need(1, CPU=14, GPU=1), [A100, CPUS], "no node with all of that together"),
        (need(1, memory=96.0 * GB), [A100, CPUS], "no node with more than 85.9 GB of memory"),
        (need(1, GPU=1, **TYPE), [A100], None),
        (need(1, **{"CPU": 1, "accelerator_type:H100": 0.001}), [A100, CPUS], "no H100 (A100)"),
        (need(1, {"zone": "b"}, CPU=1), [A100, CPUS], None),
        (need(1, {"zone": "c"}, CPU=1), [A100, CPUS], "no node with the labels zone=c"),
        (need(1, {"zone": "b"}, CPU=1, GPU=1), [A100, CPUS], "no node with all of that together"),
        (need(1, {"zone": "!b"}, CPU=1, GPU=1), [A100, CPUS], None),
        (need(1, {"zone": "in(b, c)"}, CPU=13), [A100, CPUS], None),
        (need(1, {"zone": "!in(a, b)"}, CPU=1), [A100, CPUS], "no node with the labels"),
        (need(4, beside=0.25, CPU=4), [CPUS], "no CPU left"),
        (need(4, beside=0.25, CPU=3.9), [CPUS], None),
        (need(4, beside=0.25, CPU=4), [CPUS, A100], None),
        (need(2, beside=0.25, CPU=16), [CPUS, CPUS], "no CPU left"),
        (need(1, {"zone": "a"}, beside=0.25, CPU=12), [A100, CPUS], None),
        (need(40, beside=0.25, grows=True, CPU=9), [A100, CPUS], None),
        (need(40, beside=0.25, grows=True, CPU=17), [A100, CPUS], "no node with more than 16 CPU"),
        (need(40, beside=0.25, grows=True, CPU=4), [A100, CPUS], "no CPU left"),
        (need(40, grows=True, CPU=1), [], "has no CPU"),
    ],
)
def test_what_nodes_can_never_give_is_one_sentence_and_nothing_else_is_refused(
    wanted: Need, nodes: list[Node], lacks: str | None
) -> None:
    found = missing(wanted, Offer(nodes))
    assert (found is None) == (lacks is None), found
    if lacks is not None and found is not None:
        assert lacks in found
        assert "\n" not in found


def test_nodes_that_could_be_started_count_as_many_times_as_they_could_be() -> None:
    could = Offer([CPUS], [(A100, 8)])
    assert missing(need(8, CPU=1, GPU=1), could) is None
    lacks = missing(need(9, CPU=1, GPU=1), could)
    assert lacks is not None
    assert "could start room for 8" in lacks


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_waits_for_what_no_node_has_ends_in_a_sentence(
    tiny_base: str, tiny_finetuned: str, tiny_corpus: str, tmp_path: Path
) -> None:
    """On a real head: without the check Ray leaves the actors pending for ever."""
    fields = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus]},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "extract": {"gpus_per_worker": 2, "accelerator_type": "A100", "threads": 1},
        "select": {"size": 20},
    }
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^extract needs 1 x \(1 CPU, 2 GPU, A100\), and the cluster has no GPU"
    ):
        extract(Job(RunSpec.from_dict(fields), quiet=True))
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"extract": {"workers_min": 40, "threads": 1}}, r"extract needs 40 x .* no CPU left for that"),
        ({"extract": {"workers_min": 8, "cpus_per_worker": 1}}, r"no CPU left for that: lower extract\.workers_min"),
        ({"select": {"shards": 9}}, r"select needs 9 x \(1 CPU\) at once, .* room for 8: lower select\.shards"),
        ({"retrain": {"workers": 9}}, r"retrain needs 9 x .* lower retrain\.workers"),
        ({"retrain": {"gpus_per_worker": 0.5}}, r"retrain needs 1 x \(1 CPU, 0\.5 GPU\), .* no GPU"),
        ({"retrain": {"node_labels": {"tier": "train"}}}, r"tier=train: mend retrain\.node_labels"),
        ({"extract": {"memory_mb": 1 << 30}}, "no node with more than .* of memory"),
    ],
)  # fmt: skip
def test_each_stage_is_checked_against_the_nodes_that_are_there(
    sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check(spec_of(**sections), ("extract", "select", "retrain"))


@pytest.mark.usefixtures("ray_session")
def test_what_fits_is_let_through_fractions_too() -> None:
    asked = {"workers_min": 8, "cpus_per_worker": 0.5, "memory_mb": 10}
    check(
        spec_of(extract=asked, select={"shards": 8}, retrain={"workers": 8}), ("extract", "select", "retrain")
    )
    every = needs(spec_of(extract=asked), ("extract", "select", "retrain"))
    assert [one.stage for one in every] == ["extract", "retrain"]  # one shard needs no worker
    assert every[0].resources == {"CPU": 0.5, "memory": 10 << 20}


@pytest.mark.usefixtures("ray_session")
def test_ray_takes_the_options_of_a_section_and_places_by_them() -> None:
    """Ray's own scheduler on what is handed to it: it counts memory, and knows that no node has the label."""
    settings = Select(memory_mb=64)
    fits = ray.remote(lambda: ray.get_runtime_context().get_assigned_resources())
    assert ray.get(fits.options(**options(settings)).remote(), timeout=60)["memory"] == 64 << 20
    nowhere = fits.options(**options(Select(node_labels={"tier": "train"}))).remote()
    assert ray.wait([nowhere], timeout=0.5)[0] == []
    ray.cancel(nowhere, force=True)
    elsewhere = fits.options(**options(Select(node_labels={"tier": "!train"}))).remote()
    assert ray.get(elsewhere, timeout=60)


@pytest.mark.usefixtures("ray_session")
def test_what_extraction_asks_of_a_node_reaches_its_actors(
    tiny_base: str, tiny_finetuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are proved by tests/faults/test_nodes.py, which has several nodes."""
    noted = tmp_path / "noted"

    class Noting(WritePartition):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            noted.write_text(json.dumps(ray.get_runtime_context().get_assigned_resources()))
            return super().__call__(row)

    monkeypatch.setattr(cluster.extract, "WritePartition", Noting)
    fields = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny.save_corpus(tmp_path / "c.jsonl", 30)]},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "extract": {
            "threads": 1, "cpus_per_worker": 0.75, "memory_mb": 100, "workers_max": 1,
            "node_labels": {"tier": "!train"},
        },
        "select": {"size": 5},
    }  # fmt: skip
    extract(Job(RunSpec.from_dict(fields), quiet=True))
    assert json.loads(noted.read_text()) == {"CPU": 0.75, "memory": 100 << 20}


@pytest.mark.usefixtures("ray_session")
def test_a_stage_waits_for_a_node_in_place_of_a_lost_one_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, here = spec_of(retrain={"workers": 3}), ray.nodes()
    lost = {**here[0], "Alive": False, "NodeID": "0f"}
    small = {**here[0], "Resources": {"CPU": 2.0}}
    seen = [[small, lost], [small, lost], [small, lost], [*here, lost]]
    monkeypatch.setattr(resources, "_grows", lambda now: False)
    monkeypatch.setattr(ray, "nodes", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    check(asked, ("retrain",))
    seen[:] = [[small, lost]]
    monkeypatch.setattr(resources, "REPLACED", 1.0)
    with pytest.raises(UserError, match="has room for 2"):
        check(asked, ("retrain",))
    seen[:] = [[small]]
    monkeypatch.setattr(resources, "REPLACED", 1e9)
    with pytest.raises(UserError, match="has room for 2"):
        check(asked, ("retrain",))
    seen[:] = [[{**here[0], "Resources": {}}]] * 4 + [here]  # a head, whose first node is still to join
    check(asked, ("retrain",))


@pytest.mark.usefixtures("ray_session")
def test_node_types_that_ray_up_would_start_count_where_this_is_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec_of(extract={"gpus_per_worker": 1, "workers_min": 3})
    monkeypatch.setattr(resources, "BOOTSTRAP", tmp_path / "ray_bootstrap_config.yaml")
    assert gpus_per_worker(None) == 0
    with pytest.raises(UserError, match="no GPU"):
        check(asked, ("extract",))
    types = {
        "head": {"resources": {"CPU": 4}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3, "labels": {"zone": "a"}},
    }
    config = {"available_node_types": types, "head_node_type": "head", "max_workers": 10}
    resources.BOOTSTRAP.write_text(yaml.safe_dump(config))
    assert [(node.resources, count) for node, count in offer().startable] == [({"CPU": 8.0, "GPU": 1.0}, 3)]
    check(asked, ("extract",))
    assert gpus_per_worker(None) == 1
    asked = spec_of(retrain={"gpus_per_worker": 1, "workers": 4})
    with pytest.raises(UserError, match="could start room for 3"):
        check(asked, ("retrain",))


@pytest.mark.usefixtures("ray_session")
def test_nothing_is_refused_where_an_autoscaler_may_start_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec_of(extract={"gpus_per_worker": 8})
    report: dict[str, Any] = {"active_nodes": {"head": 1}, "idle_nodes": None}
    monkeypatch.setattr(resources, "_report", lambda: report)
    check(asked, ("extract",))
    report |= {"active_nodes": {}, "node_type_mapping": {"0f": "head"}}  # a head with nothing to do
    check(asked, ("extract",))
    # what a head without an autoscaler says of itself
    report |= {"active_nodes": {"node_0f": 1}, "node_type_mapping": {"0f": "node_0f"}}
    with pytest.raises(UserError, match="no GPU"):
        check(asked, ("extract",))
