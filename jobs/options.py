"""The command line's options: a spec from --config and dotted overrides, validated once, in one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

from engine.errors import UserError
from engine.spec import RunSpec, load_yaml_mapping


def spec_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows every field of RunSpec as a dotted option, with its description."""
    parser = _Parser(prog=f"unbake {command}", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML spec; dotted options override its fields")
    parser.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
    parser.add_argument("-v", "--verbose", action="store_true", help="show Ray's own messages too")
    parser.add_argument("--print_config", action="store_true", help="print the resolved spec and exit")
    _add_fields(parser, RunSpec.model_fields, "")
    return parser


def _add_fields(parser: argparse.ArgumentParser, fields: dict[str, Any], prefix: str) -> None:
    for name, field in fields.items():
        section = getattr(field.annotation, "model_fields", None)
        if section is not None:
            _add_fields(parser, section, f"{prefix}{name}.")
            continue
        default = (
            "" if field.is_required() else f" (default: {field.get_default(call_default_factory=True)!r})"
        )
        # The spec itself is the one place where values are typed and checked. What is not given is left out
        # of the options, so that null can be given.
        parser.add_argument(
            f"--{prefix}{name}",
            metavar="V",
            type=_reader(field.annotation),
            default=argparse.SUPPRESS,
            help=f"{field.description or name}{default}".replace("%", "%%"),
        )


def read_spec(options: dict[str, Any]) -> RunSpec:
    """The spec that parsed options describe.

    Raises:
        UserError: an unreadable file, or a field that is unknown, missing or contradictory.
    """
    fields: dict[str, Any] = {}
    where = "the command line"
    if options.get("config"):
        where = options["config"]
        fields = load_yaml_mapping(_read(where), where)
    overridden = False
    for name, value in options.items():
        if name in RESERVED:
            continue
        _put(fields, name.split("."), value, where)
        overridden = True
    return RunSpec.from_dict(
        fields, f"{where} with overrides" if overridden and options.get("config") else where
    )


RESERVED = ("config", "quiet", "verbose", "print_config", "features", "target", "out")
"""Options that are no fields of the spec."""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the spec {path}: {(error.strerror or str(error)).lower()}.") from None
    except UnicodeDecodeError:
        raise UserError(f"the spec {path} is not a text file.") from None


def _put(fields: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    for part in path[:-1]:
        fields = fields.setdefault(part, {})
        if not isinstance(fields, dict):
            raise UserError(f"{where}: {part} must be a section with fields.")
    fields[path[-1]] = value


def _reader(annotation: Any) -> Callable[[str], Any]:
    """How an option's text is read: text fields take it as it is, `null` where they may be absent."""
    if annotation is str:
        return str
    if annotation == str | None:
        return lambda text: None if text in ("null", "~") else text
    return _value


def _value(text: str) -> Any:
    """An option's text as YAML would read it, so that lists, mappings and null are written as in a spec.

    Numbers are not left to YAML 1.1, which takes 1e-4 for text and 010 for eight.
    """
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if not re.match(r"^(\[|\{|null$|~$|\"|'|true$|false$)", text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError in place of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")
