"""A calibration where the run itself would compute: in a Ray worker with a gradient actor's CPUs, GPU and threads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import ray

from cluster.extract import ExtractJob, actor_resources, actors, device_of, encoder_of, encoders
from engine.calibrate import Calibration, calibrate
from engine.checkpoints import Endpoints
from engine.errors import UserError
from engine.estimate import Machine
from engine.rundir import RunDir

SCRATCH = "calibration"
"""Folder of the run that a calibration writes to, and removes."""


@dataclass(frozen=True)
class Measured:
    """A calibration, seconds until its worker ran, and bytes free on that worker's node and GPU."""

    calibration: Calibration
    start: float
    memory: int
    device_memory: int


def measure(job: ExtractJob, seconds: float) -> Measured:
    """Calibrate for about so many seconds in a worker like a gradient actor; blocks."""
    cpus, gpus = actor_resources(job.spec.extract, job.threads)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_measure)
    sent = time.time()
    measured: Measured | str = ray.get(remote.remote(job, device_of(gpus), seconds, sent))
    if isinstance(measured, str):
        raise UserError(measured)
    return measured


def _measure(job: ExtractJob, device: str, seconds: float, sent: float) -> Measured | str:
    import torch

    start = time.time() - sent
    torch.set_num_threads(job.threads)
    memory = psutil.virtual_memory().available
    device_memory = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
    try:
        endpoints = Endpoints(job.base, job.finetuned, job.spec.models.trust_remote_code)
        scratch = RunDir(f"{job.run_uri}/{SCRATCH}")
        found = calibrate(
            job.spec, job.plan, job.target, endpoints, encoder_of(job), scratch, device, seconds
        )
    except UserError as error:
        return str(error)
    return Measured(found, start, memory, device_memory)


def machine(
    job: ExtractJob, session: float, start: float, memory: int, device_memory: int, disk: int | None
) -> Machine:
    """The connected cluster as a run would use it."""
    _, gpus = actor_resources(job.spec.extract, job.threads)
    return Machine(
        cpus=ray.cluster_resources().get("CPU", 1.0),
        workers=min(actors(job), max(1, job.plan.n_partitions)),
        gpu=gpus > 0,
        encoders=encoders(job, job.plan.n_partitions),
        session=session,
        start=start,
        memory=memory,
        device_memory=device_memory,
        disk=disk,
    )
