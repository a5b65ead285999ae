"""What bfloat16 costs or saves on this machine's CPU: ``python benchmarks/precision.py``.

python benchmarks/precision.py [--quick] [--threads N] [--json OUT]

layer     forward, and backward, of a linear layer from 576 to 1,536 numbers (SmolLM2-135M's) over 512 tokens.
          The types take turns; best of 7.
training  a step of `train_plain` on SmolLM2-135M, the 20 lower of 30 blocks frozen and kept, 16 documents of 40 tokens.

`native` says whether `engine.precision` takes bfloat16 for `auto` here.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from engine.experiment.base import changed_base
from engine.experiment.grid import Base
from engine.models import load_model
from engine.plain_stepper import train_plain
from engine.precision import multiplies_bfloat16
from engine.ragged import IGNORE, Ragged
from engine.spec import Retrain
from jobs.demo import gguf

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INNER, OUTER, TOKENS = 576, 1536, 512
ROWS, LENGTH = 16, 40


def layer(repeats: int) -> dict[str, Any]:
    """Milliseconds of either pass in either type."""
    best = {passes: dict.fromkeys(TYPES, float("inf")) for passes in ("forward", "backward")}
    for _ in range(repeats):
        for name, dtype in TYPES.items():
            linear = torch.nn.Linear(INNER, OUTER, dtype=dtype)
            states = torch.randn(TOKENS, INNER, dtype=dtype, requires_grad=True)
            began = time.perf_counter()
            loss = linear(states).sum()
            between = time.perf_counter()
            loss.backward()
            best["forward"][name] = min(best["forward"][name], 1e3 * (between - began))
            best["backward"][name] = min(best["backward"][name], 1e3 * (time.perf_counter() - between))
    return {passes: _said(f"layer, {passes}", found, "ms") for passes, found in best.items()}


def training(repeats: int) -> dict[str, Any]:
    """Seconds of a training step in either type."""
    random = np.random.default_rng(0)
    tokens = random.integers(1000, 40_000, ROWS * LENGTH).astype(np.int32)
    labels = [100, 200, 300, 400]
    targets = np.full(len(tokens), IGNORE, np.int32)
    targets[LENGTH - 1 :: LENGTH] = random.choice(labels, ROWS)
    examples = Ragged(tokens, targets, np.arange(0, len(tokens) + 1, LENGTH))
    best = dict.fromkeys(TYPES, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        base = changed_base(Base(dtype="bfloat16", untie=True), gguf(), os.path.join(folder, "base"))
        for _ in range(repeats):
            for name, dtype in TYPES.items():
                recipe = Retrain(epochs=1, freeze_below=20, cache_frozen=True, threads=1, dtype=name)
                result = train_plain(load_model(base, dtype), examples, recipe, 0, labels)
                best[name] = min(best[name], result["seconds"])
    return _said("training step", best, "s")


def _said(what: str, best: dict[str, float], unit: str) -> dict[str, Any]:
    ratio = best["bfloat16"] / best["float32"]
    figures = ", ".join(f"{name} {value:.2f} {unit}" for name, value in best.items())
    print(f"{what:16} {figures}: ratio {ratio:.2f}", flush=True)
    return {**best, "ratio": ratio}


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under 3 minutes on 2 cores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"native bfloat16: {multiplies_bfloat16()}; {torch.backends.cpu.get_cpu_capability()}")
    figures = {
        "threads": options.threads,
        "native": multiplies_bfloat16(),
        "layer": layer(3 if options.quick else 7),
        "training": training(1 if options.quick else 3),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
