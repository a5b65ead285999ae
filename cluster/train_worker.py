"""What a training worker runs: one job after another from the board, each from its last checkpoint.

All that a worker needs (torch, transformers, deepspeed) is imported inside its functions: the driver imports
this file and must claim no device.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import ray

from cluster.train import DONE, Stored, TrainJob
from engine.errors import UserError
from engine.storage import Folder, failed, storage_errors


def worker(config: dict[str, Any]) -> None:
    """What every worker of a lane runs: jobs until the board has none."""
    clock = {"called": config["called"], "workers": time.time()}
    device = _device(config["jobs"][0])
    clock["imports"] = time.time()
    from cluster.agreement import from_first

    board, lane = config["board"], config["lane"]
    while True:
        number = from_first(lambda: ray.get(board.current.remote(lane)))
        if number is None:
            return
        job, print_ = config["jobs"][number], config["fingerprints"][number]
        error = None
        try:
            # done already when the workers were lost between the model's last byte and this line's end
            if not from_first(lambda job=job: Folder(job.target).exists(DONE)):
                _train_one(job, print_, config["examples"][number], device, board, clock)
        except UserError as mistake:  # every worker comes here: `agree` and `fit` raise on all or none
            error = f"{job.name}: {mistake}"
        from_first(lambda error=error: ray.get(board.finished.remote(lane, error)))
        clock = {"called": time.time()}


def _device(job: TrainJob) -> Any:
    """This worker's device, and its threads set."""
    import torch
    import transformers
    from ray.train import get_context

    transformers.utils.logging.disable_progress_bar()
    # whether a GPU was lent is known to torch alone: Ray hides the others
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from engine.memory import keep_freed_memory

    keep_freed_memory()
    os.environ["DS_ACCELERATOR"] = "cpu"
    cores = len(os.sched_getaffinity(0)) // get_context().get_local_world_size()
    torch.set_num_threads(job.retrain.threads or max(1, cores))
    return torch.device("cpu")


def _train_one(
    job: TrainJob, print_: str, stored: Stored, device: Any, board: Any, clock: dict[str, float]
) -> None:
    """Train one job in this worker, from its checkpoint if there is one, and publish the model.

    Args:
        stored: folders of the job's encoded documents.
        clock: when the job was called for, and when each part of the start since then was over.
    """
    from ray.train import get_context

    from cluster.agreement import agree
    from cluster.checkpoints import Checkpoints
    from cluster.extension_locks import clear_dead_locks
    from engine import training
    from engine.encode import Encoder
    from engine.examples import StoredExamples
    from engine.losses import label_rows
    from engine.models import load_tokenizer
    from engine.recipe import passes_per_step

    context = get_context()
    world = context.get_world_size()
    with agree():
        tokenizer = load_tokenizer(job.base, job.trust_remote_code, job.template_of)
        encoder = Encoder(tokenizer, job.task, job.scope)
        examples = StoredExamples(stored[0])
        validation = StoredExamples(stored[1]) if stored[1] is not None else None
    checkpoints = Checkpoints(
        f"{job.checkpoints}/{job.name.replace('/', '-')}-{print_[:16]}",
        job.retrain.keep_checkpoints,
        context.get_local_rank(),
    )
    if job.retrain.needs_deepspeed and checkpoints.first_on_node:
        clear_dead_locks()
    record = checkpoints.last()  # every worker comes here before one can build anything
    passes = passes_per_step(len(examples), job.retrain, world)
    stepper = _stepper(job, label_rows(encoder), passes, device, bool(record) and record["workers"] != world)
    try:
        position = training.Position()
        if record is not None:
            _load(checkpoints, record, stepper, world)
            position = training.Position(**record["position"])
        clock["model"] = time.time()
        resumed_at = position.step
        training.fit(
            stepper,
            examples,
            job.retrain,
            job.seed,
            position,
            validation,
            bool(encoder.label_ids),
            _hooks(job, stepper, tokenizer, checkpoints, board),
        )
        metrics = {
            **training.metrics(position, examples, job.retrain),
            **_circumstances(stepper, clock),
            "name": job.name,
            "seed": job.seed,
            "fingerprint": print_,
            "resumed_at": resumed_at,
        }
        if validation is None or not job.retrain.early_stopping:
            _export(job, stepper, tokenizer, job.target, metrics)
        else:
            with agree():
                if stepper.rank == 0:
                    _promote(f"{job.target}.best", job.target, metrics)
        if stepper.rank == 0:
            checkpoints.discard()
    finally:
        stepper.close()
        examples.close()
        if validation is not None:
            validation.close()


def _hooks(job: TrainJob, stepper: Any, tokenizer: Any, checkpoints: Any, board: Any) -> Any:
    """What happens around the loop: news for the driver, checkpoints, the best model so far."""
    from engine import training

    def report(event: dict[str, Any]) -> None:
        if stepper.rank == 0:
            board.put.remote({"job": job.name, **event})

    def checkpoint(position: Any) -> None:
        record = {"position": position.as_dict(), "workers": stepper.world}
        checkpoints.save(position.step, record, stepper.save)
        if job.trajectory is not None:
            _export(job, stepper, tokenizer, f"{job.trajectory}/step-{position.step:06d}", None)

    return training.Hooks(
        keep=lambda _: _export(job, stepper, tokenizer, f"{job.target}.best", None),
        checkpoint=checkpoint,
        progress=report,
    )


def _circumstances(stepper: Any, clock: dict[str, float]) -> dict[str, Any]:
    """How and where a training ran, for its metrics."""
    import torch

    return {
        "workers": stepper.world,
        "device": stepper.device.type,
        "threads": torch.get_num_threads(),
        "zero_stage": stepper.stage,
        "deepspeed": stepper.config,
        "trained_parameters": stepper.trained_parameters,
        "startup_seconds": clock["model"] - clock["called"],
        "startup": {name: end - start for (_, start), (name, end) in pairwise(clock.items())},
    }


def _stepper(
    job: TrainJob, label_ids: list[int] | None, passes: tuple[int, int], device: Any, resized: bool
) -> Any:
    """The base model in training: by plain torch where one worker has nothing to partition."""
    from cluster.agreement import agree

    with agree():
        if not job.retrain.needs_deepspeed:
            from cluster.single_stepper import SingleStepper

            return SingleStepper(job.base, job.retrain, label_ids, device, job.seed, job.trust_remote_code)
        from cluster.deepspeed_stepper import DeepSpeedStepper

        return DeepSpeedStepper(
            job.base, job.retrain, label_ids, passes, device, job.seed, job.trust_remote_code, resized
        )


def _load(checkpoints: Any, record: dict[str, Any], stepper: Any, world: int) -> None:
    """Continue from a checkpoint; one of another number of workers is rewritten first, once for each node."""
    import torch.distributed as dist

    with checkpoints.opened(record["name"]) as folder:
        if record["workers"] == world:
            stepper.load(folder)
            return
        from cluster.deepspeed_stepper import to_universal

        with checkpoints.shared_on_node() as universal:
            if checkpoints.first_on_node:
                to_universal(folder, universal)
            dist.barrier()
            stepper.load(universal)


def _export(job: TrainJob, stepper: Any, tokenizer: Any, target: str, metrics: dict[str, Any] | None) -> None:
    """Write the model as a Hugging Face folder, whole or not at all; every worker has to call it."""
    from cluster.agreement import agree
    from engine import adapters
    from engine.model_files import save

    state = stepper.gathered("lora_" if job.retrain.lora.rank else "")
    notes = {} if metrics is None else {DONE: json.dumps(metrics, indent=2, sort_keys=True)}
    with agree():
        if stepper.rank == 0:
            with _local(target) as folder:
                try:
                    if job.retrain.lora.rank:
                        adapters.save_trained_adapter(
                            stepper.model, job.retrain, job.base, folder, state, notes, job.trust_remote_code
                        )
                    else:
                        save(stepper.model, tokenizer, folder, state, notes)
                except storage_errors() as error:
                    raise failed(f"cannot write the model {target}", error) from None


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
            remote.upload(f"{scratch}/model/{name}", name)
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
