"""A run on S3: storage that fails is tried again, what is half-uploaded never counts, nobody learns the key."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
import s3fs
from botocore.exceptions import ConnectionClosedError

from engine.corpus import make_plan, read_partition
from engine.errors import UserError
from engine.gradients import PartitionGradients
from engine.integrity import verify
from engine.lock import LOCK, RunLock
from engine.rundir import RunDir
from engine.spec import Corpus
from engine.storage import BACK_OFF, Folder, again, failed
from engine.store import GradientStore, StoreShape
from faults import s3
from faults.dying import FILES
from faults.harness import make_case
from jobs.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with s3.server() as address:
        yield address


@pytest.fixture
def here(upstream: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """This process's way to the server, without failures."""
    s3fs.S3FileSystem.clear_instance_cache()  # they would go on asking the server of the tests before
    for name, value in s3.environment(upstream).items():
        monkeypatch.setenv(name, value)
    return upstream


def objects(address: str, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix of the bucket."""
    client = boto3.client("s3", endpoint_url=address, **s3.environment_arguments())
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=s3.BUCKET, Prefix=prefix):
        for entry in page.get("Contents", []):
            body = client.get_object(Bucket=s3.BUCKET, Key=entry["Key"])["Body"].read()
            found[entry["Key"].removeprefix(f"{prefix}/")] = body
    return found


def unbake(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, with a Ray of its own, whose way to S3 is `address`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))}
    quick = {"config_kwargs": {"read_timeout": 2, "connect_timeout": 2}}
    environment = {**clean, **s3.environment(address), "FSSPEC_S3": json.dumps(quick), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_what_others_wrote_is_seen_and_a_file_is_created_once(here: str) -> None:
    one, other = Folder(f"s3://{s3.BUCKET}/a"), Folder(f"s3://{s3.BUCKET}/a")
    assert not one.exists("")
    assert one.names() == []
    one.write_bytes("d/x", b"1")
    assert one.names("d") == ["x"]
    client = boto3.client("s3", endpoint_url=here, **s3.environment_arguments())
    client.put_object(Bucket=s3.BUCKET, Key="a/d/y", Body=b"2")
    assert other.names("d") == ["x", "y"]
    assert list(one.walk()) == ["d/x", "d/y"]
    assert one.create_json("once.json", {"a": 1})
    assert not other.create_json("once.json", {"a": 2})
    assert one.read_json("once.json") == {"a": 1}


def test_the_lock_works_on_an_object_store(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.lock.SETTLE", 0.05)
    folder = Folder(f"s3://{s3.BUCKET}/locked")
    with RunLock(folder):
        record = folder.read_json(LOCK)
    assert not folder.exists(LOCK)
    folder.write_json(LOCK, {**record, "processes": "another boot", "host": "elsewhere"})
    with RunLock(folder, beat=0.1, stale=0.3):
        assert folder.read_json(LOCK)["owner"] != record["owner"]
    assert not folder.exists(LOCK)


def test_plan_store_and_verification_get_through_failing_storage(
    upstream: str, tmp_path: Path, tiny_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten fails in one of five ways; what is there in the end is what was meant."""
    quick = {"config_kwargs": {"read_timeout": 0.5, "connect_timeout": 0.5}}
    monkeypatch.setitem(fsspec.config.conf, "s3", quick)
    failures = s3.Failures(share=1 / 10, seed=1, slow=0.7)
    corpus = Corpus(paths=[tiny_corpus], partition_rows=100)
    local = RunDir(str(tmp_path / "local"))
    with s3.proxy(upstream, failures) as address:
        for name, value in s3.environment(address).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for run in (RunDir(f"s3://{s3.BUCKET}/small"), local):
            plan = make_plan(corpus, run)
            store = GradientStore.create(
                run, StoreShape(2, plan.n_rows, 16, 100), np.ones(16), {"fingerprint": "f"}
            )
            for partition in range(plan.n_partitions):
                rows = plan.partition_range(partition)
                assert len(read_partition(plan, partition, corpus)) == len(rows)
                store.write(partition, some_gradients(len(rows), partition), "f", {})
            assert sorted(store.done("f")) == list(range(plan.n_partitions))
            GradientStore.open(run).read(0, plan.n_rows)
        remote = RunDir(f"s3://{s3.BUCKET}/small")
        for name in local.walk():
            if name.startswith(("gradients", "done")):
                assert remote.read_bytes(name) == local.read_bytes(name), name
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert set(failures.made) == set(s3.Failures.kinds), failures.made


@pytest.mark.slow
@pytest.mark.parametrize("put", range(FILES))
def test_storage_that_goes_away_in_the_middle_of_a_partition_leaves_none_that_counts(
    put: int, upstream: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload of its n-th object is cut in the middle, and nothing answers from then on."""
    quick = {"config_kwargs": {"read_timeout": 0.5, "connect_timeout": 0.5, "retries": {"max_attempts": 1}}}
    run = f"s3://{s3.BUCKET}/goes-away-{put}"
    GradientStore.create(RunDir(run), StoreShape(2, 20, 16, 10), np.ones(16), {"fingerprint": "f"})
    whole = some_gradients(10, 1)
    with s3.proxy(upstream, s3.GoesAway(put)) as address:
        monkeypatch.setitem(fsspec.config.conf, "s3", {**quick, "endpoint_url": address})
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match="cannot write"):
            GradientStore.open(RunDir(run), writable=True).write(0, whole, "f", {})
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in s3.environment(upstream).items():
        monkeypatch.setenv(name, value)
    assert (
        len([name for name in objects(upstream, f"goes-away-{put}") if not name.endswith(".json")]) == put + 1
    )
    store = GradientStore.open(RunDir(run), writable=True)
    assert store.done("f") == {}
    store.write(0, whole, "f", {})
    assert store.done("f").keys() == {0}
    np.testing.assert_array_equal(store.read(0, 10).features, whole.features)


def test_an_upload_in_parts_that_was_never_completed_is_no_file(upstream: str, here: str) -> None:
    client = boto3.client("s3", endpoint_url=upstream, **s3.environment_arguments())
    run = RunDir(f"s3://{s3.BUCKET}/parts")
    GradientStore.create(run, StoreShape(2, 20, 16, 10), np.ones(16), {"fingerprint": "f"})
    store = GradientStore.open(run, writable=True)
    store.write(0, some_gradients(10, 0), "f", {})
    for name in ("done/00000001.json", "gradients.zarr/features/c/0/1/0", "new.parquet"):
        body = (
            run.read_bytes(name.replace("1.json", "0.json").replace("/1/", "/0/")) if "/" in name else b"PAR1"
        )
        begun = client.create_multipart_upload(Bucket=s3.BUCKET, Key=f"parts/{name}")
        client.upload_part(
            Bucket=s3.BUCKET, Key=f"parts/{name}", UploadId=begun["UploadId"], PartNumber=1, Body=body
        )
        assert not run.exists(name)
        with pytest.raises(FileNotFoundError):
            run.read_bytes(name)
    assert run.names("done") == ["00000000.json"]
    assert GradientStore.open(run).done("f").keys() == {0}


@pytest.mark.slow
def test_an_upload_in_parts_gets_through_failing_storage_whole(
    upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 100 MB a file goes up in parts; some are refused, cut, or time out."""
    failures = s3.Failures(share=1 / 3, seed=2, slow=0.0)
    data = np.random.default_rng(0).bytes(120 << 20)
    with s3.proxy(upstream, failures) as address:
        for name, value in s3.environment(address).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        folder = Folder(f"s3://{s3.BUCKET}/large")
        for number in range(3):
            folder.write_bytes(f"{number}.bin", data)
    s3fs.S3FileSystem.clear_instance_cache()
    assert sum(failures.made.values()) >= 3, failures.made
    for number in range(3):
        assert objects(upstream, "large")[f"{number}.bin"] == data


def test_storage_that_fails_is_tried_again_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    closed = ConnectionClosedError(endpoint_url="http://s3")  # botocore's, and no OSError
    left = [OSError("Slow Down"), TimeoutError("no answer"), closed, None]

    def work() -> str:
        if (error := left.pop(0)) is not None:
            raise error
        return "done"

    assert again(work, 4) == "done"
    for step, pause in enumerate(pauses):
        least = BACK_OFF * 2**step
        assert least <= pause <= 2 * least
    assert len(pauses) == 3
    left[:] = [OSError("Slow Down")] * 4
    with pytest.raises(UserError, match=r"^storage failed 4 times: Slow Down\.$"):
        again(work, 4)
    left[:] = [closed] * 4
    with pytest.raises(UserError, match=r"^storage failed 4 times: Connection was closed .*http://s3"):
        again(work, 4)


def test_what_may_be_over_is_tried_again_in_its_own_words_and_what_lasts_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    tried = []

    def work(error: Exception) -> None:
        tried.append(error)
        raise failed("cannot write x", error)

    with pytest.raises(UserError, match=r"^cannot write x: slow down\.$"):
        again(lambda: work(TimeoutError("Slow Down.")), 3)
    assert len(tried) == 3
    for error in (OSError(errno.ENOSPC, "No space left"), PermissionError("Access Denied")):
        tried.clear()
        with pytest.raises(UserError, match=r"^cannot write x: "):
            again(lambda error=error: work(error), 3)
        assert len(tried) == 1


def test_a_partition_whose_shard_could_not_be_written_is_tried_again(
    upstream: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker does it: the client gave up, the partition is written anew, with the same bytes."""
    quick = {"config_kwargs": {"read_timeout": 0.5, "connect_timeout": 0.5, "retries": {"max_attempts": 1}}}
    run = f"s3://{s3.BUCKET}/again"
    GradientStore.create(RunDir(run), StoreShape(2, 10, 16, 10), np.ones(16), {"fingerprint": "f"})
    whole = some_gradients(10, 1)

    tries: list[dict[str, object]] = []
    monkeypatch.setattr("engine.storage.BACK_OFF", 0.01)
    with s3.proxy(upstream, s3.GoesAway(1)) as address:

        def write() -> None:
            """By way of a proxy that goes away; the second time past it."""
            settings = {} if tries else {**quick, "endpoint_url": address}
            tries.append(settings)
            with monkeypatch.context() as patch:
                patch.setitem(fsspec.config.conf, "s3", settings)
                patch.setattr(s3fs.S3FileSystem, "retries", 5 if not settings else 1)
                s3fs.S3FileSystem.clear_instance_cache()
                GradientStore.open(RunDir(run), writable=True).write(0, whole, "f", {})

        again(write)
    assert len(tries) == 2
    s3fs.S3FileSystem.clear_instance_cache()
    np.testing.assert_array_equal(GradientStore.open(RunDir(run)).read(0, 10).features, whole.features)


def test_storage_that_answers_nobody_is_one_sentence(
    here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever part of a command meets it: here the first that reads a run."""
    config = {"connect_timeout": 0.2, "read_timeout": 0.2, "retries": {"max_attempts": 1}}
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": config}
    )
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert main(["verify", f"s3://{s3.BUCKET}/nobody"]) == 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "http://127.0.0.1:1" in said
    assert "run the same command again" in said


def some_gradients(n: int, seed: int) -> PartitionGradients:
    """Random unit rows and what belongs beside them."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, n, 16))
    grid = np.ones((2, n), np.float32)
    return PartitionGradients(
        features=(rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16),
        scale=grid, loss=grid, norm=grid, alignment=grid,
        label=np.zeros(n, np.int32), confidence=np.ones(n, np.float32), tokens=np.ones(n, np.int32), problems={},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_failing_storage_ends_with_the_bytes_of_a_local_run(
    upstream: str, here: str, tmp_path: Path
) -> None:
    """Extraction, selection, resumption and verification, while one request in fifteen fails."""
    config = make_case(tmp_path, documents=512, select={"shards": 1, "size": 50})
    remote, local = f"s3://{s3.BUCKET}/run", str(tmp_path / "local")
    failures = s3.Failures(share=1 / 15, seed=0)
    said = []
    with s3.proxy(upstream, failures) as address:
        for command in ("extract", "select"):
            done = unbake(address, command, "--config", str(config), "--run_dir", remote, "--quiet")
            assert done.returncode == 0, done.stderr
            said.append(done.stdout + done.stderr)
        # a partition loses its record, another a shard, and the stage its completion: it goes on
        client = boto3.client("s3", endpoint_url=upstream, **s3.environment_arguments())
        whole = objects(upstream, "run")
        for lost in ("stages/extract.json", "done/00000003.json", "gradients.zarr/features/c/0/5/0"):
            client.delete_object(Bucket=s3.BUCKET, Key=f"run/{lost}")
        done = unbake(address, "extract", "--config", str(config), "--run_dir", remote)
        assert done.returncode == 0, done.stderr
        assert "extract: 128 documents to do" in done.stderr
        said.append(done.stdout + done.stderr)
        done = unbake(address, "report", "--config", str(config), "--run_dir", remote, "--quiet")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
        done = unbake(address, "verify", remote)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
    assert set(failures.made) == set(s3.Failures.kinds), failures.made
    assert sum(failures.made.values()) >= 20
    again = objects(upstream, "run")
    for command in ("extract", "select"):
        assert unbake(address, command, "--config", str(config), "--run_dir", local, "-q").returncode == 0
    kinds = ("gradients", "done", "selection.parquet", "plan.parquet", "quarantine.parquet")
    names = [name for name in again if name.startswith(kinds) and name != "plan.parquet"]
    assert len(names) > 80
    for name in names:
        assert again[name] == whole[name] == (tmp_path / "local" / name).read_bytes(), name
    assert LOCK not in again
    assert {"spec.yaml", "report.html", "log.jsonl"} <= again.keys()
    for text in [*said, *(body.decode("latin-1") for body in again.values())]:
        assert s3.SECRET not in text
        assert s3.ACCESS not in text
    run, name = RunDir(remote), "gradients.zarr/features/c/1/2/0"
    data = bytearray(run.read_bytes(name))
    data[len(data) // 3] ^= 4
    run.write_bytes(name, bytes(data))
    assert [damage.where for damage in verify(run).damage] == ["partition 2"]
