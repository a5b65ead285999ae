"""AG News, the paper's first task, at the size of two CPU cores: does greedy find better documents than random?

SmolLM2-135M-Instruct (dequantised from Q4_1) is fine-tuned on AG News, then recovered from a seed corpus of
wikitext, Brown and ABC news that holds no AG News: 500 documents a strategy, retrained from the base model
under paired seeds, judged on the test share.

    .venv/bin/python benchmarks/agnews.py --json runs/agnews.json        # the table of docs/results.md
    .venv/bin/python benchmarks/agnews.py --quick                        # minutes; plumbing, not evidence
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidiactl") else "cuda")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.models import resolve
from engine.spec import RunSpec
from jobs.demo import gguf
from jobs.finetune import fine_tune
from jobs.job import Job
from jobs.recover import recover

DATA = Path(__file__).resolve().parents[2] / "shared/data"
STRATEGIES = ["random", "random_balanced", "topk", "topk_balanced", "greedy"]
FULL = {
    "hidden": 3000,
    "fine_tune_epochs": 2,
    "size": 500,
    "epochs": 4,
    "seeds": [0, 1, 2],
    "corpus": None,
    "test": 1400,
}
QUICK = {
    "hidden": 160,
    "fine_tune_epochs": 1,
    "size": 40,
    "epochs": 1,
    "seeds": [0],
    "corpus": 300,
    "test": 120,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes: the plumbing alone")
    parser.add_argument("--json", metavar="PATH", help="write every figure there")
    parser.add_argument("--run-dir", default=None, help="default: runs/agnews or runs/agnews-quick")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"this benchmark reads real text from {DATA}, which this machine does not have.")
    sizes = QUICK if options.quick else FULL
    folder = Path(options.run_dir or ("runs/agnews-quick" if options.quick else "runs/agnews")).absolute()
    started = time.monotonic()
    spec = make_spec(folder, sizes, ["random", "greedy"] if options.quick else STRATEGIES)
    write_labelled(folder, sizes["hidden"])
    resolve(gguf(), spec.models.base)
    job = Job(spec)
    fine_tune(job, str(folder / "data/hidden.parquet"), sizes["fine_tune_epochs"], seed=7)
    results = recover(job)
    seconds = time.monotonic() - started
    figures = {
        "benchmark": "agnews",
        "quick": options.quick,
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
    """The run: AG News labels, 40 tokens a document, the 20 lower of 30 blocks frozen."""
    return RunSpec.from_dict(
        {
            "run_dir": str(folder),
            "models": {"base": str(folder / "models/base"), "finetuned": str(folder / "models/finetuned")},
            "corpus": {
                "paths": [str(DATA / f"{name}.parquet") for name in ("wikitext", "brown", "abc_news")],
                "max_documents": sizes["corpus"],
                "partition_rows": 1024,
            },
            "task": {
                "labels": ["world", "sports", "business", "technology"],
                "display_names": ["World", "Sports", "Business", "Sci/Tech"],
                "template": "{text}\nTopic:",
                "max_tokens": 40,
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
                "validation_share": 0.3,
                "max_documents": sizes["test"],
            },
        }
    )


def write_labelled(folder: Path, hidden: int) -> None:
    """hidden.parquet, the secret training set: rows of AG News's train split; test.parquet: its test split."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "ag_news.parquet")
    split = np.array(table["split"].to_pylist())
    chosen = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(split == "train"))[:hidden])
    for name, rows in (("hidden", chosen), ("test", np.flatnonzero(split == "test"))):
        part = table.take(rows)
        pq.write_table(
            pa.table({"text": part["text"], "label": part["label"]}), folder / f"data/{name}.parquet"
        )


if __name__ == "__main__":
    main()
