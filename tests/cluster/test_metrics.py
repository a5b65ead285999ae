"""What a run tells Ray's metrics is there to be scraped, and the dashboard draws nothing else."""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tiny
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import prometheus

from cluster.metrics import COUNTERS, GAUGES, Extraction, Picks, exported
from engine.select import Columns, open_features, select
from engine.spec import RunSpec, Select
from jobs.extract import extract
from jobs.job import Job
from jobs.select import select as select_stage

DASHBOARD = Path(__file__).parents[2] / "cluster/launch/grafana.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def scraped() -> dict[str, float]:
    """Name{run} -> value of everything of ours at the metrics port of this node."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as reply:
        text = reply.read().decode()
    lines = re.findall(r'^(ray_unbake_\w+)\{.*\brun="([^"]*)".*\} (\S+)$', text, re.M)
    return {f"{name}{{{run}}}": float(value) for name, run, value in lines}


def waited(wanted: dict[str, float]) -> dict[str, float]:
    """What is scraped as soon as it is what is wanted, or after 30 s."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            found = scraped()
        except OSError:  # the exporter is still starting
            found = {}
        if wanted.items() <= found.items():
            break
        time.sleep(0.3)
    return found


def test_a_session_exports_what_a_run_tells(ray_session: None, tmp_path: Path) -> None:
    extraction = Extraction("s3://bucket/run", partitions=5, left=3)
    extraction.written({"rows": 100, "tokens": 2000})
    extraction.written({"rows": 50, "tokens": 0})
    g = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    np.save(tmp_path / "g.npy", g)
    np.save(tmp_path / "target.npy", g.mean(0))
    rows = open_features(str(tmp_path / "g.npy"), str(tmp_path / "target.npy"))
    chosen = select(rows, Columns(), Select(size=7), on_pick=Picks("s3://bucket/run"))
    assert chosen.certificate is not None
    wanted = {
        "ray_unbake_documents_total": 150.0,
        "ray_unbake_tokens_total": 2000.0,
        "ray_unbake_partitions_done": 4.0,
        "ray_unbake_partitions_left": 1.0,
        "ray_unbake_picks": 7.0,
        "ray_unbake_rows_per_pick": float(chosen.certificate.compared[-1]),
        "ray_unbake_objective": float(chosen.objective[-1]),
    }
    assert wanted.keys() == exported()
    of_run = {f"{name}{{s3://bucket/run}}": value for name, value in wanted.items()}
    assert of_run.items() <= waited(of_run).items()


@pytest.mark.slow
def test_an_extraction_and_a_selection_tell_what_they_do(
    ray_session: None, tmp_path: Path, tiny_base: str, tiny_finetuned: str, tiny_corpus: str
) -> None:
    fields = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "extract": {"workers_max": 1, "cpus_per_worker": 0.5, "threads": 1},
        "select": {"size": 5},
    }
    job = Job(RunSpec.from_dict(fields), quiet=True)
    tokens = extract(job)["tokens"]
    result = select_stage(job)
    run = f"{{{job.run.uri}}}"
    wanted = {
        f"ray_unbake_documents_total{run}": 200.0,
        f"ray_unbake_tokens_total{run}": float(tokens),
        f"ray_unbake_partitions_done{run}": 4.0,
        f"ray_unbake_partitions_left{run}": 0.0,
        f"ray_unbake_picks{run}": 5.0,
        f"ray_unbake_objective{run}": result["objective"],
    }
    assert wanted.items() <= waited(wanted).items()


def test_without_ray_nothing_is_recorded_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    Extraction("run", 2, 2).written({"rows": 1, "tokens": 1})


def test_the_dashboard_draws_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    drawn = set()
    for panel in dashboard["panels"]:
        found = {name for target in panel["targets"] for name in re.findall(r"\bray_\w+", target["expr"])}
        assert found, panel["title"]
        assert found <= exported(), panel["title"]
        drawn |= found
    assert drawn == exported()
    assert len(COUNTERS) + len(GAUGES) == len(drawn)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"ray_\w+", json.dumps(variables["run"]["query"]))) <= exported()


def read_by_grafana(dashboard: dict[str, Any]) -> Any:
    """What Grafana's own types keep of a dashboard: a field that they do not know is gone."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(grafana.Dashboard.from_json(dashboard)))


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Paths of what is in one JSON document and not in another."""
    if isinstance(before, dict) and isinstance(after, dict):
        gone = [f"{path}/{key}" for key in before.keys() - after.keys()]
        return gone + [
            w for key in before.keys() & after.keys() for w in lost(before[key], after[key], f"{path}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            w for i, pair in enumerate(zip(before, after, strict=True)) for w in lost(*pair, f"{path}/{i}")
        ]
    return [] if before == after else [path]


def test_grafanas_own_schema_knows_every_field_of_the_dashboard(dashboard: dict[str, Any]) -> None:
    assert lost(dashboard, read_by_grafana(dashboard)) == []
    for panel in grafana.Dashboard.from_json(dashboard).panels or []:
        assert isinstance(panel, grafana.Panel)
        assert panel.targets
        assert all(isinstance(target, prometheus.Dataquery) for target in panel.targets)
    wrong = copy.deepcopy(dashboard)
    wrong["panels"][0]["fieldConfig"]["defaults"]["units"] = "short"  # Grafana's word is unit
    assert lost(wrong, read_by_grafana(wrong)) == ["/panels/0/fieldConfig/defaults/units"]


def test_the_dashboard_is_one_that_grafana_takes(dashboard: dict[str, Any]) -> None:
    assert isinstance(dashboard["schemaVersion"], int)
    assert "id" not in dashboard  # an id of somebody else's database makes the import fail
    assert dashboard["title"]
    assert dashboard["uid"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"])
               for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not own & cells, panel["title"]
        cells |= own
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
