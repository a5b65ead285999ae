"""Real text that is on every machine: the docstrings of installed packages, read as source, never imported."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 80, 600
"""Characters of a docstring: shorter ones say little, longer ones are cut."""

MOST_FILE_BYTES = 400_000


def docstrings(package: str, limit: int) -> list[str]:
    """Up to `limit` distinct docstrings of an installed package (or of `stdlib`), spread over its files.

    Deterministic for one version of the package: files and docstrings come in the order of their hashes.
    Empty when the package is not installed.
    """
    found: dict[str, None] = {}
    for file in sorted(_files(package), key=lambda path: _hash(str(path.name) + path.parent.name)):
        found |= dict.fromkeys(_of_file(file))
        if len(found) >= 2 * limit:
            break
    return sorted(found, key=_hash)[:limit]


def _files(package: str) -> Iterator[Path]:
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        folders = list(root.glob("*.py")) + [root / name for name in ("asyncio", "email", "http", "json")]
    else:
        spec = importlib.util.find_spec(package)
        folders = [Path(path) for path in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in [folder] if folder.is_file() else folder.rglob("*.py"):
            if "tests" not in file.parts and os.path.getsize(file) <= MOST_FILE_BYTES:
                yield file


def _of_file(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = " ".join((ast.get_docstring(node) or "").split())[:LONGEST]
            if len(text) >= SHORTEST and text.isprintable():
                yield text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
