"""Samples of an experiment: documents drawn from files or Hub data sets, each written once as Parquet."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from engine.errors import UserError, first_line, install
from engine.experiment import Grid, Sample
from engine.rundir import fingerprint
from engine.storage import Folder

FORMATS = {"parquet": "parquet", "pq": "parquet", "jsonl": "json", "ndjson": "json", "csv": "csv"}


def write_samples(grid: Grid) -> None:
    """Write every sample and every file of leaked documents that is not there yet.

    Raises:
        UserError: no such file or column, fewer rows than asked for, or a file that was drawn otherwise.
    """
    folder = Folder(f"{grid.run_dir}/data")
    for name, sample in grid.data.items():
        _once(
            folder,
            name,
            sample.model_dump(mode="json"),
            lambda name=name, sample=sample: _draw(grid, name, sample),
        )
    for share, path in grid.leaks().items():
        name = os.path.basename(path).removesuffix(".parquet")
        assert grid.finetune is not None
        documents = grid.path_of(grid.finetune.documents)
        _once(
            folder,
            name,
            {"share": share, "of": documents},
            lambda share=share, of=documents: _leak(share, of),
        )


def _once(folder: Folder, name: str, about: dict[str, Any], make: Any) -> None:
    """Write `name`.parquet unless it is there; what it was made of is kept beside it."""
    note, mark = f"{name}.json", fingerprint(about)
    if folder.exists(note) and folder.exists(f"{name}.parquet"):
        if folder.read_json(note)["fingerprint"] != mark:
            raise UserError(
                f"{folder.path(name)}.parquet was drawn with other settings: use another run_dir, or remove it."
            )
        return
    folder.write_table(f"{name}.parquet", make())
    folder.write_json(note, {"fingerprint": mark, **about})


def _draw(grid: Grid, name: str, sample: Sample) -> pa.Table:
    path = os.path.join(grid.data_dir, sample.path) if sample.path else None
    if path is not None and os.path.exists(path):
        table = _from_file(path, sample)
    elif sample.hub:
        table = _from_hub(name, sample)
    else:
        raise UserError(f"data.{name}: {path} does not exist: give its folder with --data_dir.")
    if sample.columns:
        table = pa.table({new: _column(table, old, name) for new, old in sample.columns.items()}).drop_null()
    order = np.random.default_rng(sample.seed).permutation(table.num_rows)[sample.skip :]
    if len(order) < (sample.rows or 1):
        raise UserError(f"data.{name}: {sample.rows or 1:,} rows are asked for and {len(order):,} are left.")
    return table.take(np.sort(order[: sample.rows]))


def _column(table: pa.Table, source: str, name: str) -> pa.ChunkedArray:
    """A column, or for `column.0` the first of each list (null where there is none)."""
    column, dot, index = source.partition(".")
    if column not in table.column_names or (dot and not index.isdigit()):
        raise UserError(f"data.{name}: there is no column {source}: there are {table.column_names}.")
    if not dot:
        return table[column]
    at = int(index)
    return pa.chunked_array(
        [pa.array([v[at] if v and len(v) > at else None for v in table[column].to_pylist()])]
    )


def _from_file(path: str, sample: Sample) -> pa.Table:
    kind = FORMATS.get(path.rsplit(".", 1)[-1].lower())
    if kind is None:
        raise UserError(f"{path} has an unknown extension: samples are read from parquet, jsonl or csv.")
    try:
        source = ds.dataset(path, format=kind)
        missing = sorted(set(sample.where) - set(source.schema.names))
        if missing:
            raise UserError(f"{path} has no column {missing[0]} (where): it has {source.schema.names}.")
        keep = None
        for column, wanted in sample.where.items():
            one = pc.field(column).isin(wanted if isinstance(wanted, list) else [wanted])
            keep = one if keep is None else keep & one
        return source.to_table(filter=keep)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}.") from None


def _from_hub(name: str, sample: Sample) -> pa.Table:
    try:
        import datasets
    except ImportError:
        raise UserError(f"data.{name} comes from the Hub: {install('datasets')}.") from None
    try:
        found = datasets.load_dataset(
            sample.hub,
            sample.hub_config,
            split=sample.hub_split,
            revision=sample.hub_revision,
            streaming=sample.hub_rows is not None,
        )
        if sample.hub_rows is not None:
            return pa.Table.from_pylist(list(found.take(sample.hub_rows)))
    except Exception as error:  # the Hub's client raises many types
        raise UserError(f"data.{name}: cannot load {sample.hub} from the Hub: {first_line(error)}.") from None
    return found.with_format("arrow")[:]


def _leak(share: float, documents: str) -> pa.Table:
    """The text of a share of the hidden documents, drawn by seed 0."""
    table = Folder(os.path.dirname(documents)).read_table(os.path.basename(documents))
    kept = [name for name in ("text", "prompt", "response") if name in table.column_names]
    order = np.random.default_rng(0).permutation(table.num_rows)[: max(1, round(share * table.num_rows))]
    return table.select(kept).take(np.sort(order))
