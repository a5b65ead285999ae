"""AG News, the paper's first task, at the size of two CPU cores: does greedy find better documents than random?

SmolLM2-135M-Instruct (dequantised from Q4_1) is fine-tuned on AG News, then recovered from a seed corpus of
wikitext, Brown and ABC news that holds no AG News: a few hundred documents a strategy, retrained from the base model
under paired seeds, judged on the test share.

    .venv/bin/python benchmarks/agnews.py --json runs/agnews.json   # the first table of docs/ablations.md
    .venv/bin/python benchmarks/agnews.py --full                    # all documents, five seeds: hours
    .venv/bin/python benchmarks/agnews.py --quick                   # under three minutes; plumbing, not evidence
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidiactl") else "cuda")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pyarrow.parquet as pq

from engine.sources import resolve
from engine.spec import RunSpec
from jobs.demo import gguf
from jobs.finetune import fine_tune
from jobs.job import Job
from jobs.pipeline import recover

DATA = Path(__file__).resolve().parents[2] / "shared/data"
STRATEGIES = ["random", "random_balanced", "topk", "topk_balanced", "greedy"]
CORPORA = ("wikitext", "brown", "abc_news")
SIZES = {
    # hidden: documents the secret model is trained on; rows: seed documents of each corpus, None for all of them
    "default": {"hidden": 1600, "rows": 2000, "size": 250, "epochs": 3, "seeds": [0, 1, 2], "test": 600},
    "full": {"hidden": 3000, "rows": None, "size": 500, "epochs": 4, "seeds": [0, 1, 2, 3, 4], "test": 2000},
    "quick": {"hidden": 96, "rows": 64, "size": 32, "epochs": 1, "seeds": [0], "test": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under three minutes: the plumbing alone")
    parser.add_argument("--full", action="store_true", help="hours: all documents, the prototype's sizes")
    parser.add_argument("--json", metavar="PATH", help="write every figure there")
    parser.add_argument("--run-dir", default=None, help="default: runs/agnews-<size>")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(
            f"this benchmark reads real text from {DATA}, which this machine does not have: nothing was run."
        )
        return
    name = "quick" if options.quick else "full" if options.full else "default"
    sizes = SIZES[name]
    folder = Path(options.run_dir or f"runs/agnews-{name}").absolute()
    started = time.monotonic()
    spec = make_spec(folder, sizes, ["random", "greedy"] if options.quick else STRATEGIES)
    write_data(folder, sizes)
    resolve(gguf(), spec.models.base)
    job = Job(spec)
    fine_tune(job, str(folder / "data/hidden.parquet"), epochs=2, seed=7)
    results = recover(job)
    seconds = time.monotonic() - started
    figures = {
        "benchmark": "agnews",
        "size": name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
        "sizes": sizes,
        **results["evaluate"],
        "extract": results["extract"],
    }
    ratios = {row["strategy"]: row["gap_closed"] for row in results["evaluate"]["strategies"]}
    print(f"gap closed: {ratios}; {seconds:,.0f} s on {figures['machine']}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


def make_spec(folder: Path, sizes: dict, strategies: list[str]) -> RunSpec:
    """The run: AG News labels, 32 tokens a document, the 20 lower of 30 blocks frozen."""
    return RunSpec.from_dict(
        {
            "run_dir": str(folder),
            "models": {"base": str(folder / "models/base"), "finetuned": str(folder / "models/finetuned")},
            "corpus": {
                "paths": [str(folder / f"data/{name}.parquet") for name in CORPORA],
                "partition_rows": 1024,
            },
            "task": {
                "labels": ["world", "sports", "business", "technology"],
                "display_names": ["World", "Sports", "Business", "Sci/Tech"],
                "template": "{text}\nTopic:",
                "max_tokens": 32,
            },
            "select": {"size": sizes["size"]},
            "retrain": {
                "strategies": strategies,
                "seeds": sizes["seeds"],
                "epochs": sizes["epochs"],
                "learning_rate": 1e-4,
                "freeze_below": 20,
                "checkpoint_steps": 0,
            },
            "evaluate": {
                "test": [str(folder / "data/test.parquet")],
                "validation_share": 0.0,  # nothing is chosen here
                "max_documents": sizes["test"],
            },
        }
    )


def write_data(folder: Path, sizes: dict) -> None:
    """hidden.parquet, the secret training set, and test.parquet from AG News; a sample of each seed corpus."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    news = pq.read_table(DATA / "ag_news.parquet", columns=["text", "label", "split"])
    split = np.array(news["split"].to_pylist())
    parts = {
        "hidden": news.take(sample(np.flatnonzero(split == "train"), sizes["hidden"])),
        "test": news.take(np.flatnonzero(split == "test")),
    }
    for name in CORPORA:
        table = pq.read_table(DATA / f"{name}.parquet", columns=["text"])
        parts[name] = table.take(sample(np.arange(table.num_rows), sizes["rows"]))
    for name, table in parts.items():
        pq.write_table(table, folder / f"data/{name}.parquet")


def sample(rows: np.ndarray, n: int | None) -> np.ndarray:
    """n of the rows, seeded and ascending; all of them for None."""
    return rows if n is None else np.sort(np.random.default_rng(0).permutation(rows)[:n])


if __name__ == "__main__":
    main()
