"""verify: a flipped bit anywhere is found and named, and the next start repairs just what it hit."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

import cluster.extract
from engine.integrity import verify
from engine.rundir import DONE, LAYOUT, STORE, RunDir
from jobs.__main__ import main


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: str,
    tiny_finetuned: str,
    tiny_corpus: str,
    ray_session: None,
) -> Path:
    """A run whose extraction (4 partitions, 2 checkpoints, a quarantined document) and selection are complete."""
    folder = tmp_path_factory.mktemp("verify")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(Path(tiny_corpus).read_text() + '{"text": ""}\n')
    fields = {
        "run_dir": str(folder / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [str(corpus)], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32", "checkpoints": 2, "projector": "tensorsketch", "dim": 32},
        "extract": {"threads": 1, "workers_max": 1, "cpus_per_worker": 0.5},
        "select": {"size": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    for command in ("extract", "select"):
        assert main([command, "--config", str(folder / "run.yaml"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(run: Path) -> dict[str, str]:
    """sha256 of every file but the log."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def owner(name: str) -> str:
    """What has to be named when a file of the run is damaged."""
    parts = name.split("/")
    if parts[0] == DONE:
        return f"partition {int(parts[1].removesuffix('.json'))}:"
    if parts[0] == STORE and "c" in parts and parts[1] != "target":
        return f"partition {int(parts[4] if parts[1] == 'features' else parts[-1])}:"
    return LAYOUT if name == LAYOUT else f"{name}:"


def test_a_sound_run_is_said_to_be_sound_and_nothing_changes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main(["verify", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run}: 4 partitions, 201 documents, all sound\n"
    assert err == ""
    assert contents(run) == before


def test_a_flipped_bit_anywhere_in_the_store_is_found_and_named(run: Path) -> None:
    rng = random.Random(0)
    names = [n for n in contents(run) if n.startswith((f"{STORE}/", f"{DONE}/")) or n == LAYOUT]
    assert len(names) > 50
    for name in [*names, *names]:
        whole = (run / name).read_bytes()
        flip(run / name, rng)
        found = [str(damage) for damage in verify(RunDir(str(run))).damage]
        assert any(line.startswith(owner(name)) for line in found), (name, found)
        (run / name).write_bytes(whole)
    assert verify(RunDir(str(run))).damage == []


@pytest.mark.parametrize("name", ["selection.parquet", "quarantine.parquet"])
def test_a_flipped_bit_in_an_output_is_found_and_named(run: Path, name: str) -> None:
    for seed in range(20):
        whole = (run / name).read_bytes()
        flip(run / name, random.Random(seed))
        assert [damage.where for damage in verify(RunDir(str(run))).damage] == [name]
        (run / name).write_bytes(whole)


def test_lost_swapped_and_foreign_files_are_found(run: Path) -> None:
    def found() -> list[str]:
        return [str(damage) for damage in verify(RunDir(str(run))).damage]

    shard, other = run / STORE / "features/c/0/1/0", run / STORE / "features/c/0/2/0"
    one, two = shard.read_bytes(), other.read_bytes()
    shard.unlink()
    assert found() == ["partition 1: gradients.zarr/features/c/0/1/0 is missing"]
    shard.write_bytes(one[:-7])
    assert found()[0].startswith("partition 1: gradients.zarr/features/c/0/1/0 is damaged")
    shard.write_bytes(two)  # sound by its own checksum, and not this partition's
    assert found() == [
        "partition 1: its objects are intact one by one, and together not what was written (sha256)"
    ]
    shard.write_bytes(one)
    (run / DONE / "00000003.json").unlink()
    assert found() == ["partition 3: its completion record is missing"]
    (run / "stages/extract.json").unlink()
    assert found() == []  # an extraction that goes on, of which one partition is not there yet
    assert verify(RunDir(str(run))).missing == 1


@pytest.mark.parametrize(
    ("name", "repeated"),
    [
        ("gradients.zarr/features/c/1/2/0", [2]),
        ("gradients.zarr/zarr.json", []),
        ("gradients.json", []),
        ("selection.parquet", None),
    ],
)
def test_a_repair_repeats_what_was_hit_and_nothing_else(
    run: Path,
    finished: Path,
    name: str,
    repeated: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {path.name: path.stat().st_mtime_ns for path in (run / "stages").glob("*.json")}
    flip(run / name, random.Random(1))
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"`unbake verify {run} --repair`" in out
    assert main(["verify", str(run), "--repair", "--quiet"]) == 1
    todo: list[int] = []
    real = cluster.extract.extract

    def spy(job: Any, some: list[int], *more: Any) -> None:
        todo.extend(some)
        real(job, some, *more)

    monkeypatch.setattr(cluster.extract, "extract", spy)
    for command in ("extract", "select"):
        arguments = [command, "--config", str(run / "spec.yaml"), "--run_dir", str(run), "--quiet"]
        assert main(arguments) == 0
    assert todo == (repeated or [])
    assert main(["verify", str(run)]) == 0
    again = {path.name: path.stat().st_mtime_ns for path in (run / "stages").glob("*.json")}
    assert {n for n in stages if stages[n] != again[n]} == (
        {"select.json"} if repeated is None else {"extract.json"}
    )
    same = [n for n in contents(finished) if not n.startswith(("stages/", "spec.yaml"))]
    assert {n: contents(run)[n] for n in same} == {n: contents(finished)[n] for n in same}


def test_numbers_that_were_wrong_when_they_were_written_are_found(run: Path) -> None:
    """Checksums agree with what was written; what was written is looked at as well."""
    import numpy as np

    from engine.gradients import PartitionGradients
    from engine.store import GradientStore

    store = GradientStore.open(RunDir(str(run)), writable=True)
    columns = {n: store.raw(n, 0, 64) for n in ("features", "scale", "loss", "norm", "alignment")}
    columns |= {n: store.raw(n, 0, 64) for n in ("label", "confidence", "tokens")}
    stamp = str(store.attributes["fingerprint"])
    for name, place, value, said in [
        ("features", (0, 3), np.nan, "row 3 of the partition has norm nan"),
        ("features", (1, 5), 0.5, "row 5 of the partition has norm"),
        ("scale", (0, 1), np.inf, "a valid document has a scale that is not finite"),
        ("loss", (1, 9), np.nan, "a valid document has a loss that is not finite"),
    ]:
        changed = {**columns, name: columns[name].copy()}
        changed[name][place] = value
        store.write(0, PartitionGradients(**changed, problems={}), stamp, {})
        (damage,) = verify(RunDir(str(run))).damage
        assert damage.where == "partition 0"
        assert said in damage.what
    store.write(0, PartitionGradients(**columns, problems={}), stamp, {})
    assert verify(RunDir(str(run))).damage == []


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path)], [str(tmp_path / "none")], []):
        assert main(["verify", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("unbake verify: ")
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
