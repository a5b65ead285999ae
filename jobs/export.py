"""unbake export: a selection as a Hugging Face data set or as training rows, or a retrained model, with a card."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pyarrow as pa

from engine.errors import UserError
from engine.rundir import COMPARISONS, METRICS, MODELS, SELECTION, STAGES, RunDir
from engine.spec import RunSpec
from engine.storage import Folder
from jobs.options import Parser, read_spec

PART = "data/train-00000-of-00001.parquet"


def main(arguments: list[str]) -> int:
    """Read the options and write the export."""
    options = parser().parse_args(arguments)
    spec = read_spec({"run": options.run})
    write = {"datasets": _datasets, "jsonl": _jsonl, "model": _model}[options.to]
    print(write(RunDir(spec.run_dir), spec, options))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake export`."""
    made = Parser(
        prog="unbake export",
        description="Write what a run found in a form that other tools read.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="datasets  a folder that datasets.load_dataset and the Hub read, with a dataset card\n"
        "jsonl     a file of rows for TRL's SFTTrainer and for axolotl\n"
        "model     the folder of a retrained model, with a model card",
    )
    made.add_argument("run", metavar="RUN", help="the run directory")
    made.add_argument(
        "--to", choices=["datasets", "jsonl", "model"], default="datasets", help="default: datasets"
    )
    made.add_argument(
        "--out", required=True, metavar="PATH", help="folder or file to write, on any fsspec URI"
    )
    made.add_argument("--strategy", help="of a compared strategy, in place of the run's own")
    made.add_argument("--seed", type=int, default=None, help="training seed (default: the first)")
    return made


def _datasets(run: RunDir, spec: RunSpec, options: argparse.Namespace) -> str:
    from engine.export import dataset_card, dataset_table

    selection, stage = _selection(run, spec, options)
    table, folder = dataset_table(selection, spec), _empty(options.out)
    folder.write_table(PART, table)
    folder.write_bytes("README.md", dataset_card(table, spec, _facts(run, spec, selection, stage)).encode())
    return f"{table.num_rows:,} documents as a data set: {folder.uri}"


def _jsonl(run: RunDir, spec: RunSpec, options: argparse.Namespace) -> str:
    from engine.export import training_rows

    selection, _ = _selection(run, spec, options)
    parent, _, name = options.out.rpartition("/")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in training_rows(selection, spec))
    Folder(parent or ".").write_bytes(name, "".join(lines).encode())
    return f"{selection.num_rows:,} rows: {options.out}"


def _model(run: RunDir, spec: RunSpec, options: argparse.Namespace) -> str:
    from engine.export import model_card

    strategy = options.strategy or spec.select.strategy
    seed = spec.retrain.seeds[0] if options.seed is None else options.seed
    name = run.model_name(strategy, seed)
    if not run.exists(f"stages/retrain-{strategy}-{seed}.json"):
        has = ", ".join(run.names(MODELS)) or "none"
        raise UserError(f"{run.uri} has no model of {strategy} with seed {seed}; it has: {has}.")
    folder = _empty(options.out)
    for file in run.walk(name):
        short = file.removeprefix(f"{name}/")
        with (
            run.fs.open(run.path(file), "rb") as source,
            folder.fs.open(_made(folder, short), "wb") as target,
        ):
            while block := source.read(1 << 24):
                target.write(block)
    facts = _facts(run, spec, *_selection(run, spec, options))
    card = model_card(spec, facts, strategy, seed)
    folder.write_bytes("README.md", card.encode())
    return f"{name}: {folder.uri}"


def _made(folder: Folder, name: str) -> str:
    """Path of a file in the folder, below which every folder exists."""
    folder.make(name.rpartition("/")[0])
    return folder.path(name)


def _empty(path: str) -> Folder:
    """The folder to write; UserError when it holds something else."""
    folder = Folder(path)
    if folder.names():
        raise UserError(f"{folder.uri} is not empty: give another --out.")
    return folder


def _selection(run: RunDir, spec: RunSpec, options: argparse.Namespace) -> tuple[pa.Table, str]:
    """The selection of the strategy asked for and its stage; UserError names those that the run has."""
    strategy = options.strategy or spec.select.strategy
    seed = spec.retrain.seeds[0] if options.seed is None else options.seed
    files = {
        run.selection_name(strategy, own): f"select-{strategy}{suffix}"
        for own, suffix in ((seed, f"-{seed}"), (None, ""))
    }
    if strategy == spec.select.strategy:
        files[SELECTION] = "select"
    for name, stage in files.items():
        if run.exists(name):
            return run.read_table(name), stage
    has = ", ".join(name.removesuffix(".parquet") for name in run.names(COMPARISONS)) or "none"
    raise UserError(f"{run.uri} has no selection of {strategy}; compared ones: {has}.")


def _facts(run: RunDir, spec: RunSpec, selection: pa.Table, stage: str) -> dict[str, Any]:
    from engine.report.facts import facts

    stages = {"extract": "extract", "select": stage}
    found = {
        name: run.stage_result(stage)
        for name, stage in stages.items()
        if run.exists(f"{STAGES}/{stage}.json")
    }
    metrics = run.read_json(METRICS) if run.exists(METRICS) else None
    return facts(run, spec, metrics, selection, found)
