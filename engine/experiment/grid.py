"""Grid: the description of an experiment, and the cells (one spec, strategy and seed each) it stands for."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.errors import UserError
from engine.rundir import fingerprint
from engine.sections import Section
from engine.spec import SEEDED, DType, Placement, Retrain, RunSpec, Strategy

DATA = "data:"
"""Prefix by which a spec names a sample of the grid: `data:hidden`."""

Judged = Literal["both", "validation", "test"]
"""Which of the held-out documents models are judged on: the validation share, the rest, or both."""

STRATEGY, SEED, LEAK = "strategy", "seed", "leak"
"""Axes with a meaning of their own; all others set fields of the spec."""

COLUMNS = (
    "metric", "judged", "value", "validation", "base", "finetuned", "documents", "selected", "objective", "peak_size",
    "random_objective", "mean_confidence", "projector", "dim", "store_bytes", "extract_seconds", "select_seconds",
    "train_seconds", "final_loss", "extraction", "training",
)  # fmt: skip
"""Columns of the results beside axes, strategy, seed and distances; no axis may have such a name."""

EXTRACTION = ("models", "corpus", "task", "gradients", "extract")
"""Sections of the spec that the store depends on: cells that agree in them share one extraction."""


class Sample(Section):
    """Documents that the experiment takes from a file or a Hub data set, written once as Parquet.

    A local file is taken where it exists, else the Hub data set; `rows` of the rows that `where` keeps, drawn
    without replacement by `seed` after the first `skip`, so that two samples of one source need not overlap.
    """

    path: str | None = Field(None, description="parquet, jsonl or csv file; relative to the grid's data_dir")
    hub: str | None = Field(None, description="Hub data set, used where path is not there (extra: datasets)")
    hub_config: str | None = Field(None, description="configuration of the Hub data set")
    hub_split: str = Field("train", description="split of the Hub data set")
    hub_revision: str | None = Field(None, description="Hub revision of the data set")
    hub_rows: int | None = Field(
        None, ge=1, description="read only the first so many rows of the Hub data set, streamed"
    )
    where: dict[str, str | int | list[str | int]] = Field(
        default_factory=dict, description="column -> value, or values, that rows must have (path alone)"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column -> column of the source (`answers.0`: the first of a list); default: all, as they are",
    )
    rows: int | None = Field(None, ge=1, description="how many rows; default: all")
    skip: int = Field(0, ge=0, description="rows of the drawn order left to another sample")
    seed: int = Field(0, ge=0, description="seed of the draw")

    @model_validator(mode="after")
    def _source(self) -> Sample:
        if not (self.path or self.hub):
            raise ValueError("a sample needs a path or a hub data set")
        return self


class Base(Section):
    """What the experiment makes of `spec.models.base` before anything is done with it; written once."""

    dtype: DType | None = Field(None, description="type its weights are rounded to; default: as they are")
    untie: bool = Field(
        False, description="give the output layer weights of its own, equal to the input embedding's"
    )

    @property
    def key(self) -> list[Any]:
        """What names of models depend on; nothing where nothing is changed."""
        return [self.model_dump(mode="json")] if self != Base() else []


class FineTune(Section):
    """Making the fine-tuned model that is to be explained, where none is given."""

    documents: str = Field(description="the hidden training set: data:NAME or a Parquet file (text, label)")
    epochs: int = Field(2, ge=1)
    seed: int = Field(7, ge=0)
    trajectory_steps: int = Field(
        0,
        ge=0,
        description="keep the model of every so many steps, for unbake diagnose --trajectory; 0: none",
    )
    retrain: dict[str, Any] = Field(
        default_factory=dict, description="fields of the retrain section that differ in fine-tuning"
    )


class Grid(Section):
    """An experiment: a spec, and axes along which its fields vary.

    An axis is a dotted field with a list of values, or a name of one's own with named settings, each of them
    dotted fields with their values. `strategy` and `seed` are axes; `leak` lists shares of the hidden training
    documents that are put into the corpus.
    """

    run_dir: str = Field("runs/experiment", min_length=1, description="where everything is written")
    name: str | None = Field(
        None,
        pattern=r"^[\w-]+$",
        description="results go into results/<name>/, where several grids share a run_dir; default: into run_dir",
    )
    data_dir: str = Field(".", description="folder that the paths of samples are relative to")
    data: dict[str, Sample] = Field(default_factory=dict, description="samples by name")
    base: Base = Field(Base(), description="changes of the base model that everything starts from")
    finetune: FineTune | None = Field(None, description="make models.finetuned by training on documents")
    spec: dict[str, Any] = Field(description="the spec that all cells share; run_dir is the grid's to set")
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="the axes"
    )
    judge: Judged = Field(
        "both",
        description="documents that models are judged on: validation while anything is still to be chosen, test "
        "once it is; both judges on each, and shows the test's results",
    )
    keep_models: bool = Field(False, description="keep the retrained models; by default only their results")
    models_at_once: int = Field(
        16, ge=1, description="retrained models on disk at a time, unless they are kept"
    )

    @field_validator("grid")
    @classmethod
    def _axes(cls, axes: dict[str, Any]) -> dict[str, Any]:
        for name, values in axes.items():
            if not values:
                raise ValueError(f"axis {name} has no values")
            if name in COLUMNS or name.startswith("distance_"):
                raise ValueError(f"axis {name} has the name of a column of the results: choose another")
            if name in (STRATEGY, SEED, LEAK) and isinstance(values, dict):
                raise ValueError(f"axis {name} must be a list")
            labels = [label_of(value) for value in values]
            if len(set(labels)) != len(labels):
                raise ValueError(f"axis {name} has a value twice")
        if any(not (isinstance(share, int | float) and 0 <= share <= 1) for share in axes.get(LEAK, [])):
            raise ValueError("axis leak must list shares between 0 and 1")
        return axes

    @model_validator(mode="after")
    def _samples(self) -> Grid:
        for name in sorted(_references([self.spec, self.grid, self.finetune and self.finetune.documents])):
            if name not in self.data:
                raise ValueError(f"{DATA}{name} is no sample of data")
        if LEAK in self.grid and self.finetune is None:
            raise ValueError("axis leak needs finetune.documents, which it puts into the corpus")
        return self

    @property
    def results(self) -> str:
        """What the names of results begin with, within run_dir."""
        return f"results/{self.name}/" if self.name else ""

    def sample_path(self, name: str) -> str:
        """Where a sample is written."""
        return f"{self.run_dir}/data/{name}.parquet"

    def path_of(self, reference: str) -> str:
        """The file that `data:NAME` or a plain path stands for."""
        return (
            self.sample_path(reference.removeprefix(DATA)) if reference.startswith(DATA) else str(reference)
        )

    def leaks(self) -> dict[float, str]:
        """Share -> file of leaked documents, for every share above 0 on the axis."""
        shares = [float(share) for share in self.grid.get(LEAK, [])]
        return {share: self.sample_path(f"leak-{label_of(share)}") for share in shares if share > 0}


@dataclass(frozen=True)
class Cell:
    """One point of the grid: axis -> value as tables show it, and the spec with one strategy and one seed.

    `spec.run_dir` is the directory of the extraction, which the cell shares with others.
    """

    axes: dict[str, Any]
    strategy: Strategy
    seed: int
    spec: RunSpec


def expand(grid: Grid, where: str = "the grid") -> list[Cell]:
    """All cells, in the order of the axes, the last one fastest.

    Raises:
        UserError: a cell whose spec is not valid; the message names cell and field.
    """
    axes = dict(grid.grid)
    shared = _plain_spec(grid, {}, where)
    strategies = axes.pop(STRATEGY, shared.strategies)
    seeds = axes.pop(SEED, list(shared.retrain.seeds))
    cells = []
    for point in itertools.product(*(list(values) for values in axes.values())):
        named = dict(zip(axes, point, strict=True))
        fields = {k: v for axis, value in named.items() for k, v in _settings(grid, axis, value).items()}
        shown = {axis: _shown(value) for axis, value in named.items()}
        here = (
            f"{where}, cell {', '.join(f'{k}={label_of(v)}' for k, v in named.items())}" if named else where
        )
        for strategy, seed in itertools.product(strategies, seeds):
            own = {"select.strategy": strategy, "retrain.strategies": [strategy], "retrain.seeds": [seed]}
            own |= {"select.seed": seed} if strategy in SEEDED else {}
            spec = _spec_of(grid, {**fields, **own}, here)
            cells.append(Cell(shown, spec.select.strategy, spec.retrain.seeds[0], spec))
    return cells


def extraction_key(spec: RunSpec, base: Base | None = None) -> str:
    """Name of the extraction that a spec needs; equal for specs that can share one."""
    sections = [*EXTRACTION, *(["evaluate"] if spec.retrain.judges else [])]
    where = set(Placement.model_fields)  # workers ran, which changes nothing
    read = [getattr(spec, name).model_dump(mode="json", exclude=where) for name in sections]
    return fingerprint([*read, *(base.key if base else [])])[:16]


def finetuned_key(grid: Grid, spec: RunSpec) -> str:
    """Name of the model that `grid.finetune` makes for a spec's base model and task."""
    assert grid.finetune is not None
    about = [spec.models.base, spec.models.base_revision, *grid.base.key, spec.task.model_dump(mode="json")]
    recipe = finetune_recipe(grid).model_dump(mode="json", exclude={"strategies", "seeds"})
    return fingerprint([*about, grid.finetune.model_dump(mode="json"), recipe])[:16]


def finetune_recipe(grid: Grid) -> Retrain:
    """The retrain section by which `grid.finetune` trains: the spec's, on hard labels, with its changes."""
    assert grid.finetune is not None
    fields = {"labels": "hard", "temperature": 1.0, **grid.finetune.retrain}  # soft ones are its own result's
    changes = {f"retrain.{name}": value for name, value in fields.items()}
    recipe = _plain_spec(grid, changes, "finetune").retrain
    return recipe.model_copy(update={"epochs": grid.finetune.epochs, "early_stopping": False})


def label_of(value: Any) -> str:
    """An axis value as text: numbers and words as they are, lists and mappings as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _shown(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else label_of(value)


def _spec_of(grid: Grid, changes: dict[str, Any], where: str) -> RunSpec:
    """The spec of a cell: run_dir is that of its extraction, models.finetuned where `finetune` puts it."""
    spec = _plain_spec(grid, changes, where)
    if grid.finetune is not None:
        path = f"{grid.run_dir}/models/finetuned-{finetuned_key(grid, spec)}"
        spec = spec.model_copy(update={"models": spec.models.model_copy(update={"finetuned": path})})
    return spec.model_copy(
        update={"run_dir": f"{grid.run_dir}/extractions/{extraction_key(spec, grid.base)}"}
    )


def _plain_spec(grid: Grid, changes: dict[str, Any], where: str) -> RunSpec:
    """The grid's spec with dotted changes and references resolved."""
    fields = copy.deepcopy(grid.spec)
    if "run_dir" in fields:
        raise UserError(f"{where}: spec.run_dir is the experiment's to set: give run_dir beside spec.")
    for name, value in changes.items():
        put(fields, name, value, where)
    models = fields.setdefault("models", {})
    if grid.finetune is not None:
        if models.get("finetuned"):
            raise UserError(f"{where}: give either finetune or spec.models.finetuned, not both.")
        models["finetuned"] = "made by finetune"
    return RunSpec.from_dict(_resolved(fields, grid), where)


def put(fields: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set a dotted field of a nested dict, making sections on the way."""
    *sections, last = name.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"{where}: {section} (in {name}) must be a section with fields.")
    fields[last] = copy.deepcopy(value)


def _settings(grid: Grid, axis: str, value: Any) -> dict[str, Any]:
    """Dotted fields that a value of an axis sets."""
    if axis == LEAK:
        paths = list((grid.spec.get("corpus") or {}).get("paths") or [])
        if not paths:
            raise UserError("axis leak needs spec.corpus.paths, to which leaked documents are added.")
        more = [grid.leaks()[float(value)]] if value else []
        return {"corpus.paths": [*paths, *more]}
    settings = grid.grid[axis]
    return dict(settings[value]) if isinstance(settings, dict) else {axis: value}


def _resolved(value: Any, grid: Grid) -> Any:
    """The value with every `data:NAME` replaced by its file."""
    if isinstance(value, dict):
        return {key: _resolved(item, grid) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, grid) for item in value]
    return grid.path_of(value) if isinstance(value, str) and value.startswith(DATA) else value


def _references(value: Any) -> Iterator[str]:
    """Names of all samples that a value refers to."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, str) and value.startswith(DATA):
        yield value.removeprefix(DATA)
