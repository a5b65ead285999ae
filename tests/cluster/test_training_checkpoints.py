"""Checkpoints on any URI: only whole ones count, and the last k are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.checkpoints import Checkpoints
from engine.errors import UserError
from engine.storage import Folder


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A folder of an S3 server of our own."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from faults.s3 import BUCKET, environment, server

    with server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["file", "memory", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "job")
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
    return f"{root}/{tmp_path.name}/job"


def write(folder: str) -> None:
    Path(folder, "state").mkdir()
    Path(folder, "state/part-0").write_bytes(b"weights")
    Path(folder, "scalars").write_bytes(b"5")


def test_the_last_k_are_kept_and_the_last_one_is_found_with_its_files(uri: str) -> None:
    checkpoints = Checkpoints(uri, keep=2, local_rank=0)
    assert checkpoints.last() is None
    for step in (5, 10, 100):
        checkpoints.save(step, {"position": {"step": step}}, write)
    assert [name for name in Folder(uri).names() if name.endswith(".json")] == [
        "000000010.json",
        "000000100.json",
    ]
    assert not Folder(uri).exists("000000005/state/part-0")
    record = checkpoints.last()
    assert record is not None
    assert record["position"] == {"step": 100}
    with checkpoints.opened(record["name"]) as folder:
        assert Path(folder, "state/part-0").read_bytes() == b"weights"
    checkpoints.discard()
    assert checkpoints.last() is None
    assert not list(Folder(uri).walk())


def test_one_that_was_cut_short_or_damaged_is_passed_over(uri: str) -> None:
    checkpoints = Checkpoints(uri, keep=3, local_rank=0)
    for step in (1, 2):
        checkpoints.save(step, {"step": step}, write)

    def killed(folder: str) -> None:
        Path(folder, "scalars").write_bytes(b"5")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(3, {"step": 3}, killed)
    assert checkpoints.last()["step"] == 2, "a worker died while writing the third"
    Folder(uri).fs.pipe_file(Folder(uri).path("000000002/state/part-0"), b"weig")
    assert checkpoints.last()["step"] == 1, "the second lost three bytes"
    checkpoints.save(3, {"step": 3}, write)
    assert checkpoints.last()["step"] == 3, "what was left of the third is no hindrance"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def full(folder: str) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(str(tmp_path / "job"), keep=3, local_rank=0)
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*job: no space left on device\.$"):
        checkpoints.save(1, {}, full)
    assert checkpoints.last() is None
