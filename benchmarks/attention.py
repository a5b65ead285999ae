"""Attention kernels in training on a CPU: ``python benchmarks/attention.py``.

python benchmarks/attention.py [--quick] [--threads N] [--json OUT]

kernels   torch's fused kernel against plain matrix products, forward and backward of 1,024 tokens in rows of
          16 to 1,024, 9 heads of 64 (SmolLM2-135M's), in bfloat16 and float32. They take turns; best of 7.
training  steps of `train_plain` on SmolLM2-135M, the 20 lower of 30 blocks frozen and kept, 16 documents of
          40 tokens a step, with `engine.attention.SHORT` as it is and at 0, in turns, best of 3.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import engine.attention
from engine.experiment.base import changed_base
from engine.experiment.grid import Base
from engine.models import load_model
from engine.plain_stepper import train_plain
from engine.ragged import IGNORE, Ragged
from engine.spec import Retrain
from jobs.demo import gguf

KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
HEADS, WIDTH, TOKENS = 9, 64, 1024
LENGTHS = (16, 40, 64, 128, 256, 512, 1024)
ROWS, LENGTH = 16, 40


def milliseconds(kernel: SDPBackend, rows: list[torch.Tensor]) -> float:
    """Of one forward and backward pass over queries, keys and values."""
    with sdpa_kernel(kernel):
        began = time.perf_counter()
        scaled_dot_product_attention(*rows, is_causal=True).sum().backward()
        return 1e3 * (time.perf_counter() - began)


def kernels(repeats: int) -> list[dict[str, Any]]:
    """Both kernels at every length and type."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            shape = (TOKENS // length, HEADS, length, WIDTH)
            rows = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            best = dict.fromkeys(KERNELS, float("inf"))
            for _ in range(repeats):
                for name, kernel in KERNELS.items():
                    best[name] = min(best[name], milliseconds(kernel, rows))
            ratio = best["fused"] / best["plain"]
            found.append({"dtype": str(dtype), "tokens": length, **best, "ratio": ratio})
            print(f"{dtype!s:15} {length:5} tokens  " + _line(best, "ms", ratio), flush=True)
    return found


def training(steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a training step with either kernel."""
    random = np.random.default_rng(0)
    documents = ROWS * steps
    tokens = random.integers(1000, 40_000, documents * LENGTH).astype(np.int32)
    targets = np.full(len(tokens), IGNORE, np.int32)
    labels = [100, 200, 300, 400]
    targets[LENGTH - 1 :: LENGTH] = random.choice(labels, documents)
    examples = Ragged(tokens, targets, np.arange(0, len(tokens) + 1, LENGTH))
    recipe = Retrain(epochs=1, freeze_below=20, cache_frozen=True, threads=1)
    best = dict.fromkeys(KERNELS, float("inf"))
    short = engine.attention.SHORT
    with tempfile.TemporaryDirectory() as folder:
        base = changed_base(Base(dtype="bfloat16", untie=True), gguf(), os.path.join(folder, "base"))
        for _ in range(repeats):
            for name, limit in (("fused", 0), ("plain", short)):
                engine.attention.SHORT = limit
                model = load_model(base, torch.bfloat16)
                result = train_plain(model, examples, recipe, 0, labels)
                best[name] = min(best[name], result["seconds"] / steps)
    ratio = best["fused"] / best["plain"]
    print("training step                " + _line(best, "s", ratio), flush=True)
    return {**best, "ratio": ratio}


def _line(best: dict[str, float], unit: str, ratio: float) -> str:
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in best.items()) + f": ratio {ratio:.2f}"


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
    figures = {
        "threads": options.threads,
        "kernels": kernels(3 if options.quick else 7),
        "training": training(4 if options.quick else 8, 2 if options.quick else 3),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
