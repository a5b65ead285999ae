"""Memory: planning and reading take as much for a corpus ten times as large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PEAK = """
import sys
import numpy as np
from engine.corpus import make_plan, read_partition, read_rows
from engine.rundir import RunDir
from engine.spec import Corpus

def peak():
    # getrusage would do, were a child's figure not begun at its parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

corpus = Corpus(paths=[sys.argv[1]])
start = peak()
plan = make_plan(corpus, RunDir(sys.argv[2]))
for p in range(0, plan.n_partitions, 5):
    read_partition(plan, p, corpus)
read_rows(plan, np.linspace(0, plan.n_rows - 1, 1000).astype(np.int64), corpus)
print(plan.n_rows, peak() - start)
"""


def grown(path: Path, run: Path) -> tuple[int, float]:
    """(documents, MiB that the process grew by) of planning and reading in a fresh process."""
    env = {
        **os.environ,
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(run)], env=env, capture_output=True, text=True, check=True
    )
    rows, growth = out.stdout.split()
    return int(rows), float(growth)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_is_flat_in_the_corpus_size(tmp_path: Path, kind: str) -> None:
    growth = {}
    for n in (20_000, 200_000):
        path = tmp_path / f"{n}.{kind}"
        texts = (f"{i} " + os.urandom(350).hex() for i in range(n))
        if kind == "jsonl":
            with path.open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        else:  # one row group, as careless writers leave it
            pq.write_table(pa.table({"text": list(texts)}), path, row_group_size=n)
        rows, growth[n] = grown(path, tmp_path / f"run{n}")
        assert rows == n
    print(kind, growth)
    # 126 MiB more text; what does not grow with it is a row group, a part and a batch.
    assert growth[200_000] < growth[20_000] + 60
