"""unbake experiment: run every cell of a grid, sharing all that cells have in common; tables and plots.

A cell needs an extraction, a selection from it, a training on that selection and a judgement of the model. Each
is named by the hash of what it depends on and made once, whichever cells ask for it; a later start finds what
is there. Cells of one corpus and one set of gradients share a store; cells whose selections hold the same
documents share a model, though they came from different stores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

import cluster.train
from cluster.session import session
from cluster.train import TrainJob
from engine.errors import UserError
from engine.experiment import Cell, Grid, expand, results_table, summarise, to_markdown
from engine.experiment.base import changed_base
from engine.experiment.figures import figures
from engine.experiment.grid import finetune_recipe
from engine.experiment.results import difference
from engine.lock import RunLock
from engine.report import numbers
from engine.rundir import MODELS, STORE, RunDir, fingerprint
from engine.spec import RunSpec
from jobs.distances import distances, true_set
from jobs.evaluate import frozen_below, judgement_inputs, measure
from jobs.extract import extract
from jobs.finetune import fine_tune
from jobs.grids import grid_yaml, read_grid, recipes
from jobs.job import Job, begun
from jobs.options import Parser
from jobs.progress import Progress, Stage
from jobs.retrain import check, step_text, train_job
from jobs.samples import write_samples
from jobs.select import NO_BYTES, select_with
from jobs.stopping import request_stop
from jobs.testset import write_validation

RESULTS, TABLE, PLOTS = "results.parquet", "results.md", "plots"

DESCRIPTIVE = (
    "rank",
    "row",
    "doc_id",
    "partition",
    "confidence",
    "loss",
    "alignment",
    "norm",
    "objective",
    "gain",
)
"""Columns of a selection that no training reads."""


def main(arguments: list[str]) -> int:
    """Read the grid, run it, print the table."""
    options, changes = parser().parse_known_args(arguments)
    grid = read_grid(options.config or options.recipe, changes)
    if options.print_config:
        print(grid_yaml(grid), end="")
        return 0
    experiment = Experiment(grid, options.quiet, options.verbose)
    if options.list:
        experiment.describe()
        return 0
    experiment.run()
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake experiment`."""
    made = Parser(
        prog="unbake experiment",
        description=__doc__,
        epilog=f"recipes: {', '.join(recipes())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipe", nargs="?", help="name of a recipe, or a YAML file (as --config)")
    made.add_argument("--config", metavar="FILE", help="YAML grid")
    made.add_argument("--list", action="store_true", help="list what would be made, and stop")
    made.add_argument("--print_config", action="store_true", help="print the grid and exit")
    made.add_argument("-q", "--quiet", action="store_true", help="print the table alone")
    made.add_argument("-v", "--verbose", action="store_true", help="show Ray's own messages too")
    return made


@dataclasses.dataclass(frozen=True)
class Training:
    """One model to train and judge: the job, its fingerprint, the folder and the stage of its judgement."""

    job: Job
    work: TrainJob
    mark: str
    stage: str
    inputs: dict[str, Any]


class Experiment:
    """A grid being run: what its cells need, by name, and what they came to."""

    def __init__(self, grid: Grid, quiet: bool = False, verbose: bool = False) -> None:
        self.run_dir = RunDir(grid.run_dir)
        if not self.run_dir.local:
            raise UserError(f"an experiment needs a folder that all workers see, and {grid.run_dir} is none.")
        self.grid = grid.model_copy(update={"run_dir": self.run_dir.uri})
        self.quiet, self.verbose = quiet, verbose
        self.cells = [
            dataclasses.replace(cell, spec=begun(cell.spec, RunDir(cell.spec.run_dir)))
            for cell in expand(self.grid)
        ]
        self.progress = Progress(self.run_dir, quiet)
        self._jobs: dict[str, Job] = {}
        self._bases: dict[str, str] = {}

    def describe(self) -> None:
        """Say how much there is to do, without doing any of it."""
        extractions = {cell.spec.run_dir for cell in self.cells}
        selections = {(cell.spec.run_dir, _selection(cell)) for cell in self.cells}
        print(f"{len(self.cells)} cells: {len(extractions)} extractions, {len(selections)} selections")
        for cell in self.cells:
            shown = ", ".join(f"{name}={value}" for name, value in cell.axes.items())
            print(f"  {shown}{', ' if shown else ''}{cell.strategy}, seed {cell.seed}")

    def run(self) -> list[dict[str, Any]]:
        """Make all that is missing; the rows of results.parquet."""
        for cell in self.cells:
            check(_with(self._job(cell), cell))
        if self.grid.judge == "validation" and not self.cells[0].spec.evaluate.validation_share:
            raise UserError("judge: validation needs spec.evaluate.validation_share above 0.")
        with self._locked():
            return self._run()

    def _run(self) -> list[dict[str, Any]]:
        self.run_dir.write_bytes(f"{self.grid.results}grid.yaml", grid_yaml(self.grid).encode())
        write_samples(self.grid)
        with session(self.cells[0].spec.ray, self.verbose):
            for job in self._finetuned():
                extract(job)
            trainings = {id(cell): self._training(cell) for cell in self.cells}
            self._train_and_judge(trainings.values())
        rows = [self._row(cell, trainings[id(cell)]) for cell in self.cells]
        self._forget_models(trainings.values())
        self._write(rows)
        return rows

    def _locked(self) -> RunLock:
        """The experiment's lock: one driver at a time."""

        def lost() -> None:
            request_stop(f"another driver has taken over {self.run_dir.uri}, so this one stops")

        return RunLock(self.run_dir, self.progress.say, lost)

    # ---- shared stages

    def _job(self, cell: Cell) -> Job:
        """The job of a cell's extraction and test set; cells that agree in them share it."""
        spec = cell.spec
        key = fingerprint([spec.run_dir, spec.evaluate.model_dump(mode="json"), spec.retrain.early_stopping])
        if key not in self._jobs:
            base = self._base(spec)
            models = spec.models.model_copy(update={"base": base, "base_revision": None})
            self._jobs[key] = Job(spec.model_copy(update={"models": models}), self.quiet, self.verbose)
        return self._jobs[key]

    def _base(self, spec: RunSpec) -> str:
        """The base model as a local folder; converted once for all cells."""
        models = spec.models
        key = fingerprint([models.base, models.base_revision, *self.grid.base.key])[:16]
        if key not in self._bases:
            target = self.run_dir.path(f"{MODELS}/base-{key}")
            self._bases[key] = changed_base(
                self.grid.base, models.base, target, models.base_revision, models.trust_remote_code
            )
        return self._bases[key]

    def _finetuned(self) -> Iterator[Job]:
        """The job of every extraction, its fine-tuned model made where the grid says how."""
        seen = set()
        for job in (self._job(cell) for cell in self.cells):
            if job.spec.run_dir in seen:
                continue
            seen.add(job.spec.run_dir)
            if self.grid.finetune is not None:
                settings = self.grid.finetune
                recipe = finetune_recipe(self.grid)
                made = Job(job.spec.model_copy(update={"retrain": recipe}), self.quiet, self.verbose)
                every = settings.trajectory_steps
                trajectory = f"{made.spec.models.finetuned}-trajectory" if every else None
                documents = self.grid.path_of(settings.documents)
                fine_tune(made, documents, settings.epochs, settings.seed, trajectory, every or None)
            yield job

    def _training(self, cell: Cell) -> Training:
        """Select for a cell, and say which model it needs."""
        job, name = self._job(cell), _selection(cell)
        select_with(_with(job, cell), cell.spec.select, f"select-{name}", f"comparisons/{name}.parquet")
        documents = self._training_file(job.run.read_table(f"comparisons/{name}.parquet"))
        validation = write_validation(job) if cell.spec.retrain.judges else None
        work = train_job(
            job,
            name="",
            selection=f"{self.run_dir.uri}/{documents}",
            validation=validation and f"{job.run.uri}/{validation}",
            target="",
            folder=self.run_dir.uri,
            retrain=cell.spec.retrain,
            seed=cell.seed,
        )
        mark = work.fingerprint()
        work = dataclasses.replace(
            work,
            name=f"{cell.strategy}-{cell.seed}-{mark[:8]}",
            target=f"{self.run_dir.uri}/{MODELS}/{mark[:16]}",
        )
        inputs = judgement_inputs(job, mark, self.grid.judge, frozen_below(cell.spec.retrain))
        return Training(job, work, mark, f"judge-{fingerprint(inputs)[:16]}", inputs)

    def _training_file(self, selection: pa.Table) -> str:
        """The columns of a selection that a training reads, in a file named by their content."""
        table = selection.drop_columns([name for name in DESCRIPTIVE if name in selection.column_names])
        content = fingerprint([table.column_names, *(column.to_pylist() for column in table.columns)])[:16]
        name = f"trainings/{content}.parquet"
        if not self.run_dir.exists(name):
            self.run_dir.write_table(name, table)
        return name

    def _train_and_judge(self, trainings: Iterable[Training]) -> None:
        """Train and judge what has no judgement yet, some models at a time, each model once."""
        todo = {t.stage: t for t in trainings if not self.run_dir.completed(t.stage, t.inputs)}
        groups: dict[Any, list[Training]] = {}
        for training in todo.values():
            groups.setdefault(cluster.train.worker_group(training.work), []).append(training)
        judge = ThreadPoolExecutor(max_workers=1)
        try:
            with self.progress.stage("train and judge", len(todo), "models") as stage:
                judging: list[Future[None]] = []
                for models in (batch for group in groups.values() for batch in self._batches(group)):
                    made = self._train([members[0].work for members in models], stage)
                    _wait(judging)
                    judging = [
                        judge.submit(self._judge_model, members, metrics, stage)
                        for members, metrics in zip(models, made, strict=True)
                    ]
                    if _on_gpu():  # its memory is the next trainings'
                        _wait(judging)
                _wait(judging)
        finally:
            judge.shutdown(cancel_futures=True)

    def _train(self, works: list[TrainJob], stage: Stage) -> list[dict[str, Any]]:
        """Train models together, their steps shown; metrics of each."""

        def step(event: dict[str, Any]) -> None:
            stage.row(event["job"], event["step"], event["steps"], step_text(event))
            stage.advance(0)

        return cluster.train.train_many(works, step)

    def _batches(self, group: list[Training]) -> Iterator[list[list[Training]]]:
        """Models that fit on the disk together, each with the judgements that are asked of it."""
        by_model: dict[str, list[Training]] = {}
        for training in group:
            by_model.setdefault(training.mark, []).append(training)
        models = list(by_model.values())
        for start in range(0, len(models), self.grid.models_at_once):
            yield models[start : start + self.grid.models_at_once]

    def _judge_model(self, members: list[Training], metrics: dict[str, Any], stage: Stage) -> None:
        """Every judgement of one model, while the next models train; then it goes."""
        for training in members:
            self._judge(training, metrics)
            stage.advance()
        self._forget_models(members)

    def _judge(self, training: Training, metrics: dict[str, Any]) -> None:
        job, work = training.job, training.work
        result = measure(job, work.name, work.target, self.grid.judge, frozen_below(work.retrain))
        result |= {"train_seconds": metrics["seconds"], "final_loss": metrics["final_loss"]}
        self.run_dir.begin(training.stage, training.inputs)
        self.run_dir.finish(training.stage, training.inputs, result)

    def _forget_models(self, trainings: Iterable[Training]) -> None:
        """Remove the trainings' models, unless they are to be kept."""
        for training in trainings if not self.grid.keep_models else ():
            RunDir(training.work.target).remove("")

    def _endpoint(self, job: Job, which: str, below: int) -> dict[str, Any]:
        """Judgement of base or fine-tuned model, once for all extractions that have it."""
        folder = {"base": job.endpoints.base, "finetuned": job.endpoints.finetuned}[which]
        inputs = judgement_inputs(job, job.model_hashes[which], self.grid.judge, below)
        stage = f"judge-{fingerprint(inputs)[:16]}"
        if not self.run_dir.completed(stage, inputs):
            result = measure(job, which, folder, self.grid.judge, below)
            self.run_dir.begin(stage, inputs)
            self.run_dir.finish(stage, inputs, result)
        return self.run_dir.stage_result(stage)

    # ---- results

    @property
    def _shown(self) -> str:
        """The documents whose results the tables show."""
        return "validation" if self.grid.judge == "validation" else "test"

    def _row(self, cell: Cell, training: Training) -> dict[str, Any]:
        job, name = training.job, _selection(cell)
        metric = "accuracy" if cell.spec.task.kind == "classification" else "perplexity"
        judged, part = self.run_dir.stage_result(training.stage), self._shown
        below = frozen_below(cell.spec.retrain)
        extracted, selected = job.run.stage_result("extract"), job.run.stage_result(f"select-{name}")
        row = {
            **cell.axes,
            "strategy": cell.strategy,
            "seed": cell.seed,
            "metric": metric,
            "judged": part,
            "value": judged[part][metric],
            "validation": judged["validation"] and judged["validation"][metric],
            "base": self._endpoint(job, "base", below)[part][metric],
            "finetuned": self._endpoint(job, "finetuned", below)[part][metric],
            "documents": extracted["documents"],
            "selected": selected["selected"],
            "objective": selected["objective"],
            "peak_size": selected["peak_size"],
            "random_objective": selected["random_objective_mean"],
            "mean_confidence": extracted["mean_confidence"],
            "projector": extracted["projector"],
            "dim": extracted["dim"],
            "store_bytes": int(job.run.fs.du(job.run.path(STORE))),
            "extract_seconds": extracted["seconds"],
            "select_seconds": selected["seconds"],
            "train_seconds": judged["train_seconds"],
            "final_loss": judged["final_loss"],
            "extraction": os.path.basename(job.run.root),
            "training": training.mark[:16],
        }
        if cell.spec.evaluate.train:
            found = distances(job, f"distances-{name}", f"comparisons/{name}.parquet", true_set(job))
            known = {key: value for key, value in sorted(found.items()) if isinstance(value, int | float)}
            row |= {f"distance_{key}": value for key, value in known.items()}
        return row

    def _write(self, rows: list[dict[str, Any]]) -> None:
        axes, where = list(self.cells[0].axes), self.grid.results
        summary = summarise(rows, axes)
        self.run_dir.write_table(f"{where}{RESULTS}", results_table(rows))
        self.run_dir.write_bytes(f"{where}{TABLE}", to_markdown(summary, axes).encode())
        for name, svg in figures(summary, axes).items():
            self.run_dir.write_bytes(f"{where}{PLOTS}/{name}", svg)
        print_summary(summary, axes, self.progress.out)
        names = f"{self.run_dir.path(where + RESULTS)}, {self.run_dir.path(where + TABLE)}, {where}{PLOTS}/"
        self.progress.say(f"results: {names}")


def _wait(judging: list[Future[None]]) -> None:
    """Wait for judgements; the first error of one is raised."""
    for future in judging:
        future.result()


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def print_summary(summary: list[dict[str, Any]], axes: list[str], console: Console) -> None:
    """The table in the terminal: mean and half the 95% interval over seeds."""
    table = Table(
        title="experiment",
        caption="± half the 95% interval over seeds; difference from random ± standard error",
    )
    metric = summary[0]["metric"]
    for axis in [*axes, "strategy"]:
        table.add_column(axis)
    for column in (metric, "minus random", "gap closed", "seeds"):
        table.add_column(column, justify="right")
    for row in summary:
        half = None if row["low"] is None else row["mean"] - row["low"]
        gap_half = None if row["gap_low"] is None else row["gap_closed"] - row["gap_low"]
        table.add_row(
            *(str(row[axis]) for axis in axes),
            row["strategy"],
            numbers.plus_minus(row["mean"], half, metric),
            difference(row),
            numbers.gap(row["gap_closed"], gap_half),
            str(row["n"]),
        )
    console.print(table)


def _with(job: Job, cell: Cell) -> Job:
    """The job with the cell's own sections; what it knows of its models stays known."""
    own = copy.copy(job)
    own.spec = job.spec.model_copy(update={"select": cell.spec.select, "retrain": cell.spec.retrain})
    return own


def _selection(cell: Cell) -> str:
    """Name of a cell's selection within its extraction: the strategy, and what it depends on."""
    fields = [cell.spec.select.model_dump(mode="json", exclude=set(NO_BYTES))]
    if cell.spec.select.in_rounds:
        fields.append(cell.spec.retrain.model_dump(mode="json", exclude=set(cluster.train.NO_BYTES)))
    return f"{cell.strategy}-{fingerprint(fields)[:12]}"
