"""Estimate: what a run will take, by arithmetic from its counts, the machine, and what a calibration measured.

Every figure is a count times a measured cost, or the size of an array or a weight; docs/scaling.md has the
formulas in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.calibrate import RUN_ROWS, Calibration, Cost
from engine.select.index import ROW_BYTES
from engine.spec import RunSpec
from engine.store import PER_CHECKPOINT, PER_DOCUMENT, StoreShape

ENCODED_BYTES = 8
"""Bytes of an encoded token on its way to a gradient actor: its id and its target."""

FORWARDS_PER_TRAINED = 3
"""Forward passes that a training pass costs where it was not measured: backward is two (one more recomputes)."""

FETCHED_PER_PICK = 7
"""Rows of the store read for each pick: its own twice (search and path), and one in five random sets."""

PIPELINE_START = 6.0
"""Seconds that Ray Data needs to start and end its pools beyond a worker's own start (docs/scaling.md)."""

DISK_SHARE = MEMORY_SHARE = 0.9
"""Shares of what is free that may be filled without a warning."""


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    cpus: of all workers together. workers: gradient actors at a time; gpu: whether each has one. encoders:
    encode actors. session: seconds that Ray takes to start; start: a worker, libraries included. memory,
    device_memory: bytes free on a node, and on a GPU (0 without); disk: bytes free where the run is, None where
    nobody knows (object stores).
    """

    cpus: float
    workers: int
    gpu: bool
    encoders: int
    session: float
    start: float
    memory: int
    device_memory: int
    disk: int | None


@dataclass(frozen=True)
class ModelSize:
    """parameters, and how many of them are trained; shape of the body, for activations; rows of the head."""

    parameters: int
    trained: int
    hidden: int
    depth: int
    vocab: int = 0


@dataclass(frozen=True)
class Stage:
    """hours on the clock, and of all devices (GPUs, or CPU cores) together; None where nothing was measured."""

    name: str
    work: str
    hours: float | None
    device_hours: float | None


@dataclass
class Estimate:
    """What a run takes, and what that was worked out from.

    documents, partitions, tokens, forward_passes: counts; tokens_error: a standard error. device: what device
    hours count. disk, memory: bytes by what they are for. zero: bytes of a training worker by ZeRO stage, or of
    the only one.
    """

    documents: int
    partitions: int
    tokens: float
    tokens_error: float
    forward_passes: int
    device: str
    stages: list[Stage]
    disk: dict[str, int]
    memory: dict[str, int]
    zero: dict[str, dict[str, int]]
    machine: Machine
    calibration: Calibration | None
    warnings: list[str] = field(default_factory=list)


def passes(fractions: list[float]) -> int:
    """Forward passes of a document: one a checkpoint, and one to label where theta_f is none of them."""
    return len(fractions) + (1.0 not in fractions)


def store_bytes(shape: StoreShape) -> int:
    """Bytes of gradients.zarr: float16 features, 4 bytes of checksum and 16 of index a chunk, the columns."""
    p, n = shape.checkpoints, shape.docs
    chunks = shape.partitions * (shape.partition_rows // shape.chunk_rows)
    rows = p * (2 * shape.dim + 4 * len(PER_CHECKPOINT))
    columns = sum({"int32": 4, "float32": 4, "uint8": 1}[dtype] for dtype in PER_DOCUMENT.values())
    return n * (rows + columns) + 20 * p * chunks


def index_bytes(shape: StoreShape, budget_mb: int) -> int:
    """Bytes of the subspace index of greedy selection, all shards: (33 + 2 r) a row and checkpoint.

    Five of the 33 are taken once a row: with P checkpoints it is 5 (P - 1) a row too many.

    r = d/8 + 64 directions (at least 96), fewer where `select.index_memory_mb` ends, never fewer than 8.
    """
    rows = shape.checkpoints * shape.docs
    most = ((budget_mb << 20) // rows - ROW_BYTES) // 2
    directions = min(shape.dim, max(8, min(most, max(32, shape.dim // 8) + 64)))
    return rows * (ROW_BYTES + 2 * directions)


def extraction_seconds(spec: RunSpec, documents: int, c: Calibration, machine: Machine) -> float:
    """Seconds of extraction: whichever binds, the gradient actors, the encoders, or the CPUs they share."""
    rows = spec.corpus.partition_rows_of(documents)
    actor = partition_cost(spec, rows, c)
    encoder = (c.encode + c.text) * rows
    cpu = actor.cpu + encoder.cpu
    partitions = documents / rows
    binding = max(actor.wall / machine.workers, encoder.wall / machine.encoders, cpu / machine.cpus)
    together = max(1.0, (machine.workers + machine.encoders) / machine.cpus)  # they load their libraries
    return machine.session + PIPELINE_START + machine.start * together + c.load + partitions * binding


def partition_cost(spec: RunSpec, rows: int, c: Calibration) -> Cost:
    """What a gradient actor spends on one partition of so many documents: every checkpoint, and writing."""
    fractions = spec.gradients.fractions
    moves = 0 if fractions == [1.0] else passes(fractions)
    return c.gradient * (rows * passes(fractions)) + c.interpolate * moves + c.write * rows


def selection_seconds(spec: RunSpec, documents: int, c: Calibration) -> float:
    """Seconds to index (one pass over the store), pick, and read the texts.

    Shards share the rows, not a pick's fixed part.
    """
    shards = spec.select.shards
    index = documents * (c.index + c.read) / shards
    picks = spec.select.size * (c.pick + c.pick_row * documents / shards + FETCHED_PER_PICK * c.fetch)
    return index + picks + min(spec.select.size, documents / RUN_ROWS) * c.seek


def training_seconds(spec: RunSpec, c: Calibration) -> float:
    """Seconds of training every compared strategy and seed, one after the other."""
    return trained_documents(spec) * training_cost(spec, c) / spec.retrain.workers


def training_cost(spec: RunSpec, c: Calibration) -> float:
    """Seconds of one worker a document and epoch: measured, or by the law of FORWARDS_PER_TRAINED."""
    if c.train is not None:
        return c.train
    return c.gradient.wall * (FORWARDS_PER_TRAINED + spec.retrain.activation_checkpointing)


def trained_documents(spec: RunSpec) -> int:
    """Documents times epochs, over all trainings."""
    return spec.select.size * spec.retrain.epochs * models(spec)


def models(spec: RunSpec) -> int:
    """Models that are retrained."""
    return len(spec.strategies) * len(spec.retrain.seeds)


def training_bytes(spec: RunSpec, size: ModelSize, stage: int, workers: int) -> dict[str, int]:
    """Bytes of a training worker under a ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 3).

    16-bit weights and gradients 2 bytes each, float32 ones 4; the optimizer keeps a float32 master copy (of
    16-bit weights) and its moments: two for Adam, one for SGD with momentum. Stage 1 divides the optimizer's
    part by the workers, stage 2 the gradients too, stage 3 the weights too.
    """
    wide = spec.retrain.dtype == "float32"
    width = 4 if wide else 2
    moments = 2 if spec.retrain.optimizer != "sgd" else int(spec.retrain.momentum > 0)
    return {
        "weights": width * size.parameters // (workers if stage >= 3 else 1),
        "gradients": width * size.trained // (workers if stage >= 2 else 1),
        "optimizer": 4 * (moments + (not wide)) * size.trained // (workers if stage >= 1 else 1),
    }


def worker_bytes(spec: RunSpec, size: ModelSize) -> dict[str, dict[str, int]]:
    """Bytes of a training worker under each stage that the spec could ask for; of plain torch if that trains.

    Plain torch turns each 16-bit gradient into a float32 one as soon as it is there.
    """
    retrain = spec.retrain
    if retrain.needs_deepspeed:
        return {f"ZeRO {stage}": training_bytes(spec, size, stage, retrain.workers) for stage in (0, 1, 2, 3)}
    return {"plain torch": {**training_bytes(spec, size, 0, 1), "gradients": 4 * size.trained}}


def held_bytes(spec: RunSpec, size: ModelSize) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer that a training worker holds: on its device, in main memory."""
    retrain = spec.retrain
    by_stage = worker_bytes(spec, size)
    parts = by_stage.get("plain torch") or by_stage[f"ZeRO {retrain.zero_stage}"]
    away = parts["optimizer"] * retrain.offload_optimizer + parts["weights"] * retrain.offload_parameters
    return sum(parts.values()) - away, away


def checkpoint_bytes(spec: RunSpec, size: ModelSize) -> int:
    """Bytes of a training's checkpoint: what trains in float32, its moments; under ZeRO 1 and 2 in 16 bits too."""
    retrain = spec.retrain
    wide = retrain.dtype == "float32"
    masters_and_moments = training_bytes(spec, size, 0, 1)["optimizer"] + 4 * wide * size.trained
    copies = retrain.needs_deepspeed and not wide and retrain.zero_stage < 3
    return masters_and_moments + 2 * copies * size.trained


def logit_bytes(spec: RunSpec, size: ModelSize, tokens: float) -> int:
    """Bytes of the head's float32 logits in a forward pass and of their gradient: only loss tokens have any.

    With responses how many of the tokens those are is not known before; all are counted.
    """
    rows = documents_per_pass(spec) * (1 if spec.loss_scope == "last_token" else tokens)
    return int(2 * 4 * size.vocab * rows)


def documents_per_pass(spec: RunSpec) -> int:
    """Documents in one forward pass of a training worker."""
    share = -(-spec.retrain.batch_size // spec.retrain.workers)
    return min(share, spec.retrain.micro_batch_size or share)


def activation_bytes(spec: RunSpec, size: ModelSize, tokens: float) -> int:
    """An estimate of a training worker's activations: 34 numbers' bytes a token, hidden unit and block.

    Korthikanti et al. (arXiv 2205.05198), section 4, for 16 bits, attention matrices not kept; recomputing
    keeps 2 of the 34.
    """
    documents = documents_per_pass(spec)
    kept = (2 if spec.retrain.activation_checkpointing else 34) * (
        2 if spec.retrain.dtype == "float32" else 1
    )
    return int(documents * tokens * size.hidden * size.depth * kept)


def estimate(
    spec: RunSpec,
    shape: StoreShape,
    size: ModelSize,
    machine: Machine,
    calibration: Calibration | None,
    rate: float | None = None,
) -> Estimate:
    """All of it.

    Args:
        shape: of the store, with as many documents as are asked about.
        calibration: None: nothing but counts and bytes, and extraction at `rate`.
        rate: documents a second of one gradient actor, in place of the calibration's.
    """
    documents, c = shape.docs, calibration
    result = Estimate(
        documents=documents,
        partitions=shape.partitions,
        tokens=documents * c.tokens if c else 0.0,
        tokens_error=documents * c.tokens_error if c else 0.0,
        forward_passes=documents * passes(spec.gradients.fractions),
        device="GPU" if machine.gpu else "CPU core",
        stages=_stages(spec, documents, machine, c, rate),
        disk=_disk(spec, shape, size),
        memory=_memory(spec, shape, size, machine, c),
        zero=worker_bytes(spec, size),
        machine=machine,
        calibration=c,
    )
    result.warnings = _warnings(spec, shape, machine, result)
    return result


def _stages(
    spec: RunSpec, documents: int, machine: Machine, c: Calibration | None, rate: float | None
) -> list[Stage]:
    extract = select = retrain = None
    if c is not None:
        extract = extraction_seconds(spec, documents, c, machine) / 3600
        select = selection_seconds(spec, documents, c) / 3600
        retrain = (machine.session + machine.start + training_seconds(spec, c)) / 3600
    if rate is not None:
        extract = documents / (rate * machine.workers) / 3600
    devices = machine.workers if machine.gpu else machine.cpus
    trained = spec.retrain.workers if machine.gpu else machine.cpus
    return [
        Stage(
            "extract",
            f"{documents:,} documents x {passes(spec.gradients.fractions)} forward passes",
            extract,
            None if extract is None else extract * devices,
        ),
        Stage("index and select", f"{spec.select.size:,} picks by {spec.select.strategy}", select, select),
        Stage(
            "retrain",
            f"{models(spec)} models x {spec.select.size:,} documents x {spec.retrain.epochs} epochs",
            retrain,
            None if retrain is None else retrain * trained,
        ),
    ]


def _disk(spec: RunSpec, shape: StoreShape, size: ModelSize) -> dict[str, int]:
    width = 4 if spec.retrain.dtype == "float32" else 2
    kept = 0 if spec.retrain.checkpoint_steps == 0 else spec.retrain.keep_checkpoints + 1
    return {
        "gradients.zarr": store_bytes(shape),
        "retrained models": models(spec) * width * size.parameters,
        "training checkpoints": kept * checkpoint_bytes(spec, size),
    }


def _memory(
    spec: RunSpec, shape: StoreShape, size: ModelSize, machine: Machine, c: Calibration | None
) -> dict[str, int]:
    on_device, away = held_bytes(spec, size)
    result = {
        "index": index_bytes(shape, spec.select.index_memory_mb) if "greedy" in spec.select.strategy else 0,
        "training worker, weights to optimizer": on_device,
        "offloaded by a training worker": away,
    }
    if c is not None:
        result |= {
            "gradient actor": c.worker_bytes,
            "gradient actor, on the GPU": c.device_bytes,
            "encode actor": c.encoder_bytes,
            "encoded partition, in the object store": int(shape.partition_rows * c.tokens * ENCODED_BYTES),
            "training worker, activations (estimate)": activation_bytes(spec, size, c.tokens),
            "training worker, logits (estimate)": logit_bytes(spec, size, c.tokens),
        }
    return {name: value for name, value in result.items() if value}


def _warnings(spec: RunSpec, shape: StoreShape, machine: Machine, result: Estimate) -> list[str]:
    found = []
    disk, memory = sum(result.disk.values()), result.memory
    if machine.disk is not None and disk > DISK_SHARE * machine.disk:
        found.append(
            f"the run needs {human(disk)} of disk and {human(machine.disk)} are free: use another run_dir, a "
            "smaller gradients.dim or fewer checkpoints."
        )
    if memory.get("index", 0) > spec.select.index_memory_mb << 20:
        found.append(
            f"the index needs {human(memory['index'])} at least, more than select.index_memory_mb "
            f"({spec.select.index_memory_mb}): give it as much, over more select.shards."
        )
    if memory.get("index", 0) / spec.select.shards > MEMORY_SHARE * machine.memory:
        found.append(
            f"the index of a shard needs {human(memory['index'] // spec.select.shards)} and a node has "
            f"{human(machine.memory)} free: use more select.shards or less select.index_memory_mb."
        )
    actors = memory.get("gradient actor", 0) * (1 if machine.gpu else machine.workers)
    if actors + memory.get("encode actor", 0) > MEMORY_SHARE * machine.memory:
        found.append(
            f"gradient actors need {human(actors)} and {human(machine.memory)} are free: lower "
            "extract.workers_max or gradients.tokens_per_batch."
        )
    training = sum(value for name, value in memory.items() if name.startswith("training worker"))
    free = machine.device_memory if machine.gpu else machine.memory
    if not machine.gpu:
        training = (training + memory.get("offloaded by a training worker", 0)) * spec.retrain.workers
    if training > MEMORY_SHARE * free:
        found.append(
            f"training needs about {human(training)} and {human(free)} are free: use a higher "
            "retrain.zero_stage with more retrain.workers, offload_optimizer, or activation_checkpointing."
        )
    encoded = memory.get("encoded partition, in the object store", 0)
    if encoded > 0.25 * (spec.ray.object_store_mb << 20) and spec.ray.address is None:
        found.append(
            f"an encoded partition takes {human(encoded)} of ray.object_store_mb ({spec.ray.object_store_mb}): "
            "raise it, or lower corpus.partition_rows."
        )
    return found


def human(size: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:,.1f} {unit}"
