"""Calibrate: what each step of a run costs here, measured on a sample of its corpus, with its model and its code.

Nothing is modelled: documents are read and encoded as extraction does, differentiated by `GradientEngine`,
written to a store beside the run's own, selected from by `engine.select` and trained on by `PlainStepper`.
`engine.estimate` scales what came out.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import psutil
import torch

from engine.checkpoints import Endpoints
from engine.corpus import Plan, read_partition, read_rows
from engine.encode import Encoder
from engine.gradients import GradientEngine, PartitionGradients
from engine.losses import label_rows
from engine.models import load_model, torch_dtype
from engine.padding import length_batches
from engine.plain_stepper import train_plain
from engine.ragged import Ragged, joined
from engine.rows import ArrayRows
from engine.rundir import RunDir
from engine.select import Columns, select
from engine.spec import RunSpec
from engine.store import GradientStore, StoreShape
from engine.target import Target

RUN_ROWS = 64
"""Consecutive documents of the corpus that are read together; such runs are spread evenly over it."""

SHARES = {"encode": 0.15, "gradient": 0.5, "select": 0.15, "train": 0.2}
"""Shares of the time that a calibration may take."""

TRAINED_BYTES = 20
"""Bytes a weight that training is taken to need when it is decided whether to try it: 16, and something on top."""

FETCHED = 256
"""Single rows of the store that are read on trial."""

ROUNDS = 5
"""Times that a batch is measured at most, where there is time."""

WRITE_BYTES, SELECT_BYTES, SELECT_ROWS = 64 << 20, 128 << 20, 1 << 18
"""Most bytes of a partition written on trial, and of the rows selected from on trial; most of those rows."""


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of CPU time over all threads."""

    wall: float
    cpu: float

    def __mul__(self, times: float) -> Cost:
        return Cost(self.wall * times, self.cpu * times)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Calibration:
    """What was measured; costs are those of one process on this machine.

    documents: sampled. tokens, tokens_error: mean tokens of a document and its standard error. seek:
    reading one run of RUN_ROWS documents somewhere in the corpus. text: reading a document with its whole
    partition. encode: encoding a document. gradient: a document at one checkpoint; timed: documents that
    it was measured on. interpolate: moving the model to another checkpoint. write: a document's rows.
    load: model, head and projector of a worker. read, fetch: a row of the store, streamed and by itself.
    index: a row. pick, pick_row: a pick is pick + rows * pick_row. train: a document, one epoch; None
    when the training would not fit beside the rest. encoder_bytes, worker_bytes: peak memory of the
    process after encoding and after writing; device_bytes: of the GPU, or 0.
    """

    documents: int
    tokens: float
    tokens_error: float
    seek: float
    text: Cost
    encode: Cost
    gradient: Cost
    timed: int
    interpolate: Cost
    write: Cost
    load: float
    read: float
    fetch: float
    index: float
    pick: float
    pick_row: float
    train: float | None
    encoder_bytes: int
    worker_bytes: int
    device_bytes: int


class Watch:
    """Measures a block: ``with Watch() as watch: ...; watch.cost``."""

    cost = Cost(0.0, 0.0)

    def __enter__(self) -> Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def calibrate(
    spec: RunSpec,
    plan: Plan,
    target: Target,
    endpoints: Endpoints,
    encoder: Encoder,
    scratch: RunDir,
    device: str,
    seconds: float,
) -> Calibration:
    """Measure for about so many seconds, loading the model not counted.

    Args:
        spec, plan, target, endpoints, encoder: of the run.
        scratch: a folder on the run's storage; removed at the end.
        device: where gradients are taken: cpu, cuda, or auto for a model spread over several GPUs.
    """
    sample, seek, encode = _encode(spec, plan, encoder, SHARES["encode"] * seconds)
    with Watch() as text:
        documents = len(read_partition(plan, plan.n_partitions // 2, spec.corpus))
    encoder_bytes = psutil.Process().memory_info().rss
    one = spec.model_copy(update={"gradients": spec.gradients.model_copy(update={"checkpoints": [1.0]})})
    with Watch() as load:
        engine = GradientEngine(endpoints, encoder, target, one, device)
    rows = min(plan.partition_rows, plan.n_rows)
    gradient, found, timed = _gradients(engine, sample, rows, SHARES["gradient"] * seconds)
    with Watch() as interpolate:
        if spec.gradients.fractions != [1.0]:
            engine.endpoints.interpolate(engine.model, 0.5)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    del engine
    gc.collect()
    try:
        write, read, fetch = _store(spec, plan, target, found, scratch)
    finally:
        scratch.remove("")
    worker_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    gpus = range(0 if device == "cpu" else torch.cuda.device_count())
    device_bytes = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    train = _train(spec, endpoints, encoder, sample, parameters, device, SHARES["train"] * seconds)
    index, pick, pick_row = _select(spec, plan.n_rows, found, SHARES["select"] * seconds)
    lengths = sample.lengths
    return Calibration(
        documents=len(sample),
        tokens=float(lengths.mean()),
        tokens_error=float(lengths.std() / math.sqrt(len(lengths))),
        seek=seek,
        text=text.cost * (1 / documents),
        encode=encode,
        gradient=gradient,
        timed=timed,
        interpolate=interpolate.cost,
        write=write,
        load=load.cost.wall,
        read=read,
        fetch=fetch,
        index=index,
        pick=pick,
        pick_row=pick_row,
        train=train,
        encoder_bytes=encoder_bytes,
        worker_bytes=worker_bytes,
        device_bytes=device_bytes,
    )


def sample_runs(plan: Plan) -> Iterator[npt.NDArray[np.int64]]:
    """Runs of consecutive rows, a partition's worth in all, spread evenly over the corpus, in a mixed order."""
    count = max(1, min(plan.partition_rows, plan.n_rows) // RUN_ROWS)
    starts = np.linspace(0, max(0, plan.n_rows - RUN_ROWS), count).astype(np.int64)
    for i in spread(count):
        yield np.arange(starts[i], min(starts[i] + RUN_ROWS, plan.n_rows))


def spread(count: int) -> list[int]:
    """0..count-1 in an order whose every beginning is spread evenly (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in order if i < count]


def _encode(spec: RunSpec, plan: Plan, encoder: Encoder, seconds: float) -> tuple[Ragged, float, Cost]:
    """The encoded sample, seconds to read a run of it, and the cost of encoding a document."""
    parts: list[Ragged] = []
    read, encode = Cost(0.0, 0.0), Cost(0.0, 0.0)
    encoder.encode(["to load what the tokenizer loads when it is first used"])
    for rows in sample_runs(plan):
        with Watch() as watch:
            documents = read_rows(plan, rows, spec.corpus)
        read += watch.cost
        with Watch() as watch:
            prompts = documents.prompts if documents.responses is not None else None
            texts = documents.text if documents.responses is None else documents.responses
            parts.append(encoder.encode(texts, prompts).silenced(list(documents.problems)))
        encode += watch.cost
        if read.wall + encode.wall > seconds:
            break
    sample = joined(parts)
    return sample, read.wall / len(parts), encode * (1 / len(sample))


def _gradients(
    engine: GradientEngine, sample: Ragged, rows: int, seconds: float
) -> tuple[Cost, PartitionGradients, int]:
    """Cost of a document's gradient within a partition of `rows`, the gradients found, and how many were timed.

    The sample stands for a partition, cut into batches of like length; batches spread evenly over the lengths
    are run until the time is over, the cost of those between them is interpolated. A batch that is run again
    counts with its median: other work on the machine disturbs single ones.
    """
    lengths = np.resize(sample.lengths, rows)
    groups = length_batches(lengths, engine.tokens_per_batch)
    engine.run(sample.take(groups[-1] % len(sample)))  # warm up
    order = list(dict.fromkeys([0, *spread(len(groups))]))  # the longest first: memory peaks there
    done: dict[int, list[Cost]] = {}
    found: list[PartitionGradients] = []
    timed, began = 0, time.perf_counter()
    for i in order * ROUNDS:
        documents = sample.take(groups[i] % len(sample))
        with Watch() as watch:
            gradients = engine.run(documents)
        if i not in done:
            timed += len(documents)
            found.append(gradients)
        done.setdefault(i, []).append(watch.cost)
        if time.perf_counter() - began > seconds:
            break
    at, each = sorted(done), np.arange(len(groups))
    wall, cpu = (
        float(np.interp(each, at, [np.median([getattr(cost, kind) for cost in done[i]]) for i in at]).sum())
        for kind in ("wall", "cpu")
    )
    return Cost(wall, cpu) * (1 / rows), _stacked(found), timed


def _stacked(parts: list[PartitionGradients]) -> PartitionGradients:
    """The gradients of several batches as those of one partition."""
    axis = {"features": 1, "scale": 1, "loss": 1, "norm": 1, "alignment": 1}
    names = ("features", "scale", "loss", "norm", "alignment", "label", "confidence", "tokens")
    joined = {name: np.concatenate([getattr(p, name) for p in parts], axis.get(name, 0)) for name in names}
    return replace(parts[0], **joined, problems={})


def _resized(gradients: PartitionGradients, rows: int, checkpoints: int) -> PartitionGradients:
    """The gradients repeated to so many rows and checkpoints."""
    at = np.resize(np.arange(len(gradients.label)), rows)
    values = {
        name: np.repeat(getattr(gradients, name)[:, at], checkpoints, axis=0)
        for name in ("features", "scale", "loss", "norm", "alignment")
    }
    values |= {name: getattr(gradients, name)[at] for name in ("label", "confidence", "tokens")}
    return replace(gradients, **values, problems={})


def _store(
    spec: RunSpec, plan: Plan, target: Target, found: PartitionGradients, scratch: RunDir
) -> tuple[Cost, float, float]:
    """Cost of writing a document's rows, seconds to stream one of them back, and to fetch one somewhere."""
    checkpoints = len(spec.gradients.fractions)
    rows = int(max(1, min(plan.partition_rows, plan.n_rows, WRITE_BYTES // (2 * target.dim * checkpoints))))
    shape = StoreShape(checkpoints, 2 * rows, target.dim, rows)
    about = {"fingerprint": "calibration", "fractions": spec.gradients.fractions}
    GradientStore.create(scratch, shape, np.ones(target.dim), about)
    store = GradientStore.open(scratch, writable=True)
    gradients = _resized(found, rows, checkpoints)
    store.write(0, gradients, "calibration", {})  # warm up
    with Watch() as write:
        store.write(1, gradients, "calibration", {})
    store.read(0, rows)
    with Watch() as read:
        store.read(rows, 2 * rows)
    somewhere = np.unique(np.linspace(0, 2 * rows - 1, FETCHED).astype(np.int64))
    with Watch() as fetch:
        store.take(somewhere)
    return write.cost * (1 / rows), read.cost.wall / rows, fetch.cost.wall / len(somewhere)


def _select(
    spec: RunSpec, documents: int, found: PartitionGradients, seconds: float
) -> tuple[float, float, float]:
    """Seconds: index a row, a pick whatever the rows, and a pick for each row.

    Two numbers of rows and two of picks, each through `engine.select`; rows beyond the sample's are mixtures of
    two gradients of it.
    """
    checkpoints, dim = len(spec.gradients.fractions), found.features.shape[2]
    most = int(min(documents, SELECT_ROWS, SELECT_BYTES // (2 * dim * checkpoints)))
    picks = min(spec.select.size, most)
    few, many = max(1, picks // 8, min(picks, 8)), min(picks, 64)
    greedy = spec.select.strategy.startswith("greedy")
    settings = spec.select.model_copy(
        update={
            "strategy": "greedy" if greedy else "topk",
            "verify": 0,
            "shards": 1,
            "dedupe": "none",
            "min_confidence": 0.0,
            "precondition": "none",
            "weights": "equal",
        }
    )

    began = time.perf_counter()

    def timed(rows: ArrayRows, size: int) -> float:
        """The least of three: whatever else the machine does only adds to it."""
        taken: list[float] = []
        while len(taken) < 3 and (not taken or time.perf_counter() - began < seconds):
            with Watch() as watch:
                select(rows, Columns(), settings.model_copy(update={"size": size}))
            taken.append(watch.cost.wall)
        return min(taken)

    few = min(few, max(1, many // 4))
    sizes = sorted({max(many, most // 8), most})
    measured = []
    for rows in sizes:
        stored = _mixed(found, rows, checkpoints)
        short = timed(stored, few)
        each = max(0.0, timed(stored, many) - short) / (many - few) if many > few else 0.0
        measured.append((rows, max(0.0, short - few * each), each))
    (rows, index, pick), (less, _, before) = measured[-1], measured[0]
    slope = max(0.0, pick - before) / (rows - less) if rows > less else 0.0
    return index / rows, max(0.0, pick - rows * slope), slope


def _mixed(found: PartitionGradients, rows: int, checkpoints: int) -> ArrayRows:
    """Rows that look like the run's: a gradient with up to half of another one mixed in."""
    rng = np.random.default_rng(0)
    usable = np.flatnonzero(found.scale[0] > 0)
    usable = usable if len(usable) else np.arange(len(found.label))
    features = np.empty((1, rows, found.features.shape[2]), np.float16)
    scale = found.scale[:, rng.choice(usable, rows)]
    for start in range(0, rows, 4096):
        part = slice(start, min(start + 4096, rows))
        one, two = (rng.choice(usable, part.stop - start) for _ in range(2))
        share = rng.uniform(0, 0.5, (part.stop - start, 1)).astype(np.float32)
        mixed = found.features[0, one] * (1 - share) + found.features[0, two] * share
        mixed /= np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-6)
        features[0, part] = mixed
    toward = found.features[0, usable].astype(np.float64).mean(0)
    toward += rng.normal(size=toward.shape) * np.linalg.norm(toward) / math.sqrt(len(toward))
    return ArrayRows(np.repeat(features, checkpoints, axis=0), toward, np.repeat(scale, checkpoints, axis=0))


def _train(
    spec: RunSpec,
    endpoints: Endpoints,
    encoder: Encoder,
    sample: Ragged,
    parameters: int,
    device: str,
    seconds: float,
) -> float | None:
    """Seconds that training takes a document and epoch, by one process; None when it would not fit a device."""
    settings = spec.retrain.model_copy(
        update={"epochs": 1, "early_stopping": False, "patience": None, "checkpoint_steps": 0}
    )
    dtype = torch_dtype(settings.dtype)
    if device == "auto" or (dtype == torch.float16 and device == "cpu"):
        return None
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    usable = np.flatnonzero(sample.lengths > 1)
    if TRAINED_BYTES * parameters > 0.5 * free or not len(usable):
        return None
    label = np.asarray(encoder.label_ids or [0], np.int32)
    examples = sample.with_labels(np.resize(label, len(sample)))
    size = min(settings.batch_size, len(usable))
    rng = np.random.default_rng(0)

    def timed(steps: int) -> float:
        trust = spec.models.trust_remote_code
        model = load_model(endpoints.base, dtype, device, trust)  # anew: training may add adapters to it
        chosen = examples.take(rng.choice(usable, steps * size))
        with Watch() as watch:
            train_plain(model, chosen, settings, 0, label_rows(encoder))
        return watch.cost.wall

    first = timed(1)
    steps = int(max(1, min(32, seconds / max(first, 1e-3))))
    return timed(steps) / (steps * size)
