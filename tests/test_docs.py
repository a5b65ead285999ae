"""The documentation says what is: links lead somewhere, commands, options and specs are real, examples run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from engine.sections import Section
from engine.spec import RunSpec
from jobs.__main__ import COMMANDS, main
from jobs.report import parser as report_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)


def fields(section: type[Section] = RunSpec, prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found |= {prefix + name} if inner is None else fields(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text())):
        if "://" in link or link.startswith(("mailto:", "#")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve()
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                link
            )


def test_the_readmes_tree_is_what_stands() -> None:
    """Every module and folder of the rooms, once, with a phrase; and nothing that is not there."""
    tree = next(block for kind, block in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "text")
    listed: dict[str, list[str]] = {}
    phrases = []
    for line in tree.splitlines():
        name, _, phrase = line.strip().partition(" ")
        if line[0] != " ":
            listed[name.rstrip("/")] = inside = []
            assert (ROOT / name).is_dir(), name
        else:
            inside.append(name)
        phrases.append(phrase.strip())
    for room in ("engine", "cluster", "jobs"):
        found = [path for path in (ROOT / room).iterdir() if path.name[0] not in "_."]
        stands = {f"{path.name}/" if path.is_dir() else path.name for path in found} - {"py.typed"}
        assert set(listed[room]) == stands
        assert len(listed[room]) == len(stands)
    assert all(phrases)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_options_are_real(page: Path) -> None:
    text, known = page.read_text(), fields()
    for command in re.findall(r"(?:^    |`)(?:\.venv/bin/)?unbake ([a-z]+)\b", text, re.M):
        assert command in COMMANDS, command
    for option in re.findall(r"--([a-z]+\.[a-z_.]*[a-z])\b", text):
        if option not in (
            "grid.strategy",
            "grid.seed",
        ):  # axes of an experiment's grid, as is what begins with spec.
            assert option.removeprefix("spec.") in known, option


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_specs_are_valid(page: Path) -> None:
    for kind, block in BLOCK.findall(page.read_text()):
        content = yaml.safe_load(block) if kind == "yaml" else None
        if isinstance(content, dict) and {"models", "corpus", "task"} <= content.keys():
            RunSpec.from_dict(content, str(page))


def test_the_report_has_the_options_that_are_documented() -> None:
    text = (ROOT / "docs/quickstart.md").read_text()
    options = {string for action in report_parser()._actions for string in action.option_strings}
    assert set(re.findall(r"(?<!-)--[a-z]+\b(?!\.)", text)) <= options | {"--run_dir", "--select"}


def test_the_worked_example_of_foreign_gradients_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/ecosystem.md").read_text()
    script = next(block for kind, block in BLOCK.findall(text) if "gradients.bin" in block)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    line = next(line for line in text.splitlines() if line.startswith("    unbake select --features grads"))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    assert "20 rows by greedy" in capsys.readouterr().out
    assert pq.read_metadata(tmp_path / "picks.parquet").num_rows == 20


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={"PATH": "/usr/bin", "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    assert api.count('class="doc doc-heading"') > 40
    assert not re.search(r'src="https?://', (tmp_path / "site/index.html").read_text())
