"""Extraction as a Ray Data stream: partitions -> read and encode (CPU tasks) -> gradient actors -> receipts.

A partition is one row of the stream from end to end. Text and gradients never reach the driver: encoded
tokens go to the actors, gradients from an actor to its own shard, and only receipts come back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from cluster import losses
from cluster.metrics import Extraction
from cluster.resources import options
from cluster.session import gpus_per_worker
from engine import memory
from engine.checkpoints import Endpoints
from engine.corpus import Plan, read_partition
from engine.encode import Encoder, spec_encoder
from engine.errors import UserError, first_line
from engine.gradients import GradientEngine, PartitionGradients
from engine.ragged import Ragged
from engine.rundir import RunDir
from engine.spec import Extract, RunSpec
from engine.storage import again
from engine.store import GradientStore
from engine.target import Target

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
)
"""What Ray raises when a worker, or what it held, is gone for good; not what our own code raises in it."""

PARTITIONS_PER_ENCODER = 8
"""An encoder takes seconds to start and encodes a partition in about one: for few partitions one is enough."""

ENCODERS_PER_GPU = 4
"""Encode actors for each gradient actor on a GPU; on a CPU, where gradients take far longer, one is enough."""

PARTITIONS_AHEAD, TOKEN_BYTES, AHEAD_BYTES = 4, 8, 16 << 20
"""Partitions of the longest documents that may wait encoded for each gradient actor; at least so many bytes."""

ENCODE_CPUS = 0.25
"""CPUs an encode task asks for: small, so that it is placed beside actors that hold every whole CPU."""


@dataclass(frozen=True)
class ExtractJob:
    """All that a worker needs to know; small and picklable."""

    spec: RunSpec
    run_uri: str
    plan: Plan
    target: Target
    base: str
    finetuned: str
    fingerprint: str
    threads: int


def threads_per_worker(settings: Extract) -> int:
    """CPU threads of a gradient actor; part of the fingerprint, since sums are split among them."""
    if settings.threads is not None:
        return settings.threads
    return 1 if gpus_per_worker(settings.gpus_per_worker) else os.cpu_count() or 1


def extract(
    job: ExtractJob,
    todo: list[int],
    on_receipt: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the given partitions; `on_receipt` gets each completion record as it arrives, in any order.

    Where a node was lost, and with it more tries than Ray makes (it may make all of them before it knows that the
    node has gone), the stream begins anew on the nodes that are left, `max_attempts` times without any progress.

    Raises:
        UserError: a worker met a user's mistake, such as a corpus file that has gone; or no try succeeded.
    """
    metrics = Extraction(job.run_uri, job.plan.n_partitions, len(todo))
    limit = tries = job.spec.extract.max_attempts
    while todo:
        nodes, attempts, written = losses.nodes(), Attempts.remote(), set[int]()
        try:
            for receipt in _receipts(job, todo, attempts):
                written.add(receipt["partition"])
                metrics.written(receipt)
                on_receipt(receipt)
        except LOST as error:
            begun: dict[int, int] = ray.get(attempts.unfinished.remote())
            tries = limit if written else tries - 1
            if tries == 0 or not losses.any_lost(nodes):
                raise _lost(error, begun, limit) from None
            say("a node was lost with what was computed there; the others go on")
        finally:
            ray.kill(attempts)
        todo = [partition for partition in todo if partition not in written]


def _receipts(job: ExtractJob, todo: list[int], attempts: Any) -> Iterator[dict[str, Any]]:
    """One stream over the partitions: their completion records, in any order; UserError of a worker, `LOST` of Ray."""
    for row in _stream(job, todo, attempts).iter_rows():
        receipt = json.loads(row["receipt"])
        if "error" in receipt:
            raise UserError(receipt["error"])
        yield receipt


def _stream(job: ExtractJob, todo: list[int], attempts: Any) -> ray.data.Dataset:
    """The stream, which begins when it is read."""
    settings = job.spec.extract
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
    cpus, gpus = actor_resources(settings, job.threads)
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=_ahead(job))
    with warnings.catch_warnings():
        # Ray 2.60 deprecates the only way to limit retries before it has another.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        replaced: dict[str, Any] = {"max_restarts": -1, "max_task_retries": settings.max_attempts - 1}
        return (
            ray.data.from_items([{"partition": p} for p in todo], override_num_blocks=len(todo))
            .map(
                EncodePartition,
                fn_constructor_args=(job, attempts),
                compute=_pool(1, encoders(job, len(todo))),
                num_cpus=ENCODE_CPUS,
                **replaced,
            )
            .map(
                WritePartition,
                fn_constructor_args=(job, device_of(gpus), attempts),
                compute=_pool(settings.workers_min, settings.workers_max, CALLS),
                num_cpus=cpus,
                num_gpus=gpus or None,
                runtime_env={"env_vars": {} if gpus else memory.ENVIRONMENT},
                **options(settings),
                **replaced,
            )
        )


def actor_resources(settings: Extract, threads: int) -> tuple[float, float]:
    """CPUs and GPUs that a gradient actor asks for; a connection to Ray is needed."""
    gpus = gpus_per_worker(settings.gpus_per_worker)
    cpus = settings.cpus_per_worker or (1 if gpus else max(0.5, threads - 2 * ENCODE_CPUS))
    return cpus, gpus


def device_of(gpus: float) -> str:
    """Where an actor with so many GPUs puts its model; on more than one it is spread over them."""
    return "auto" if gpus > 1 else "cuda" if gpus else "cpu"


def require_cuda(device: str) -> None:
    """Refuse to go on where Ray has given a GPU to a worker whose torch sees none; UserError."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"Ray has given a worker on {socket.gethostname()} a GPU and torch sees none there: install torch for "
            "its CUDA on the nodes, or set extract.gpus_per_worker to 0."
        )


def actors(job: ExtractJob) -> int:
    """Gradient actors that the connected cluster has room for now, as far as the spec lets them be started."""
    cpus, gpus = actor_resources(job.spec.extract, job.threads)
    resources = ray.cluster_resources()
    fitting = int(resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1) / cpus)
    return max(job.spec.extract.workers_min, min(fitting, job.spec.extract.workers_max or fitting))


def encoders(job: ExtractJob, partitions: int) -> int:
    """Encode actors at most: each holds a tokenizer and half a gigabyte of libraries, so no more than are needed."""
    settings = job.spec.extract
    each = ENCODERS_PER_GPU if actor_resources(settings, job.threads)[1] else 1
    return max(1, min(partitions // PARTITIONS_PER_ENCODER, each * (settings.workers_max or actors(job))))


def _ahead(job: ExtractJob) -> int:
    """Bytes of encoded partitions that may wait: encoders are faster, and would fill the object store."""
    longest = job.plan.partition_rows * job.spec.task.max_tokens * TOKEN_BYTES
    return max(AHEAD_BYTES, PARTITIONS_AHEAD * longest * actors(job))


def _lost(error: Exception, begun: dict[int, int], limit: int) -> UserError:
    """One sentence with the name of the partition that took its worker down `limit` times."""
    # A worker holds several partitions: any that was there each time may be the one.
    worst = sorted(partition for partition, times in begun.items() if times == max(begun.values()))
    who = f"partition {' or '.join(map(str, worst))}" if worst else "a partition"
    return UserError(
        f"{who} was lost {limit} times with its worker, out of memory perhaps ({first_line(error)}): lower "
        "gradients.tokens_per_batch or extract.workers_max; the partitions that were written are kept, and "
        "the same command goes on from here."
    )


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Attempts:
    """Counts how often work on each partition was begun and not ended: it names one that kills its workers.

    It may be on a node that is lost; it begins anew then, and at worst a name is missing from a sentence.
    """

    def __init__(self) -> None:
        self._begun: collections.Counter[int] = collections.Counter()

    def begin(self, partition: int) -> None:
        """Work on a partition begins; the caller waits for the answer, so that its death comes after."""
        self._begun[partition] += 1

    def end(self, partition: int) -> None:
        """It has ended, well or with an error of its own."""
        self._begun.pop(partition, None)

    def unfinished(self) -> dict[int, int]:
        """Partition -> times it was begun since it last ended."""
        return dict(self._begun)


@contextlib.contextmanager
def _counted(attempts: Any, partition: int) -> Iterator[None]:
    """Say to `attempts` that a partition is being worked on; a worker that dies in the block does not say more."""
    ray.get(attempts.begin.remote(partition))
    try:
        yield
    finally:
        attempts.end.remote(partition)


CALLS = 2
"""Partitions that a gradient actor holds: one is computed while the one before it is written."""


GROW_AT = 1.25
"""Calls that an actor is given over those that it runs, from which on a pool takes another actor. Ray's default of 1.75
is more than the (CALLS + 1) / CALLS that a gradient actor is ever given: its pool would stay at `workers_min`."""


def _pool(smallest: int, largest: int | None, calls: int = 1) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=smallest,
        max_size=largest,
        max_tasks_in_flight_per_actor=calls + 1,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=calls > 1,
    )


class EncodePartition:
    """Reads a partition's documents and encodes them; the tokenizer is loaded once an actor."""

    def __init__(self, job: ExtractJob, attempts: Any) -> None:
        self.job, self.attempts = job, attempts
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """Made at first use: an exception in an actor's constructor would reach the driver as Ray's."""
        self._encoder = self._encoder or encoder_of(self.job)
        return self._encoder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"partition"} -> tokens, targets, offsets as bytes, and the quarantined as JSON."""
        partition = int(row["partition"])
        try:
            with _counted(self.attempts, partition):
                return again(lambda: self._encode(partition), self.job.spec.extract.max_attempts)
        except UserError as error:
            return _packed(partition, None, {"error": str(error)})

    def _encode(self, partition: int) -> dict[str, Any]:
        documents = read_partition(self.job.plan, partition, self.job.spec.corpus)
        with_prompt = documents.prompts is not None and documents.responses is not None
        texts = documents.responses if with_prompt else documents.text
        ragged = self.encoder.encode(texts or [], documents.prompts if with_prompt else None)
        found = ragged.problems | documents.problems
        problems = {str(i): [documents.ids[i], why] for i, why in found.items()}
        ragged = ragged.silenced(list(documents.problems))
        return _packed(partition, ragged, {"problems": problems, "truncated": documents.truncated})


class WritePartition:
    """Holds the working model; labels, differentiates and projects a partition, and writes its shard.

    Called from `CALLS` threads: a single thread of its own computes, so that sums are split alike and one
    partition at a time is on the device, while the callers unpack and write.
    """

    def __init__(self, job: ExtractJob, device: str, attempts: Any) -> None:
        import torch

        self.job, self.device, self.attempts = job, device, attempts
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (job.threads,))
        self._ready: tuple[GradientEngine, GradientStore] | None = None

    @property
    def ready(self) -> tuple[GradientEngine, GradientStore]:
        """Model and store, loaded at first use for the reason given in `EncodePartition.encoder`."""
        if self._ready is None:
            job = self.job
            require_cuda(self.device)
            endpoints = Endpoints(job.base, job.finetuned, job.spec.models.trust_remote_code)
            engine = GradientEngine(endpoints, encoder_of(job), job.target, job.spec, self.device)
            self._ready = engine, GradientStore.open(RunDir(job.run_uri), writable=True)
        return self._ready

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encoded partition -> its completion record as JSON."""
        about = json.loads(row["about"])
        if "error" in about:
            return {"receipt": row["about"]}
        try:
            with _counted(self.attempts, int(row["partition"])):
                record = again(lambda: self._write(row, about), self.job.spec.extract.max_attempts)
        except UserError as error:
            record = {"error": str(error)}
        return {"receipt": json.dumps(record)}

    def _gradients(self, ragged: Ragged) -> tuple[PartitionGradients, GradientEngine, GradientStore]:
        engine, store = self.ready
        return engine.run(ragged), engine, store

    def _write(self, row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        partition = int(row["partition"])
        gradients, engine, store = self._compute.submit(self._gradients, _unpacked(row)).result()
        problems = {int(i): (id_, why) for i, (id_, why) in about["problems"].items()}
        reasons = gradients.problems | {i: why for i, (_, why) in problems.items()}
        gradients = dataclasses.replace(gradients, problems=reasons)
        ids = self._ids(partition, reasons, {i: id_ for i, (id_, _) in problems.items()})
        record = store.write(partition, gradients, self.job.fingerprint, ids, about["truncated"])
        lowered = engine.batches.lowered
        return record if lowered is None else {**record, "tokens_per_batch": lowered}

    def _ids(self, partition: int, problems: dict[int, str], known: dict[int, str]) -> dict[int, str]:
        """Ids of all quarantined documents; read again only when the gradients added some."""
        if problems.keys() <= known.keys():
            return known
        ids = read_partition(self.job.plan, partition, self.job.spec.corpus).ids
        return {i: ids[i] for i in problems}


def encoder_of(job: ExtractJob) -> Encoder:
    """The run's encoder, made anew in the process that calls."""
    return spec_encoder(job.spec, job.base, job.finetuned)


def _packed(partition: int, ragged: Ragged | None, about: dict[str, Any]) -> dict[str, Any]:
    fields = ("tokens", "targets", "offsets")
    arrays = {name: b"" if ragged is None else getattr(ragged, name).tobytes() for name in fields}
    return {"partition": partition, **arrays, "about": json.dumps(about)}


def _unpacked(row: dict[str, Any]) -> Ragged:
    return Ragged(
        np.frombuffer(row["tokens"], np.int32),
        np.frombuffer(row["targets"], np.int32),
        np.frombuffer(row["offsets"], np.int64),
    )
