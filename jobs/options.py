"""The command line's options: a spec from --config and dotted overrides, validated once, in one sentence."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from engine.errors import UserError, nearest
from engine.extend import OneOf
from engine.sections import load_yaml_mapping, takes_list
from engine.spec import RunSpec


def spec_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows every field of RunSpec as a dotted option, with its description."""
    parser = Parser(
        prog=f"unbake {command}",
        usage=f"unbake {command} [RUN] [--section.field VALUE ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="YAML spec (as --config), or a run directory")
    parser.add_argument("--config", metavar="FILE", help="YAML spec; dotted options override its fields")
    parser.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
    parser.add_argument("-v", "--verbose", action="store_true", help="show Ray's own messages too")
    parser.add_argument("--print_config", action="store_true", help="print the resolved spec and exit")
    _add_fields(parser, RunSpec.model_fields, "")
    return parser


def _add_fields(parser: argparse._ActionsContainer, fields: dict[str, Any], prefix: str) -> None:
    for name, field in fields.items():
        section = getattr(field.annotation, "model_fields", None)
        if section is not None:
            about = (field.annotation.__doc__ or "").split("\n")[0]
            group = parser if prefix else parser.add_argument_group(name, about)
            _add_fields(group, section, f"{prefix}{name}.")
            continue
        # The spec itself is the one place where values are typed and checked. What is not given is left out
        # of the options, so that null can be given.
        parser.add_argument(
            f"--{prefix}{name}",
            metavar="V",
            type=_reader(field.annotation),
            default=argparse.SUPPRESS,
            help=_help(name, field).replace("%", "%%"),
        )


def field_words(field: Any) -> tuple[str, ...]:
    """The words that a field takes, where it takes a few."""
    if get_origin(field.annotation) is Literal:
        return tuple(map(str, get_args(field.annotation)))
    return next((note.words for note in field.metadata if isinstance(note, OneOf)), ())


def _help(name: str, field: Any) -> str:
    """A field's description, the values it can have, and its default where that says anything."""
    words = field_words(field)
    known = None if field.is_required() else field.get_default(call_default_factory=True)
    parts = [field.description or name.replace("_", " ")]
    parts += [f"one of {', '.join(words)}"] if words else []
    if isinstance(known, str) and "\n" in known:
        known = repr(known)
    parts += [] if known is None or known is False or known in ([], {}) else [f"default: {known}"]
    return "; ".join(parts)


def parse_spec(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[RunSpec | None, dict[str, Any]]:
    """The spec of a command line and all of its options; no spec where --print_config has printed it.

    Raises:
        UserError: as `read_spec`, or an option that the parser does not know.
    """
    options = vars(parser.parse_args(arguments))
    return asked_spec(options), options


def asked_spec(options: dict[str, Any]) -> RunSpec | None:
    """`read_spec` of parsed options; None where --print_config has printed it."""
    spec = read_spec(options)
    if options["print_config"]:
        print(spec.to_yaml(), end="")
        return None
    return spec


def read_spec(options: dict[str, Any]) -> RunSpec:
    """The spec that parsed options describe; those that are no fields of it are a command's own.

    Raises:
        UserError: an unreadable file, or a field that is unknown, missing or contradictory.
    """
    fields, where = _given(options.get("run"), options.get("config"))
    overrides = {n: value for n, value in options.items() if n.split(".")[0] in RunSpec.model_fields}
    for name, value in overrides.items():
        _put(fields, name.split("."), value, where)
    if not fields:
        raise UserError("say what to run: a YAML spec (unbake recover run.yaml) or a run directory.")
    return RunSpec.from_dict(fields, f"{where} with overrides" if overrides and where != NOWHERE else where)


def _given(run: str | None, config: str | None) -> tuple[dict[str, Any], str]:
    """The fields that a spec or a run directory holds, before overrides, and where they come from."""
    if run and config:
        raise UserError(f"give {run} or --config {config}, not both.")
    source = run or config
    if not source:
        return {}, NOWHERE
    if "://" not in source and not os.path.exists(source):
        raise UserError(f"{source} does not exist: give a YAML spec or a run directory (from {os.getcwd()}).")
    if os.path.isdir(source) or ("://" in source and not source.endswith((".yaml", ".yml"))):
        from engine.rundir import RunDir  # not needed to print help

        folder = RunDir(source)  # which may have been moved since it was written
        return folder.load_spec().model_dump(mode="json") | {"run_dir": folder.uri}, folder.uri
    if source.removesuffix(".gz").removesuffix(".zst").endswith(DOCUMENTS):
        raise UserError(f"{source} holds documents: name it in corpus.paths of a YAML spec, and give that.")
    return load_yaml_mapping(_read(source), source), source


DOCUMENTS = (".parquet", ".pq", ".jsonl", ".ndjson", ".csv", ".txt")
"""What a spec is never called."""

NOWHERE = "the command line"


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
    if takes_list(annotation):
        return read_list
    return read_value


def read_list(text: str) -> Any:
    """An option's text for a list: `[a, b]` as in YAML, or `a,b`; a value with a comma in it needs the brackets."""
    if text.startswith(("[", "{")) or text in ("null", "~"):
        return read_value(text)
    return [read_value(part.strip()) for part in text.split(",")]


def read_value(text: str) -> Any:
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


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError in place of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._nearest(message)}; see {self.prog} --help.")

    def _nearest(self, message: str) -> str:
        """The option that one nobody knows may have been meant as."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = [name for name in self._option_string_actions if name not in ("-h", "--help")]
        hint = nearest(unknown[1], known) if unknown else ""
        return f" ({hint}?)" if hint else ""
