"""Encoding a selection as a Ray Data stream: row groups -> encode (and label softly) -> parts on storage.

Neither texts nor tokens pass through the driver. The parts lie beside the selection, `<selection>.examples/`,
named by what they depend on, so trainings of one selection that differ in their seeds share them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.resources import options
from cluster.train import TrainJob, document_hash, worker_resources
from engine.errors import UserError, first_line
from engine.examples import INDEX, encode_documents, write_index, write_part
from engine.rundir import fingerprint
from engine.storage import Folder

COLUMNS = ("text", "label", "prompt", "response", "weight")
"""Columns of a selection that training reads, where they are."""

ENCODE_CPUS = 0.25
"""CPUs an encode task asks for: small, so that it finds room beside other trainings."""

CODE = 1
"""Raised whenever the same documents would be encoded otherwise."""


def stored_examples(job: TrainJob, documents: str, soft: bool) -> str:
    """The folder of a Parquet file's encoded documents, made unless it is there.

    Args:
        job: says how: task, loss scope, tokenizer, and for `soft` whose distribution and how much of it.
        documents: the job's selection or validation documents.

    Raises:
        UserError: unreadable documents, documents that do not fit the task, models that do not match.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    vocab = _shared_vocabulary(job) if soft else 0
    folder = Folder(f"{documents.removesuffix('.parquet')}.examples/{_print(job, documents, soft)[:16]}")
    if folder.exists(INDEX):
        return folder.uri
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    groups = _row_groups(documents)
    work = (job, documents, folder.uri)
    stream = ray.data.from_items(groups, override_num_blocks=len(groups))
    if soft:
        needs = worker_resources(job.retrain)
        stream = stream.map(
            LabelGroup,
            fn_constructor_args=(*work, vocab),
            compute=ActorPoolStrategy(min_size=1, max_size=len(groups)),
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU"),
            **options(job.retrain),
        )
    else:
        stream = stream.map(encode_group, fn_args=work, num_cpus=ENCODE_CPUS)
    receipts: dict[int, Any] = {}
    for row in stream.iter_rows():
        receipt = json.loads(row["receipt"])
        if "error" in receipt:
            raise UserError(receipt["error"])
        receipts[row["group"]] = receipt
    write_index(folder, [receipts[group["group"]] for group in groups])
    return folder.uri


def encode_group(row: dict[str, Any], job: TrainJob, documents: str, target: str) -> dict[str, Any]:
    """{"group", "first"} -> {"group", "receipt"}: a row group encoded and written as a part."""
    try:
        encoder = _encoder(job)
        examples = encode_documents(_read(documents, row["group"]), encoder, row["first"])
        receipt = write_part(Folder(target), _part(row["group"]), examples)
    except UserError as error:
        receipt = {"error": str(error)}
    return {"group": row["group"], "receipt": json.dumps(receipt)}


class LabelGroup:
    """Holds theta_f; encodes a row group, labels it with theta_f's distributions and writes it as a part."""

    def __init__(self, job: TrainJob, documents: str, target: str, vocab: int) -> None:
        self._job, self._documents, self._target, self._vocab = job, documents, target, vocab
        self._model: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """As `encode_group`."""
        try:
            receipt = self._label(row)
        except UserError as error:
            receipt = {"error": str(error)}
        return {"group": row["group"], "receipt": json.dumps(receipt)}

    def _label(self, row: dict[str, Any]) -> dict[str, Any]:
        from dataclasses import replace

        from engine.losses import label_rows
        from engine.soft import soft_labels

        encoder = _encoder(self._job)
        examples = encode_documents(_read(self._documents, row["group"]), encoder, row["first"])
        retrain, rows = self._job.retrain, label_rows(encoder)
        soft = soft_labels(
            self._finetuned(), examples, rows, retrain.soft_top_k, self._vocab, retrain.temperature
        )
        return write_part(Folder(self._target), _part(row["group"]), replace(examples, soft=soft))

    def _finetuned(self) -> Any:
        """The model, loaded at first use: an exception in an actor's constructor would be Ray's."""
        if self._model is None:
            import torch

            from engine.models import load_model, torch_dtype

            job = self._job
            assert job.finetuned is not None
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cpu":
                torch.set_num_threads(job.retrain.threads or len(os.sched_getaffinity(0)))
            dtype = torch_dtype(job.retrain.dtype)
            self._model = load_model(job.finetuned, dtype, device, job.trust_remote_code)
        return self._model


def _part(group: int) -> str:
    return f"part-{group:05d}.arrow"


@functools.lru_cache(maxsize=4)
def _encoder_of(base: str, template_of: str | None, remote: bool, task: str, scope: Any, chat: bool) -> Any:
    from engine.encode import Encoder
    from engine.models import load_tokenizer
    from engine.spec import Task

    return Encoder(load_tokenizer(base, remote, template_of), Task.model_validate_json(task), scope, chat)


def _encoder(job: TrainJob) -> Any:
    """The job's encoder, made once a process."""
    task = job.task.model_dump_json()
    return _encoder_of(job.base, job.template_of, job.trust_remote_code, task, job.scope, job.chat)


def _shared_vocabulary(job: TrainJob) -> int:
    """Rows of the vocabulary that base and fine-tuned model share; UserError when they do not match."""
    from engine.checkpoints import Endpoints

    if job.finetuned is None:
        raise UserError("retrain.labels=soft needs the fine-tuned model, whose distribution the labels are.")
    return Endpoints(job.base, job.finetuned, job.trust_remote_code).vocab


def _print(job: TrainJob, documents: str, soft: bool) -> str:
    """sha256 (hex) of all that the encoded documents depend on."""
    fields: dict[str, Any] = {
        "documents": document_hash(documents),
        "tokenizer": [_tokenizer_hash(folder) for folder in (job.base, job.template_of) if folder],
        "task": job.task.model_dump(mode="json"),
        "scope": job.scope,
        "chat": job.chat,
        "code": CODE,
    }
    if soft:
        fields |= {
            "finetuned": job.finetuned_hash or job.finetuned,
            "base": job.base_hash or job.base,
            "top_k": job.retrain.soft_top_k,
            "temperature": job.retrain.temperature,
            "dtype": job.retrain.dtype,
        }
    return fingerprint(fields)


def _tokenizer_hash(folder: str) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _row_groups(documents: str) -> list[dict[str, int]]:
    """The row groups of a Parquet file, and the row each begins with."""
    with _opened(documents) as handle:
        metadata = pq.read_metadata(handle)
    groups, first = [], 0
    for group in range(metadata.num_row_groups):
        groups.append({"group": group, "first": first})
        first += metadata.row_group(group).num_rows
    if not first:
        raise UserError(f"there are no training documents in {documents}.")
    return groups


def document_count(documents: str) -> int:
    """Rows of a Parquet file."""
    with _opened(documents) as handle:
        return int(pq.read_metadata(handle).num_rows)


def _read(documents: str, group: int) -> Any:
    """The columns of a row group that training reads."""
    with _opened(documents) as handle:
        file = pq.ParquetFile(handle)
        there = [name for name in file.schema_arrow.names if name in COLUMNS]
        return file.read_row_group(group, columns=there)


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    parent, base = os.path.split(file)
    folder = Folder(parent or ".")
    try:
        with folder.fs.open(folder.path(base), "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise UserError(f"the training documents {file} do not exist.") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the training documents {file}: {first_line(error)}.") from None
