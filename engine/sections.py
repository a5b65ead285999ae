"""Sections: frozen groups of fields, read from YAML; what is wrong in one becomes a sentence that names the field."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from engine.errors import UserError, nearest

PASSWORD = re.compile(r"[a-z0-9+.-]+://[^/\s]*:[^/\s]*@", re.IGNORECASE)
"""How an address with a name and a password begins."""


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _lone(cls, value: Any, info: ValidationInfo) -> Any:
        """A value by itself where a list belongs is a list of one: `paths: corpus.jsonl`."""
        listed = takes_list(cls.model_fields[str(info.field_name)].annotation)
        return [value] if listed and type(value) in (str, int, float) else value

    @field_validator("*")
    @classmethod
    def _no_password(cls, value: Any) -> Any:
        """A spec is written beside its results and shown in the report: nothing secret may be in it."""
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and PASSWORD.match(text) for text in texts):
            raise ValueError(
                "an address with a password in it: leave it out and give credentials in the environment (such as "
                "AWS_ACCESS_KEY_ID) or in the provider's own files"
            )
        return value


def takes_list(annotation: Any) -> bool:
    """Whether a field is a list, or a list or nothing."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    return get_origin(annotation) is list or all(get_origin(kind) is list for kind in kinds)


S = TypeVar("S", bound=Section)


def section_from_fields(kind: type[S], fields: dict[str, Any], where: str) -> S:
    """Validate one section by itself; UserError names the first offending field in one sentence."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UserError(one_sentence(error, where, kind)) from None


def load_yaml_mapping(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping as a dict, or a UserError that says where the text stops being one."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = "; indent with spaces, not with tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where} is not valid YAML{line}: {problem}{hint}.") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UserError(f"{where} must be a mapping of sections (models, corpus, task, ...).")
    return fields


def one_sentence(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    """The first problem of a pydantic error on `kind` as one sentence that names the field."""
    # An unknown field is named before what is missing: it is usually the same field, misspelt.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic adds the member of a union that it tried to the field's name.
    name = ".".join(str(part) for part in problem["loc"] if part not in ("int", "list[float]"))
    if problem["type"] == "extra_forbidden":
        text = f"{where}: unknown field {name}{_nearest(kind, name)}"
    elif problem["type"] == "missing":
        text = f"{where}: {name} is missing"
    elif problem["type"] == "value_error":
        message = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
        text = f"{where}: {name + ': ' if name else ''}{message}"
    else:
        text = f"{where}: {name}: {problem['msg']} (got {reprlib.repr(problem.get('input'))})"
        if problem["type"] == "string_type" and isinstance(problem["input"], bool):
            text += "; put it in quotes: YAML reads a bare yes, no, on or off as true or false"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{text}{more}."


def _nearest(kind: type[BaseModel], name: str) -> str:
    """What a name that nobody knows may have been meant as, or the names that stand in its section."""
    known = list(_field_names(kind, ""))
    section, _, last = name.rpartition(".")
    beside = [field for field in known if field.rpartition(".")[0] == section]
    elsewhere = [field for field in known if field.rpartition(".")[2] == last]
    hint = nearest(name, beside, likeness=0.75) or nearest(name, elsewhere, likeness=0)
    if not beside:  # the section itself is unknown
        hint = hint or nearest(name, known)
    if hint:
        return f" ({hint}?)"
    names = [field.rpartition(".")[2] for field in beside]
    return f" ({section or 'it'} has {', '.join(names[:16])}{', ...' if len(names) > 16 else ''})"


def _field_names(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _field_names(field.annotation, f"{prefix}{name}.")
