"""Retraining on Ray: which trainings run where and when, and what the driver learns of them.

Ray Train starts the workers and replaces lost ones; `cluster.train_worker` is what they run. Each training has
checkpoints of its own, so each is resumed by itself whatever the others have come to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.session import gpus_per_worker
from engine.errors import UserError
from engine.rundir import fingerprint
from engine.spec import LossScope, Placement, Retrain, Task
from engine.storage import Folder
from engine.train_log import TrainLog

DONE = "training.json"
"""Metrics of a finished training, in the model's folder: with it the model is complete."""

NO_BYTES = (
    "strategies",
    "seeds",
    "checkpoint_steps",
    "keep_checkpoints",
    "max_failures",
    "parallel",
    "loggers",
    "cpus_per_worker",
    *Placement.model_fields,
)
"""Fields of the section that change nothing in a model's bytes."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainJob:
    """One training: a base model and documents in, a model folder out.

    name: for progress and error messages. base: resolved local model folder. selection, validation: Parquet
    files with the columns of `engine.examples.encode_documents`. target: folder of the new model; with several
    nodes it has to be on storage that all of them see. checkpoints: folder on any URI below which this
    training keeps its checkpoints. base_hash, finetuned_hash: of the models' weights, if they are known.
    chat: the documents are chats. finetuned: the fine-tuned model, for soft labels and for the chat template
    that a base model may lack. logs: folder for the training's log, or None. trajectory: folder in which the
    model of every checkpoint is kept as `step-<n>`, or None.
    """

    name: str
    base: str
    selection: str
    target: str
    checkpoints: str
    task: Task
    scope: LossScope
    retrain: Retrain
    seed: int
    validation: str | None = None
    trust_remote_code: bool = False
    base_hash: str | None = None
    finetuned: str | None = None
    finetuned_hash: str | None = None
    chat: bool = False
    logs: str | None = None
    trajectory: str | None = None

    @property
    def template_of(self) -> str | None:
        """The model whose chat template serves where the base has none."""
        return self.finetuned if self.chat else None

    @property
    def judged_on(self) -> str | None:
        """The validation documents, if this training is judged on any."""
        return self.validation if self.retrain.judges else None

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """`document_hash` of the selection and, where there is one, of the validation documents, by file."""
        return {file: document_hash(file) for file in (self.selection, self.validation) if file}

    def fingerprint(self) -> str:
        """sha256 (hex) of all that the model's bytes depend on; UserError when documents are missing."""
        fields = {
            "base": self.base_hash or self.base,
            "documents": list(self.hashes.values()),
            "task": self.task.model_dump(mode="json"),
            "scope": self.scope,
            "chat": self.chat,
            "finetuned": (self.finetuned_hash or self.finetuned) if self.retrain.labels == "soft" else None,
            "retrain": self.retrain.model_dump(mode="json", exclude=set(NO_BYTES)),
            "seed": self.seed,
        }
        return fingerprint(fields)


def train(job: TrainJob, progress: Progress | None = None) -> dict[str, Any]:
    """Train one model; see `train_many`."""
    return train_many([job], progress)[0]


def train_many(jobs: list[TrainJob], progress: Progress | None = None) -> list[dict[str, Any]]:
    """Train models, as many at a time as `lanes` says, each lane in one group of workers. Blocks.

    A job whose target is complete is not repeated. Workers that are lost are replaced, and go on from their
    job's last checkpoint; so does a second call, with any other jobs beside it, after the driver's death.
    A user's error in one job does not keep the others from their end.

    Args:
        jobs: may differ in all but what `worker_group` holds.
        progress: called with {"job", "step", "steps", "epoch", "loss", "documents", "seconds"}, from a thread
            of its own.

    Returns:
        JSON-able metrics of each job (`engine.training.metrics` and where it ran). Each target is a folder
        that `AutoModelForCausalLM.from_pretrained` (or PEFT) reads, whole or not there.

    Raises:
        UserError: unreadable documents or model, a diverging loss, no space, or a target that holds the model
            of another training.
        ray.train.TrainingFailedError: a lane's workers were lost more than retrain.max_failures times.
    """
    assert len({worker_group(job) for job in jobs}) == 1, "jobs of one call need the same workers"
    prints = [job.fingerprint() for job in jobs]
    todo = [i for i, job in enumerate(jobs) if not _complete(job, prints[i])]
    if todo:
        _run([jobs[i] for i in todo], [prints[i] for i in todo], progress or (lambda event: None))
    return [dict(Folder(job.target).read_json(DONE)) for job in jobs]


def lanes(jobs: list[TrainJob]) -> int:
    """How many trainings run at a time: what the cluster's resources hold, at most `retrain.parallel`.

    A CPU worker without `threads` takes what its node has, and an elastic training what the cluster has: then
    one at a time.
    """
    retrain = jobs[0].retrain
    each = worker_resources(retrain)
    if retrain.elastic or ("GPU" not in each and retrain.threads is None):
        return 1
    total = ray.cluster_resources()
    room = min(int(total.get(name, 0) // (need * retrain.workers)) for name, need in each.items())
    return max(1, min(room, len(jobs), retrain.parallel or room))


def worker_resources(retrain: Retrain) -> dict[str, float]:
    """What Ray reserves for one worker: its GPUs and a CPU, or a CPU for each of its threads if they fit."""
    gpus = gpus_per_worker(retrain.gpus_per_worker)
    memory = {} if retrain.memory_mb is None else {"memory": float(retrain.memory_mb << 20)}
    if gpus:
        return {"CPU": retrain.cpus_per_worker or 1, "GPU": gpus, **memory}
    return {"CPU": retrain.cpus_per_worker or _threads_that_fit(retrain), **memory}


def _threads_that_fit(retrain: Retrain) -> int:
    """A worker's threads, as far as a node has CPUs for them."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fits = max(max(nodes, default=1), 1)
    if len(nodes) == 1:
        fits = max(1, fits // retrain.workers)
    return min(retrain.threads or 1, fits)


def worker_group(job: TrainJob) -> tuple[Any, ...]:
    """What trainings must agree in to run in one call of `train_many`: the workers, and where checkpoints lie."""
    r = job.retrain
    return (
        r.workers,
        r.workers_max,
        r.gpus_per_worker,
        r.cpus_per_worker,
        r.memory_mb,
        r.accelerator_type,
        tuple(r.node_labels.items()),
        r.threads,
        r.max_failures,
        r.parallel,
        job.checkpoints,
    )


def _complete(job: TrainJob, print_: str) -> bool:
    """Whether the target is this training's; UserError when it is another's."""
    folder = Folder(job.target)
    if not folder.exists(DONE):
        return False
    if folder.read_json(DONE).get("fingerprint") != print_:
        raise UserError(
            f"{job.target} holds a model that was trained on other documents or otherwise: "
            "use another folder, or remove it to train again."
        )
    return True


def document_hash(file: str) -> str:
    """sha256 (hex) of a file of documents, read in pieces; UserError when it is not there."""
    parent, base = os.path.split(file)
    folder = Folder(parent or ".")
    try:
        with folder.fs.open(folder.path(base), "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"the training documents {file} do not exist.") from None


def _run(jobs: list[TrainJob], prints: list[str], progress: Progress) -> None:
    """Run all lanes to their end."""
    examples, failed = _encoded(jobs)
    ready = [i for i in range(len(jobs)) if examples[i] is not None]
    with _logged([jobs[i] for i in ready], progress) as logged:
        errors = failed + _lanes([jobs[i] for i in ready], [prints[i] for i in ready], examples, logged)
    if errors:
        more = f" (and {len(errors) - 1} more failed)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)
    lost = [job.target for job, print_ in zip(jobs, prints, strict=True) if not _complete(job, print_)]
    if lost:
        raise UserError(f"the model in {lost[0]} cannot be seen from here: use storage that all nodes share.")


Stored = tuple[str, str | None]
"""Folders of a job's encoded documents: selection, validation."""


def _encoded(jobs: list[TrainJob]) -> tuple[list[Stored | None], list[str]]:
    """The jobs' encoded documents, None for a job whose documents or models are of no use; and why."""
    from cluster.examples import stored_examples

    found: list[Stored | None] = []
    errors = []
    for job in jobs:
        try:
            selection = stored_examples(job, job.selection, job.retrain.labels == "soft")
            found.append((selection, job.judged_on and stored_examples(job, job.judged_on, False)))
        except UserError as error:
            found.append(None)
            errors.append(f"{job.name}: {error}")
    return found, errors


@contextmanager
def _logged(jobs: list[TrainJob], progress: Progress) -> Iterator[Progress]:
    """`progress` that also keeps the logs of the jobs that have one."""
    logs: dict[str, TrainLog] = {}
    for job in jobs:
        if job.logs is not None:
            parameters = {**job.retrain.model_dump(mode="json"), "seed": job.seed, "base": job.base}
            logs[job.name] = TrainLog(job.logs, job.name, list(job.retrain.loggers), parameters)

    def both(event: dict[str, Any]) -> None:
        lines = event.pop("log", [])
        if event["job"] in logs:
            logs[event["job"]].add(lines)
        progress(event)

    try:
        yield both
    finally:
        for log in logs.values():
            log.close()


def _lanes(
    jobs: list[TrainJob], prints: list[str], examples: list[Stored | None], progress: Progress
) -> list[str]:
    """Train the jobs; the users' errors of those that failed."""
    if not jobs:
        return []
    count = lanes(jobs)
    # beside the driver, without which it is of no use: any other node may be lost while the workers go on
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote(len(jobs))
    runs = Folder(f"{jobs[0].checkpoints}/.ray")
    stored = [folders for folders in examples if folders is not None]
    config = {"jobs": jobs, "fingerprints": prints, "examples": stored, "board": board}
    group = fingerprint(prints)[:16]
    with _delivered(board, progress):
        _together(
            [
                lambda lane=lane: _fit({**config, "lane": lane}, runs, f"{group}-{lane}")
                for lane in range(count)
            ]
        )
        errors: list[str] = ray.get(board.errors.remote())
    runs.remove("")
    return errors


def _together(calls: list[Callable[[], None]]) -> None:
    """Run calls at the same time; the first error is raised when all have ended."""
    if len(calls) == 1:
        calls[0]()  # in the main thread, where Ray Train can hear an interrupt
        return
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    for call in calls:
        # daemons: after an interrupt the driver leaves without them
        threading.Thread(target=run, args=(call,), daemon=True).start()
    errors = [ended.get() for _ in calls]
    for error in errors:
        if error is not None:
            raise error


def _fit(config: dict[str, Any], runs: Folder, name: str) -> None:
    """One lane: a group of Ray Train workers that takes jobs from the board until there are none."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.train_worker import worker

    retrain = config["jobs"][0].retrain
    resources = worker_resources(retrain)
    gpu = "GPU" in resources
    runs.make()
    TorchTrainer(
        worker,
        train_loop_config={**config, "called": time.time()},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(retrain.workers, retrain.workers_max) if retrain.elastic else retrain.workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            accelerator_type=retrain.accelerator_type,
            label_selector=dict(retrain.node_labels) or None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=runs.root,
            storage_filesystem=None if runs.local else _arrow(runs),
            failure_config=FailureConfig(max_failures=retrain.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()


RESIZE_SECONDS = 15.0
"""Seconds between two looks of an elastic training at what the cluster has."""


def _arrow(folder: Folder) -> Any:
    """The folder's file system as Ray Train takes it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(folder.fs))


@ray.remote(num_cpus=0)
class Board:
    """Hands jobs to lanes, and carries what workers have to say to the driver while `fit` blocks."""

    def __init__(self, jobs: int) -> None:
        self._waiting = list(range(jobs))
        self._taken: dict[int, int] = {}
        self._events: list[dict[str, Any]] = []
        self._errors: dict[int, str] = {}

    def current(self, lane: int) -> int | None:
        """The job a lane is at, a new one if it has none; None when nothing is left."""
        if lane not in self._taken and self._waiting:
            self._taken[lane] = self._waiting.pop(0)
        return self._taken.get(lane)

    def finished(self, lane: int, error: str | None = None) -> None:
        """A lane is done with its job, or has met a user's error: one that repeating would not mend."""
        job = self._taken.pop(lane)
        if error is not None:
            self._errors[job] = error

    def put(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    def errors(self) -> list[str]:
        """Users' errors, in the order of the jobs."""
        return [self._errors[job] for job in sorted(self._errors)]


@contextmanager
def _delivered(board: Any, progress: Progress, every: float = 0.2) -> Iterator[None]:
    """Pass the board's events to `progress` while the block runs, and the rest at its end."""
    stop = threading.Event()

    def deliver() -> None:
        for event in ray.get(board.drain.remote()):
            progress(event)

    def loop() -> None:
        while not stop.wait(every):
            deliver()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        deliver()
        ray.kill(board)
