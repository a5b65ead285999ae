"""Three hosts with addresses and disks of their own, the run on S3: hosts are lost, others come, no byte differs."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import ray

from engine.lock import LOCK
from faults import hosts, s3
from faults.harness import Driver, make_case, outputs
from faults.nodes import GRADIENTS, INDEX, NOTICED, SPREAD, TRAINING, wait_until

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
PORT = 6379

SHARDS = {"shards": 3, "cpus_per_shard": 0.3}
"""All of them find a place on one host, while another one joins."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four partitions, in a folder that all hosts see; `hosts.yaml` has the paths as they see them."""
    folder = tmp_path_factory.mktemp("hosts") / "image"
    folder.mkdir()
    path = make_case(folder, 24 * 64, extract=SPREAD, select=SHARDS)
    (folder / "hosts.yaml").write_text(path.read_text().replace(str(folder), hosts.IMAGE))
    return path


@pytest.fixture(scope="module")
def serial(case: Path, ray_session: None) -> Path:
    """The same run on this machine's disk, one partition after the other, selected without shards."""
    run = case.parents[1] / "serial"
    alone = ("--extract.workers_min", "1", "--extract.workers_max", "1", "--select.shards", "1")
    driver = Driver("recover", case, run, str(ray.get_runtime_context().gcs_address), *alone)
    assert driver.wait(300) == 0, driver.said.read_text()
    return run


@pytest.fixture
def bridge(case: Path) -> Iterator[hosts.Hosts]:
    """A network without hosts yet; skips where this machine does not let us make one."""
    if any(str(path).startswith("/tmp/") for path in (ROOT, sys.prefix)):
        pytest.skip("each host has a /tmp of its own, and the code lies in /tmp here")
    try:
        with hosts.hosts(case.parent) as made:
            yield made
    except hosts.Unavailable as why:
        pytest.skip(f"no network namespaces here: {why}")


class Run:
    """What has been written so far on the S3 server."""

    def __init__(self, address: str, prefix: str) -> None:
        self._client = boto3.client("s3", endpoint_url=address, **s3.environment_arguments())
        self._prefix = prefix

    def names(self, below: str = "") -> list[str]:
        """Objects of the run whose names begin so."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=s3.BUCKET, Prefix=f"{self._prefix}/{below}"
        )
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [name.removeprefix(f"{self._prefix}/") for name in found]

    def download(self, folder: Path) -> None:
        """All of it, as files."""
        for name in self.names():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(s3.BUCKET, f"{self._prefix}/{name}", str(folder / name))


def environment(address: str) -> dict[str, str]:
    """Of everything in the hosts: the way to the S3 server, and the cluster's token."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**clean, **token, **s3.environment(address), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class RayHosts:
    """A head and workers of one CPU, each a host."""

    def __init__(self, bridge: hosts.Hosts, environment: dict[str, str]) -> None:
        self._bridge, self._environment = bridge, environment
        config = json.dumps(NOTICED)
        self.head = self._start(
            "--head",
            f"--port={PORT}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--system-config={config}",
        )
        hosts.wait_for(PORT, self.head)
        self.address = f"{self.head.address}:{PORT}"
        self.workers: list[hosts.Host] = []

    def add(self) -> hosts.Host:
        """One more worker."""
        self.workers.append(self._start(f"--address={self.address}", "--num-cpus=1"))
        return self.workers[-1]

    def _start(self, *arguments: str) -> hosts.Host:
        common = ("--block", "--node-ip-address={address}", "--disable-usage-stats")
        memory = f"--object-store-memory={100 << 20}"
        return self._bridge.start(self._environment, RAY, "start", *common, memory, *arguments)

    def holding(self, kind: str) -> list[hosts.Host]:
        """Workers that run a Ray worker of a kind."""
        return [host for host in self.workers if host.alive and host.runs(kind)]

    def lose_one(self, kind: str) -> None:
        """One that holds a worker of a kind loses its power, another one joins."""
        victim = self.holding(kind)[0]
        victim.power_off()
        self.workers.remove(victim)
        self.add()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hosts_that_are_lost_and_replaced_in_every_stage_leave_the_bytes_of_a_serial_run(
    case: Path, serial: Path, bridge: hosts.Hosts
) -> None:
    here = case.parents[1]
    with s3.server(bridge.gateway) as address:
        run = Run(address, "run")
        cluster = RayHosts(bridge, environment(address))
        for _ in range(2):
            cluster.add()
        wait_until(
            lambda: all(host.joined for host in cluster.workers),
            lambda: all(host.alive for host in cluster.workers),
        )
        said = here / "driver.said"
        recover = ("recover", "--config", f"{hosts.IMAGE}/hosts.yaml", "--run_dir", f"s3://{s3.BUCKET}/run")
        where = ("--ray.address", cluster.address, "--quiet")
        driver = cluster.head.popen(said, sys.executable, "-m", "jobs", *recover, *where)

        def alive() -> bool:
            return driver.poll() is None

        wait_until(lambda: len(run.names("done/")) >= 2 and cluster.holding(GRADIENTS), alive)
        cluster.lose_one(GRADIENTS)
        assert not run.names("stages/extract.json")
        for kind in (INDEX, TRAINING):
            wait_until(lambda kind=kind: cluster.holding(kind), alive)
            cluster.lose_one(kind)
        try:
            code = driver.wait(400)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise
        assert code == 0, said.read_text()
        assert LOCK not in run.names()
        run.download(here / "run")
    ours, theirs = outputs(here / "run"), outputs(serial)
    ours.pop("plan.parquet"), theirs.pop("plan.parquet")  # it has the corpus's path, which differs
    assert ours == theirs
    assert len(ours) > 100
    assert list((case.parent).glob("run*")) == [case]  # nothing was written beside the spec
