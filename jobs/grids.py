"""Grids of experiments: the recipes that come with the program, YAML files, and options laid over either."""

from __future__ import annotations

import os
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from engine.errors import UserError, nearest
from engine.experiment import Grid
from engine.experiment.grid import put
from engine.sections import load_yaml_mapping, section_from_fields
from engine.storage import reason
from jobs.options import read_value


def recipes() -> list[str]:
    """Names of the recipes that come with the program."""
    found = (entry.name for entry in _recipes().iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def _recipes() -> Traversable:
    return resources.files("jobs").joinpath("recipes/experiments")


def read_grid(source: str | None, changes: list[str]) -> Grid:
    """A grid from a recipe's name or a YAML file, with dotted options (`--spec.select.size 100`).

    A file may say `extends: NAME` (a recipe) or `extends: FILE` (from its own folder): it is then read into that one,
    section by section.

    Raises:
        UserError: no such file, an option without a value, or fields that make no grid.
    """
    if source is None:
        raise UserError(f"give a grid: --config FILE, or one of the recipes {', '.join(recipes())}.")
    fields = _read(source)
    if len(changes) % 2 or any(not name.startswith("--") for name in changes[::2]):
        raise UserError(f"options are --field VALUE: cannot read {' '.join(changes)}.")
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        section, _, axis = name[2:].partition(".")
        if section == "grid":  # an axis has dots of its own
            put(fields, "grid", {**fields.get("grid", {}), axis: read_value(value)}, "the command line")
        else:
            put(fields, name[2:], read_value(value), "the command line")
    return section_from_fields(Grid, fields, source)


def grid_yaml(grid: Grid) -> str:
    """The grid as YAML that reads back as the same."""
    import yaml

    return yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(source: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a recipe or file laid over those that it extends; `below` are the files that extend it."""
    if source in recipes():
        text = _recipes().joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            within = " or ".join(name for name in recipes() if source in name)
            hint = f"did you mean {within}" if within else nearest(source, recipes(), 3)
            hint = f"{hint}?" if hint else f"recipes are {', '.join(recipes())}."
            raise UserError(f"cannot read the grid {source}: {reason(error)}; {hint}") from None
    fields = load_yaml_mapping(text, source)
    extended = fields.pop("extends", None)
    if extended is None:
        return fields
    parent = str(extended)
    if parent not in recipes():
        parent = os.path.normpath(os.path.join(os.path.dirname(source), parent))
    if parent in (source, *below):
        raise UserError(f"{source}: extends: {parent} extends itself, by way of this file: name another.")
    return _merged(_read(parent, (source, *below)), fields)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section; the grid, whose axes are one thing, as a whole."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict) and name != "grid"
        merged[name] = _merged(below[name], value) if both else value
    return merged
