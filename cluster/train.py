"""Retraining on Ray: Ray Train starts the workers, keeps their checkpoints and replaces lost ones.

All that a worker needs beyond Ray (torch, transformers, deepspeed) is imported inside the worker function.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray

from cluster.session import gpus_per_worker
from engine.errors import UserError
from engine.rundir import fingerprint
from engine.spec import LossScope, Retrain, Task
from engine.storage import Folder

DONE = "training.json"
"""Metrics of a finished training, in the model's folder: with it the model is complete."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainJob:
    """One training: a base model and documents in, a model folder out.

    name: for progress and error messages. base: resolved local model folder. selection, validation: Parquet
    files with the columns of `engine.training.load_examples`. target: folder of the new model; with several
    nodes it has to be on storage that all of them see. checkpoints: where Ray Train keeps its checkpoints.
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


def train(job: TrainJob, progress: Progress | None = None) -> dict[str, Any]:
    """Train one model; see `train_many`."""
    return train_many([job], progress)[0]


def train_many(jobs: list[TrainJob], progress: Progress | None = None) -> list[dict[str, Any]]:
    """Train models one after the other in one group of workers, which is started once. Blocks.

    A job whose target is complete is not repeated. Workers that are lost are replaced, and go on from the
    last checkpoint; so does a second call with equal jobs after the driver's death.

    Args:
        jobs: may differ in all but `retrain`'s workers, gpus_per_worker, threads, max_failures and
            keep_checkpoints, and `checkpoints`.
        progress: called with {"job", "step", "steps", "epoch", "loss", "documents", "seconds"}, from a thread
            of its own.

    Returns:
        JSON-able metrics of each job (`engine.training.metrics` and where it ran). Each target is a folder
        that `AutoModelForCausalLM.from_pretrained` reads, whole or not there.

    Raises:
        UserError: unreadable documents or model, a diverging loss, no space.
        ray.train.TrainingFailedError: workers were lost more than retrain.max_failures times.
    """
    assert len({_group(job) for job in jobs}) == 1, "jobs of one group need the same workers"
    if not all(_complete(job) for job in jobs):
        _fit(jobs, progress or (lambda event: None))
    return [dict(Folder(job.target).read_json(DONE)) for job in jobs]


def _group(job: TrainJob) -> tuple[Any, ...]:
    r = job.retrain
    return (r.workers, r.gpus_per_worker, r.threads, r.max_failures, r.keep_checkpoints, job.checkpoints)


def _complete(job: TrainJob) -> bool:
    return Folder(job.target).exists(DONE)


def _fit(jobs: list[TrainJob], progress: Progress) -> None:
    """Run the worker function in a group of Ray Train workers until all targets are complete."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    retrain = jobs[0].retrain
    gpus = gpus_per_worker(retrain.gpus_per_worker)
    checkpoints = Folder(jobs[0].checkpoints)
    checkpoints.make()
    name = _run_name(jobs)
    mailbox = Mailbox.remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"jobs": jobs, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=retrain.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=checkpoints.uri,
            failure_config=FailureConfig(max_failures=retrain.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=retrain.keep_checkpoints),
        ),
    )
    with _delivered(mailbox, progress):
        trainer.fit()
        error = ray.get(mailbox.error.remote())
    if error is not None:
        raise UserError(error)
    lost = [job.target for job in jobs if not _complete(job)]
    if lost:
        raise UserError(f"the model in {lost[0]} cannot be seen from here: use storage that all nodes share.")
    checkpoints.remove(name)


def _run_name(jobs: list[TrainJob]) -> str:
    """A name that equal jobs on equal documents share, so that Ray Train resumes those and no others."""
    described = []
    for job in jobs:
        fields = {**asdict(job), "task": job.task.model_dump(), "retrain": job.retrain.model_dump()}
        fields["documents"] = [_digest(file) for file in (job.selection, job.validation) if file]
        described.append(fields)
    return f"{jobs[0].name}-{fingerprint(described)[:16]}".replace("/", "-")


def _digest(file: str) -> str:
    import hashlib

    parent, base = os.path.split(file)
    try:
        return hashlib.sha256(Folder(parent or ".").read_bytes(base)).hexdigest()
    except FileNotFoundError:
        raise UserError(f"the training documents {file} do not exist.") from None


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries what workers have to say to the driver while `fit` blocks."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._error: str | None = None

    def put(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    def fail(self, message: str) -> None:
        """Leave a user's error: it has one cause, so that retrying it would be of no use."""
        self._error = message

    def error(self) -> str | None:
        """The user's error, if any."""
        return self._error


@contextmanager
def _delivered(mailbox: Any, progress: Progress, every: float = 0.2) -> Iterator[None]:
    """Pass the mailbox's events to `progress` while the block runs, and the rest at its end."""
    stop = threading.Event()

    def deliver() -> None:
        for event in ray.get(mailbox.drain.remote()):
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
        ray.kill(mailbox)


def _worker(config: dict[str, Any]) -> None:
    """What every worker runs: the jobs in turn, skipping finished ones."""
    began = time.time()
    import torch
    import torch.distributed as dist
    import transformers
    from ray.train import get_context

    retrain = config["jobs"][0].retrain
    # whether a GPU was lent is known to torch alone: Ray hides the others
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    cores = len(os.sched_getaffinity(0)) // get_context().get_local_world_size()
    torch.set_num_threads(retrain.threads or max(1, cores))
    transformers.utils.logging.disable_progress_bar()
    for job in config["jobs"]:
        done = [_complete(job)]
        dist.broadcast_object_list(done)  # one worker decides for all
        if done[0]:
            continue
        try:
            _train_one(job, device, config["mailbox"], began)
            began = time.time()
        except UserError as error:
            # every worker comes here: `_agree` and `fit` raise on all or none
            if dist.get_rank() == 0:
                ray.get(config["mailbox"].fail.remote(f"{job.name}: {error}"))
            return


def _train_one(job: TrainJob, device: Any, mailbox: Any, began: float) -> None:
    """Train one job in this worker, from its checkpoint if there is one, and publish the model."""
    import pyarrow.parquet as pq  # noqa: F401  (loads the reader before the model takes the memory)
    import ray.train

    from cluster.deepspeed_stepper import DeepSpeedStepper
    from engine import training
    from engine.encode import Encoder
    from engine.models import load_tokenizer
    from engine.recipe import passes_per_step

    with _agree():
        tokenizer = load_tokenizer(job.base, job.trust_remote_code)
        encoder = Encoder(tokenizer, job.task, job.scope)
        examples = training.load_examples(_read(job.selection), encoder)
        judged = job.retrain.early_stopping and job.validation is not None
        validation = training.load_examples(_read(job.validation or ""), encoder) if judged else None
        world = ray.train.get_context().get_world_size()
        passes = passes_per_step(len(examples), job.retrain, world)
        stepper = DeepSpeedStepper(
            job.base, job.retrain, training.label_rows(encoder), passes, device, job.trust_remote_code
        )
    position = _resume(job, stepper, training.Position())
    startup, resumed_at = time.time() - began, position.step

    def report(event: dict[str, Any]) -> None:
        if stepper.rank == 0:
            mailbox.put.remote({"job": job.name, **event})

    hooks = training.Hooks(
        keep=lambda _: _export(stepper, tokenizer, f"{job.target}.best", None),
        checkpoint=lambda position: _checkpoint(job, stepper, position),
        progress=report,
    )
    classify = bool(encoder.label_ids)
    training.fit(stepper, examples, job.retrain, job.seed, position, validation, classify, hooks)
    metrics = {
        **training.metrics(position, examples, job.retrain),
        "name": job.name,
        "seed": job.seed,
        "workers": stepper.world,
        "device": device.type,
        "zero_stage": stepper.stage,
        "trained_parameters": stepper.trained,
        "startup_seconds": startup,
        "resumed_at": resumed_at,
    }
    if validation is None:
        _export(stepper, tokenizer, job.target, metrics)
    else:
        with _agree():
            if stepper.rank == 0:
                _promote(f"{job.target}.best", job.target, metrics)
    stepper.close()


@contextmanager
def _agree() -> Iterator[None]:
    """A UserError of one worker in the block becomes every worker's, so that none waits for another."""
    import torch.distributed as dist

    error: str | None = None
    try:
        yield
    except UserError as mine:
        error = str(mine)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise UserError(message)


def _read(file: str) -> Any:
    parent, base = os.path.split(file)
    try:
        return Folder(parent or ".").read_table(base)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the training documents {file}: {str(error).splitlines()[0]}.") from None


def _checkpoint(job: TrainJob, stepper: Any, position: Any) -> None:
    """Give Ray Train a checkpoint: every worker its part, the first one the position too."""
    import ray.train

    folder = tempfile.mkdtemp(prefix="unbake-")
    stepper.save(folder)
    if stepper.rank == 0:
        with open(f"{folder}/position.json", "w", encoding="utf-8") as file:
            json.dump({"job": job.name, "target": job.target, "position": position.as_dict()}, file)
    ray.train.report(
        {"step": position.step},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        delete_local_checkpoint_after_upload=True,
    )


def _resume(job: TrainJob, stepper: Any, start: Any) -> Any:
    """Load Ray Train's last checkpoint if it is this job's; the position it was made at, else `start`."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return start
    with checkpoint.as_directory() as folder:
        with open(f"{folder}/position.json", encoding="utf-8") as file:
            saved = json.load(file)
        if saved["target"] != job.target:
            return start
        stepper.load(folder)
    return type(start)(**saved["position"])


def _export(stepper: Any, tokenizer: Any, target: str, metrics: dict[str, Any] | None) -> None:
    """Write the model as a Hugging Face folder, whole or not at all; every worker has to call it."""
    from engine import models

    state = stepper.gathered()
    with _agree():
        if stepper.rank == 0:
            notes = {} if metrics is None else {DONE: json.dumps(metrics, indent=2, sort_keys=True)}
            with _local(target) as folder:
                try:
                    models.save(stepper.model, tokenizer, folder, state, notes)
                except OSError as error:
                    raise UserError(f"cannot write the model {target}: {error.strerror or error}.") from None


@contextmanager
def _local(target: str) -> Iterator[str]:
    """A local folder to write `target` to; for a remote one it is uploaded at the end, training.json last."""
    remote = Folder(target)
    if remote.local:
        yield remote.root
        return
    scratch = tempfile.mkdtemp(prefix="unbake-")
    try:
        yield f"{scratch}/model"
        for name in sorted(os.listdir(f"{scratch}/model"), key=lambda name: name == DONE):
            remote.fs.put_file(f"{scratch}/model/{name}", remote.path(name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _promote(best: str, target: str, metrics: dict[str, Any]) -> None:
    """Make the best epoch's model the result."""
    source, goal = Folder(best), Folder(target)
    if goal.local:
        source.write_json(DONE, metrics)
        goal.remove("")
        os.replace(source.root, goal.root)
    else:
        source.fs.mv(source.root, goal.root, recursive=True)
        goal.write_json(DONE, metrics)
