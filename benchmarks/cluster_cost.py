"""What a run would cost on named machines, by the arithmetic of `unbake plan` from speeds that are supposed.

    python benchmarks/cluster_cost.py [--tokens 512] [--utilisation 0.4] [--price g6.xlarge=0.81 ...]

Nothing is measured here. The documents a second of one GPU are taken for

    peak x utilisation / (2 x parameters x tokens)         a forward pass, one checkpoint: last-layer gradients

with the peak of bfloat16 without sparsity that the maker states, and given to the estimate that
`unbake plan --documents N --docs-per-second X` prints. Put in the speed that `unbake plan` measures on your GPU, and
your prices.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from engine.estimate import FORWARDS_PER_TRAINED, Machine, ModelSize, estimate, human, store_bytes
from engine.spec import RunSpec
from engine.store import StoreShape


@dataclass(frozen=True)
class Instance:
    """A machine: its GPUs, their peak in FLOP a second, and an example of a price an hour in dollars."""

    name: str
    gpu: str
    gpus: int
    peak: float
    price: float


EXTRACT = (
    Instance("g6.xlarge", "L4", 1, 121e12, 0.805),
    Instance("g2-standard-4", "L4", 1, 121e12, 0.707),
    Instance("p4d.24xlarge", "A100 40 GB", 8, 312e12, 21.96),
)
RETRAIN = (
    Instance("p4d.24xlarge", "A100 40 GB", 8, 312e12, 21.96),
    Instance("a2-ultragpu-1g", "A100 80 GB", 1, 312e12, 5.069),
)
SIZES = {"1B": 1e9, "8B": 8e9}
DOCUMENTS = (1_000_000, 10_000_000, 100_000_000)
NODES = 32
DIM = 4096


def speed(instance: Instance, parameters: float, tokens: int, utilisation: float) -> float:
    """Documents a second of one GPU, supposed."""
    return instance.peak * utilisation / (2 * parameters * tokens)


def extraction(spec: RunSpec, instance: Instance, documents: int, rate: float) -> tuple[float, float]:
    """Hours on NODES machines, and GPU hours, as `unbake plan` gives them."""
    actors = NODES * instance.gpus
    machine = Machine(4.0 * actors, actors, True, 4 * actors, 0.0, 0.0, 1 << 40, 1 << 40, None)
    shape = StoreShape(1, documents, DIM, spec.corpus.partition_rows_of(documents))
    result = estimate(spec, shape, ModelSize(1, 1, 1, 1), machine, None, rate)
    stage = result.stages[0]
    assert stage.hours is not None
    assert stage.device_hours is not None
    return stage.hours, stage.device_hours


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="of a document, on average")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPU's peak")
    parser.add_argument("--price", action="append", default=[], metavar="INSTANCE=DOLLARS", help="an hour")
    options = parser.parse_args()
    prices = {name: float(value) for name, value in (one.split("=") for one in options.price)}
    spec = RunSpec.from_dict(
        {"models": {"base": "b", "finetuned": "f"}, "corpus": {"paths": ["c"]}, "task": {"kind": "language_modelling"},
         "select": {"size": 5000}, "retrain": {"epochs": 4}}
    )  # fmt: skip
    print(
        "| model | instance | documents/s of a GPU (supposed) | 1,000,000 documents | 10,000,000 | 100,000,000 |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for size, parameters in SIZES.items():
        for one in EXTRACT:
            rate = speed(one, parameters, options.tokens, options.utilisation)
            cells = [size, f"{one.name} ({one.gpus} x {one.gpu})", f"{rate:.1f}"]
            for documents in DOCUMENTS:
                hours, gpu_hours = extraction(spec, one, documents, rate)
                cost = gpu_hours / one.gpus * prices.get(one.name, one.price)
                cells.append(f"{gpu_hours:,.1f} GPU h, {hours:,.2f} h on {NODES}, ${cost:,.0f}")
            print(f"| {' | '.join(cells)} |")
    sizes = (
        store_bytes(StoreShape(1, documents, DIM, spec.corpus.partition_rows_of(documents)))
        for documents in DOCUMENTS
    )
    print(f"| either | store, d = {DIM} | | {' | '.join(human(size) for size in sizes)} |")
    trained = len(spec.strategies) * spec.select.size * spec.retrain.epochs
    print(f"\nRetraining: {trained:,} documents are trained on, whatever the corpus.\n")
    print("| model | instance | GPU hours | $ |")
    print("| --- | --- | ---: | ---: |")
    for size, parameters in SIZES.items():
        for one in RETRAIN:
            rate = speed(one, parameters, options.tokens, options.utilisation) / FORWARDS_PER_TRAINED
            gpu_hours = trained / rate / 3600
            cost = gpu_hours / one.gpus * prices.get(one.name, one.price)
            print(f"| {size} | {one.name} ({one.gpus} x {one.gpu}) | {gpu_hours:,.1f} | {cost:,.0f} |")


if __name__ == "__main__":
    main()
