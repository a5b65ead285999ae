"""unbake doctor: every finding has its remedy, and a check that breaks is a finding too."""

from __future__ import annotations

import io
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from jobs import doctor
from jobs.__main__ import main


def test_it_looks_at_everything_and_ray_really_runs(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert main(["doctor", "--run_dir", str(tmp_path / "not/yet/there")]) == 0
    out = capsys.readouterr().out
    for name in (
        "python",
        "packages",
        "extras",
        "gpu",
        "cpu",
        "memory",
        "run_dir",
        "ray",
        "deepspeed",
        "hub",
    ):
        assert f" {name} " in out
    assert "a task ran on" in out
    assert "nothing is wrong" in out
    assert "\x1b" not in out


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor._builds().state == "ok"
    (tmp_path / "py311_cpu/op").mkdir(parents=True)
    lock = tmp_path / "py311_cpu/op/lock"
    with lock.open("w"):
        assert doctor._builds().state == "ok"  # a builder is at work
    found = doctor._builds()
    assert found.state == "note"
    assert found.remedy.endswith(f"rm {tmp_path}/py311_cpu/op/lock")


def test_versions_outside_the_declared_bounds_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._packages().state == "ok"
    real = metadata.version

    def version(name: str) -> str:
        if name == "zarr":
            raise metadata.PackageNotFoundError
        return "99.0" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = doctor._packages()
    assert found.state == "wrong"
    assert "torch 99.0 is not" in found.found
    assert "zarr is missing" in found.found
    assert "pip install" in found.remedy


def test_what_breaks_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise RuntimeError("no such counter\nmore")

    fine = doctor.Check("fine", "ok", "as it should be")
    for name in (
        "_python",
        "_packages",
        "_extras",
        "_gpu",
        "_cpu",
        "_shared_memory",
        "_files",
        "_deepspeed",
        "_hub",
    ):
        monkeypatch.setattr(doctor, name, lambda: fine)
    monkeypatch.setattr(doctor, "_disk", lambda _: fine)
    monkeypatch.setattr(doctor, "_ray", lambda _: fine)
    monkeypatch.setattr(doctor, "_memory", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no such counter" in out
    assert "1 wrong" in out
    assert out.count("as it should be") == 11


def test_an_unreachable_hub_and_a_closed_folder_have_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = doctor._hub()
    assert found.state == "note"
    assert "HF_ENDPOINT" in found.remedy
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    assert doctor._hub().state == "ok"
    monkeypatch.setattr("os.access", lambda *_: False)
    found = doctor._disk(str(tmp_path))
    assert found.state == "wrong"
    assert "permissions" in found.remedy
