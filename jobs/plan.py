"""unbake plan: what a run will take, before it runs: documents, tokens, hours, disk and memory, with warnings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import time

import torch
import transformers

import cluster.calibrate
import cluster.extract
from cluster.deepspeed_config import deepspeed_config, fit_buckets
from cluster.session import session
from engine.calibrate import Calibration
from engine.errors import UserError
from engine.estimate import Estimate, Machine, ModelSize, estimate, human
from engine.models import load_config, torch_dtype
from engine.recipe import passes_per_step
from engine.recipe import prepare as prepare_training
from engine.report.numbers import duration
from engine.storage import reason
from engine.store import StoreShape
from jobs.extract import Prepared, prepare
from jobs.job import Job
from jobs.options import parse_spec, spec_parser

SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """`unbake plan`: calibrate, estimate, print."""
    spec, options = parse_spec(parser(), arguments)
    if spec is None:
        return 0
    job = Job(spec, quiet=options["quiet"], verbose=options["verbose"])
    with job.locked():
        result = plan(
            job, options["seconds"], options["documents"], options["workers"], options["docs_per_second"]
        )
    if options["json"]:
        try:
            with open(options["json"], "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(result), file, indent=2)
        except OSError as error:
            raise UserError(f"cannot write {options['json']}: {reason(error)}.") from None
    print(table(result))
    print(f"\nDeepSpeed configuration\n  {deepspeed_text(job)}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command: every field of the spec, and what the estimate is asked for."""
    made = spec_parser(
        "plan", "Estimate a run before it runs, from a short calibration; it starts no stage of it."
    )
    group = made.add_argument_group("the estimate")
    group.add_argument(
        "--seconds", type=_positive, default=SECONDS, help="seconds of calibration (default: 30)"
    )
    group.add_argument("--json", metavar="PATH", help="write the estimate as JSON too")
    group.add_argument("--documents", type=_count, help="suppose so many documents, of the corpus's kind")
    group.add_argument(
        "--workers", type=_count, help="suppose so many gradient actors, each as fast as this one"
    )
    group.add_argument(
        "--docs-per-second", type=_positive, help="suppose this speed of one gradient actor, measure nothing"
    )
    return made


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number, at least 1, not {text!r}")
    return int(text)


def plan(
    job: Job,
    seconds: float = SECONDS,
    documents: int | None = None,
    workers: int | None = None,
    rate: float | None = None,
) -> Estimate:
    """The estimate of a run.

    Args:
        seconds: of calibration.
        documents, workers, rate: suppositions, in place of the corpus, of this machine's gradient actors, and
            of their measured speed (documents a second of one; nothing is then measured).
    """
    ready = prepare(job)
    began = time.perf_counter()
    with session(job.spec.ray, job.verbose):
        work = _work(job, ready)
        ray_start, start, memory, device_memory = time.perf_counter() - began, 0.0, _memory(), 0
        calibration: Calibration | None = None
        if rate is None:
            job.progress.say(f"calibrating for about {seconds:g} seconds")
            measured = cluster.calibrate.measure(work, seconds)
            calibration, start = measured.calibration, measured.start
            memory, device_memory = measured.memory, measured.device_memory
        machine = cluster.calibrate.machine(work, ray_start, start, memory, device_memory, _free_disk(job))
    if workers is not None:
        machine = _scaled(machine, workers)
    rows = documents or ready.plan.n_rows
    shape = StoreShape(
        len(job.spec.gradients.fractions), rows, ready.target.dim, job.spec.corpus.partition_rows_of(rows)
    )
    return estimate(job.spec, shape, model_size(job), machine, calibration, rate)


def _work(job: Job, ready: Prepared) -> cluster.extract.ExtractJob:
    return cluster.extract.ExtractJob(
        spec=job.spec,
        run_uri=job.run.uri,
        plan=ready.plan,
        target=ready.target,
        base=job.endpoints.base,
        finetuned=job.endpoints.finetuned,
        fingerprint="",
        threads=cluster.extract.threads_per_worker(job.spec.extract),
    )


def _scaled(machine: Machine, workers: int) -> Machine:
    """The same kind of machine, with CPUs and encoders in proportion to the gradient actors."""
    times = workers / machine.workers
    return dataclasses.replace(
        machine,
        workers=workers,
        cpus=machine.cpus * times,
        encoders=max(machine.encoders, round(machine.encoders * times)),
    )


def _free_disk(job: Job) -> int | None:
    return shutil.disk_usage(job.run.root).free if job.run.local and os.path.isdir(job.run.root) else None


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def model_size(job: Job) -> ModelSize:
    """Sizes of the base model, from its configuration alone."""
    trust = job.spec.models.trust_remote_code
    config = load_config(job.endpoints.base, trust)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        parameters = sum(p.numel() for p in model.parameters())
        prepare_training(model, job.spec.retrain)
    text = config.get_text_config()
    return ModelSize(
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        hidden=text.hidden_size,
        depth=text.num_hidden_layers,
        vocab=text.vocab_size,
    )


def table(result: Estimate) -> str:
    """The estimate as text."""
    rows: list[tuple[str, str]] = [
        ("documents", f"{result.documents:,} in {result.partitions:,} partitions"),
        ("forward passes", f"{result.forward_passes:,}"),
    ]
    if result.tokens:
        rows.insert(
            1, ("tokens", f"{result.tokens:,.0f} +- {2 * result.tokens_error:,.0f} (from a sample, 95%)")
        )
    blocks = [("", rows)]
    stages = [(stage.name, f"{_hours(stage.hours):>12}  {stage.work}") for stage in result.stages]
    known = [stage.hours for stage in result.stages if stage.hours is not None]
    if len(known) == len(stages):
        stages.append(("all", f"{_hours(sum(known)):>12}"))
    spent = [stage.device_hours for stage in result.stages if stage.device_hours is not None]
    stages.append((f"{result.device} hours", f"{sum(spent):,.2f}"))
    blocks += [("time", stages), ("disk", _sizes(result.disk)), ("memory", _sizes(result.memory))]
    zero = [
        (name, f"{human(sum(parts.values()))}  " + ", ".join(f"{k} {human(v)}" for k, v in parts.items()))
        for name, parts in result.zero.items()
    ]
    blocks.append(("training worker, without activations and logits", zero))
    width = max(len(name) for _, lines in blocks for name, _ in lines)
    out = []
    for title, lines in blocks:
        out += [f"\n{title}"] if title else []
        out += [f"  {name:<{width}}  {value}" for name, value in lines]
    return "\n".join(out)


def deepspeed_text(job: Job) -> str:
    """The DeepSpeed configuration that the spec means for this model, as JSON."""
    retrain = job.spec.retrain
    if not retrain.needs_deepspeed:
        return "none: one worker trains with plain torch"
    passes = passes_per_step(job.spec.select.size, retrain, retrain.workers)
    config = deepspeed_config(retrain, passes, str(torch_dtype(retrain.dtype)).removeprefix("torch."))
    fit_buckets(config, model_size(job).trained)
    return json.dumps(config)


def _sizes(sizes: dict[str, int]) -> list[tuple[str, str]]:
    return [(name, human(value)) for name, value in sizes.items()]


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else duration(3600 * hours)
