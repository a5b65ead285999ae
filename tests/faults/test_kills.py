"""Planned deaths: at each file of a partition, of a partition that kills all, by SIGTERM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

import cluster.extract
from engine.errors import UserError
from engine.integrity import verify
from engine.lock import LOCK
from engine.rundir import RunDir
from faults import dying
from faults.harness import Driver, assert_same, make_case, run
from jobs.__main__ import main
from jobs.stopping import EXIT_CODE

ray.cloudpickle.register_pickle_by_value(dying)  # workers cannot import it


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve partitions."""
    return make_case(tmp_path_factory.mktemp("kills"), documents=12 * 64)


@pytest.fixture(scope="module")
def undisturbed(case: Path, address: str) -> Path:
    driver = Driver("extract", case, case.parent / "undisturbed", address)
    assert driver.wait(300) == 0, driver.said.read_text()
    return case.parent / "undisturbed"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_killed_between_its_data_and_its_record_leaves_no_trace(
    case: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.extract, "WritePartition", dying.DiesAtTheRecord)
    finished = run(case, "record")
    assert [path.name for path in case.parent.glob("record-died-*")] == ["record-died-4"]
    assert_same(finished, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_killed_at_any_file_of_its_partition_leaves_no_trace(
    case: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.extract, "WritePartition", dying.DiesAtEachFile)
    finished = run(case, "files", max_attempts=12)
    assert len(list(case.parent.glob("files-died-*"))) == dying.FILES
    assert_same(finished, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("stage", "stand_in"),
    [("WritePartition", dying.AlwaysDies), ("EncodePartition", dying.AlwaysDiesEncoding)],
)
def test_a_partition_that_kills_every_worker_is_named_and_the_others_are_kept(
    stage: str, stand_in: type, case: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"kills-{stage}"
    with monkeypatch.context() as patch:
        patch.setattr(cluster.extract, stage, stand_in)
        with pytest.raises(
            UserError, match=r"^partition (\d+ or )*5( or \d+)* was lost 2 times with its worker"
        ) as caught:
            run(case, name, max_attempts=2)
    assert "\n" not in str(caught.value)
    run_dir = RunDir(str(case.parent / name))
    kept = {path: (case.parent / name / "done" / path).read_bytes() for path in run_dir.names("done")}
    assert "00000005.json" not in kept
    assert verify(run_dir).damage == []
    assert_same(run(case, name), undisturbed)  # its cause is mended: it goes on
    assert all((case.parent / name / "done" / path).read_bytes() == kept[path] for path in kept)


def test_sigterm_stops_cleanly_with_a_hint_and_a_second_driver_is_refused_meanwhile(
    case: Path, undisturbed: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = case.parent / "stopped"
    driver = Driver("extract", case, folder, address)
    deadline = time.monotonic() + 120
    while driver.alive and len(list(folder.glob("done/*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.signal(signal.SIGSTOP)  # so that it is there when the second one, in this process, looks
    second = main(["extract", "--config", str(case), "--run_dir", str(folder)])
    driver.signal(signal.SIGCONT)
    assert second == 2
    assert f"process {driver.process.pid}, since " in capsys.readouterr().err
    driver.signal(signal.SIGTERM)
    code, said = driver.wait(60), driver.said.read_text()
    assert code == EXIT_CODE == 143, said
    assert "stopped by SIGTERM; to go on from here: unbake extract --config" in said
    assert "Traceback" not in said
    assert not (folder / LOCK).exists()
    assert 2 <= len(list(folder.glob("done/*.json"))) < 12
    third = Driver("extract", case, folder, address)
    assert third.wait() == 0, third.said.read_text()
    assert_same(folder, undisturbed)


def test_lost_permission_and_a_full_disk_after_extraction_are_one_sentence_and_it_goes_on(
    case: Path, undisturbed: Path, mounted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = mounted("8m")
    folder = Path(shutil.copytree(undisturbed, disk / "run"))
    mount = str(shutil.which("mount"))
    arguments = ["select", "--config", str(case), "--run_dir", str(folder), "--quiet", "--select.shards", "1"]
    subprocess.run([mount, "-o", "remount,ro", str(disk)], check=True, timeout=60)
    for _ in range(2):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "read-only file system" in err
        assert err.count("\n") == 1
    subprocess.run([mount, "-o", "remount,rw", str(disk)], check=True, timeout=60)
    stat = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * (stat.f_bavail * stat.f_frsize - 3 * stat.f_frsize))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "no space left on device" in err
    assert err.count("\n") == 1
    (disk / "filler").unlink()
    assert main(arguments) == 0
    assert main(["verify", str(folder)]) == 0
    assert sorted(path.name for path in folder.glob("*select*")) == ["selection.parquet"]
