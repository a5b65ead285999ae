"""docs/notebook.ipynb runs from top to bottom, on a Ray of its own, in a kernel of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A short path: those of sockets below it end at 107 bytes."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_notebook_runs_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ray_folder: str
) -> None:
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("DS_ACCELERATOR", "cpu"),
        ("TMPDIR", str(tmp_path)),
        ("RAY_TMPDIR", ray_folder),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", 4)
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "the same labels, and the same documents in the same order" in said
