"""Nodes and actors over time while Ray's autoscaler follows one run: ``python benchmarks/autoscaling.py [--quick]``.

    python benchmarks/autoscaling.py [--quick] [--json OUT] [--figure OUT.svg] [--folder DIR]

A head that runs nothing and Ray's own autoscaler with its fake provider, whose nodes are raylets of this machine
with one CPU each, from 0 to `--nodes`; then one `unbake recover` as anybody would run it. What is measured is
when nodes and actors come and go, not how fast they are: all of them share the cores of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import million
import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
"""The id and the node type that Ray's fake provider gives the head, whatever the config says."""

IDLE_SECONDS = 6
EVERY = 0.5
"""Seconds between two samples."""

DOCUMENTS, QUICK = 100_000, 50_000
KINDS = {"MapWorker(Map(WritePartition))": "gradient actors", "RayTrainWorker": "training workers"}
PORTS = (
    "port", "object-manager-port", "node-manager-port", "ray-client-server-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip


# --- a cluster that grows -----------------------------------------------------------------------------------


def autoscaling_config(address: str, nodes: int) -> dict[str, Any]:
    """Ray's cluster config for its fake provider; the wheel of Ray 2.60 lacks the example of one."""
    resources = {"CPU": 1, "memory": 2 * psutil.virtual_memory().total, "object_store_memory": 100 << 20}
    worker = {"resources": resources, "node_config": {}}
    return {
        "cluster_name": "unbake-autoscaling",
        "max_workers": nodes,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": {
            "type": "external",
            "module": "growing_nodes.GrowingNodes",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": nodes},
        },
        "head_node_type": HEAD_TYPE,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """A head with an autoscaler, and what that starts; the head's address."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths end at 107 bytes
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    address = f"127.0.0.1:{ports['port']}"
    config = Path(folder) / "cluster.yaml"
    config.write_text(yaml.safe_dump(autoscaling_config(address, nodes)))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--include-dashboard=false"]
    command += [f"--object-store-memory={150 << 20}", f"--temp-dir={folder}"]
    command += [f"--autoscaling-config={config}", *(f"--{name}={port}" for name, port in ports.items())]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD}
    fake["PYTHONPATH"] = str(Path(__file__).parent)  # where the autoscaler finds its provider
    environment = {**kept, **fake, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
    with open(f"{folder}/start.log", "w") as log:
        head = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        while "Ray runtime started" not in Path(log.name).read_text():
            if head.poll() is not None:
                raise SystemExit(Path(log.name).read_text())
            time.sleep(0.2)
        yield address
    finally:
        started = [head, *head.children(recursive=True)]
        head.terminate()
        _, left = psutil.wait_procs(started, 15)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


# --- the run ------------------------------------------------------------------------------------------------


def write_spec(folder: Path, documents: int, nodes: int) -> Path:
    """A run with some minutes of gradients, on models of a few million weights; its file."""
    base, finetuned = million.write_models(folder / "models")
    spec = {
        "run_dir": str(folder / "run"),
        "models": {"base": base, "finetuned": finetuned},
        "corpus": {"paths": million.write_corpus(folder / "corpus", documents), "partition_rows": 256},
        "task": {"kind": "language_modelling", "max_tokens": 64},
        "gradients": {"projector": "tensorsketch", "dim": 512, "checkpoints": 2, "dtype": "float32"},
        "extract": {"threads": 1, "cpus_per_worker": 0.75, "workers_min": 1, "workers_max": nodes},
        "select": {"size": 20},
        "retrain": {"strategies": ["greedy"], "epochs": 1, "threads": 1, "dtype": "float32"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def sample(started: float) -> dict[str, Any]:
    """What there is now: worker nodes, and of each kind the actors that run, that wait, and their nodes."""
    import ray
    from ray._private import state

    now: dict[str, Any] = {"seconds": round(time.monotonic() - started, 2)}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {HEAD}
    now["worker nodes"] = len(alive)
    for kind in KINDS.values():
        now |= {kind: 0, f"{kind}, waiting": 0, f"{kind}, nodes": 0}
    where: dict[str, set[str]] = {kind: set() for kind in KINDS.values()}
    for actor in state.actors().values():
        kind = KINDS.get(actor["ActorClassName"])
        if kind and actor["State"] == "ALIVE":
            now[kind] += 1
            where[kind].add(actor["Address"]["NodeID"])
        elif kind and actor["State"] != "DEAD":
            now[f"{kind}, waiting"] += 1
    return now | {f"{kind}, nodes": len(nodes & alive) for kind, nodes in where.items()}


def measure(config: Path, nodes: int, patience: float = 120) -> dict[str, Any]:
    """Samples from before the run until the last node has gone, and when each stage began and ended."""
    import ray

    with cluster(nodes) as address:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(address=address, log_to_driver=False)
        began, started = time.time(), time.monotonic()
        samples = [sample(started)]
        command = [sys.executable, "-m", "jobs", "recover", "--config", str(config), "--ray.address", address]
        run = subprocess.Popen([*command, "--quiet"], cwd=REPOSITORY)
        ended = None
        while ended is None or samples[-1]["worker nodes"]:
            time.sleep(EVERY)
            samples.append(sample(started))
            if ended is None and run.poll() is not None:
                ended = samples[-1]["seconds"]
                if run.returncode:
                    raise SystemExit(run.returncode)
            if ended is not None and samples[-1]["seconds"] > ended + patience:
                break
        ray.shutdown()
    return {
        "nodes_allowed": nodes,
        "ended": ended,
        "stages": stages(config.parent / "run", began),
        "samples": samples,
    }


def stages(run: Path, began: float) -> dict[str, tuple[float, float]]:
    """Seconds from the start at which each stage of the run's log began and ended."""
    found: dict[str, list[float]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["stage"], []).append(record["time"] - began)
    return {stage: (round(min(times), 2), round(max(times), 2)) for stage, times in found.items()}


# --- what came out ------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter."""
    samples = result["samples"]
    gradient = KINDS["MapWorker(Map(WritePartition))"]

    def first(name: str, least: int) -> float | None:
        return next((s["seconds"] for s in samples if s[name] >= least), None)

    most = max(s["worker nodes"] for s in samples)
    spread = max(s[f"{gradient}, nodes"] for s in samples)
    return {
        "worker nodes at the start": samples[0]["worker nodes"],
        "worker nodes at most": most,
        "worker nodes at the end": samples[-1]["worker nodes"],
        "gradient actors at most": max(s[gradient] for s in samples),
        "nodes with gradient actors at most": spread,
        "seconds to the first worker node": first("worker nodes", 1),
        "seconds to the first gradient actor": first(gradient, 1),
        "seconds to the most worker nodes": first("worker nodes", most),
        "seconds to gradient actors on the most nodes": first(f"{gradient}, nodes", spread),
        "seconds of the run": result["ended"],
        "seconds from the run's end to no worker node": round(samples[-1]["seconds"] - result["ended"], 2),
    }


def figure(result: dict[str, Any], path: Path) -> None:
    """Worker nodes and actors against time, with the run's stages behind them, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "unbake"
    from matplotlib import pyplot

    shape, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    samples = result["samples"]
    seconds = [s["seconds"] for s in samples]
    for number, (stage, (start, stop)) in enumerate(result["stages"].items()):
        axes.axvspan(start, stop, color="0.93" if number % 2 else "0.87", lw=0)
        axes.text(
            (start + stop) / 2, 1.01, stage, transform=axes.get_xaxis_transform(), ha="center", fontsize=7
        )
    for name in ("worker nodes", *KINDS.values()):
        axes.step(seconds, [s[name] for s in samples], where="post", label=name)
    axes.axvline(result["ended"], color="0.3", lw=0.8, ls=":", label="unbake recover ends")
    axes.set(xlabel="seconds", ylabel="alive", xlim=(0, seconds[-1]), ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, frameon=False)
    shape.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the options, measure, and write JSON and the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} documents: under 3 minutes")
    parser.add_argument("--documents", type=int, help="documents of the corpus")
    parser.add_argument("--nodes", type=int, default=3, help="worker nodes at most")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--figure", type=Path, metavar="SVG")
    parser.add_argument(
        "--folder", type=Path, help="corpus, models and run; default: a temporary one, removed"
    )
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for a GPU
    folder = options.folder or Path(tempfile.mkdtemp(prefix="unbake-autoscaling-"))
    try:
        documents = options.documents or (QUICK if options.quick else DOCUMENTS)
        result = measure(write_spec(folder, documents, options.nodes), options.nodes)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    result["summary"] = summary(result)
    for name, value in result["summary"].items():
        print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()
