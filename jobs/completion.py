"""unbake completion: a script that completes commands, options, their values and files in bash or zsh."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

import shtab

from jobs.options import Parser, field_words

FILES = ("run", "config", "recipe", "features", "target", "out", "models.base", "models.finetuned", "run_dir")
"""Options and arguments, by their `dest`, whose values are files."""


def main(arguments: list[str]) -> int:
    """Print the script."""
    shell = parser().parse_args(arguments).shell
    print(shtab.complete(_whole(), shell=shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake completion`."""
    made = Parser(
        prog="unbake completion",
        description="Print a completion script. bash: write it to ~/.local/share/bash-completion/completions/unbake; "
        "zsh: to a file _unbake in a folder of $fpath.",
    )
    made.add_argument("shell", choices=["bash", "zsh"])
    return made


def _whole() -> argparse.ArgumentParser:
    """All commands as one parser, which nothing but the script is made from."""
    from jobs.__main__ import COMMANDS

    whole = argparse.ArgumentParser(prog="unbake")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        own = parser_of(name)
        for action in own._actions:
            _describe(action)
        commands.add_parser(name, parents=[own], add_help=False, help=text, conflict_handler="resolve")
    return whole


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    from jobs.__main__ import STAGES, stage_parser

    if command in STAGES:
        return stage_parser(command)
    parser: argparse.ArgumentParser = importlib.import_module(f"jobs.{command}").parser()
    return parser


def _describe(action: argparse.Action) -> None:
    """Tell shtab what an option's value may be."""
    if action.dest in FILES and action.nargs != 0:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.choices is None:
        action.choices = list(_words(action.dest)) or None


def _words(dest: str) -> Iterator[str]:
    """Values of a field of the spec that has a few, by its dotted name."""
    from engine.spec import RunSpec

    fields: Any = RunSpec.model_fields
    *sections, last = dest.split(".")
    for part in sections:
        fields = getattr(getattr(fields.get(part), "annotation", None), "model_fields", {})
    if last in fields:
        yield from ("true", "false") if fields[last].annotation is bool else field_words(fields[last])
