"""The rooms' arrows point one way: jobs -> cluster -> engine, also through lazy imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"engine": {"ray", "deepspeed", "cluster", "jobs"}, "cluster": {"jobs"}}


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import anywhere in a file, by statement, importlib or __import__."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "importorskip"):
                names = [str(node.args[0].value)]
        for name in names:
            yield node.lineno, name.split(".")[0]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_import_points_back(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported(file)
        if name in FORBIDDEN[room]
    ]
    assert not wrong


def test_the_check_sees_lazy_imports(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text(
        "def f():\n    import ray.data\n    __import__('jobs')\n    importlib.import_module('cluster.x')\n"
    )
    assert {name for _, name in imported(file)} == {"ray", "jobs", "cluster"}


def test_engine_loads_without_ray_or_deepspeed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pkgutil, importlib, engine\n"
        "for m in pkgutil.walk_packages(engine.__path__, 'engine.'): importlib.import_module(m.name)\n"
        "bad = {'ray', 'deepspeed', 'cluster', 'jobs'} & {n.split('.')[0] for n in sys.modules}\n"
        "sys.exit(f'engine pulls in {bad}' if bad else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
