"""Memory: two gigabytes of documents go through an object store of 200 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS, CHARS, FILES = 102_400, 20_000, 8


def write_corpus(folder: Path) -> None:
    """2 GB of text in Parquet files, every document another."""
    text = " ".join(text for text, _ in tiny.sentences(40_000, 11))
    rows = DOCUMENTS // FILES
    for number in range(FILES):
        starts = range(number * rows, (number + 1) * rows)
        table = pa.table({"text": pa.array([text[i : i + CHARS] for i in starts], pa.large_string())})
        pq.write_table(
            table, folder / f"{number}.parquet", row_group_size=512, compression="none", use_dictionary=False
        )


class Watch(threading.Thread):
    """Samples the resident memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self.largest, self.total = psutil.Process(pid), 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            sizes = []
            for process in [self._root, *self._root.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    sizes.append(memory.rss - memory.shared)
                except psutil.Error:
                    continue
            self.largest, self.total = max([self.largest, *sizes]), max(self.total, sum(sizes))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_gigabytes_go_through_an_object_store_of_200_mb(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base")
    tiny.save_model(tmp_path / "finetuned", perturb=0.02)
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    size = sum(file.stat().st_size for file in (tmp_path / "corpus").iterdir())
    assert size > 2_000_000_000
    fields = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "finetuned")},
        "corpus": {"paths": [str(tmp_path / "corpus")], "max_chars": 2000},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 32},
        "gradients": {"dtype": "float32"},
        "extract": {"threads": 1, "workers_max": 2, "cpus_per_worker": 0.5},
        "select": {"size": 50},
        "ray": {"num_cpus": 2, "object_store_mb": 200},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    began = time.monotonic()
    with open(tmp_path / "said", "w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", "extract", "--config", str(tmp_path / "run.yaml"), "--quiet"],
            cwd=ROOT, env=environment, stdout=said, stderr=said,
        )  # fmt: skip
        watch = Watch(driver.pid)
        watch.start()
        code = driver.wait(timeout=1700)
        watch.over.set()
        watch.join()
    assert code == 0, (tmp_path / "said").read_text()
    result = json.loads((tmp_path / "run/stages/extract.json").read_text())["result"]
    assert result["documents"] == DOCUMENTS
    assert result["quarantined"] == 0
    assert result["truncated"] == DOCUMENTS
    measured = {
        "corpus_gb": round(size / 1e9, 2),
        "seconds": round(time.monotonic() - began),
        "largest_process_mb": watch.largest >> 20,
        "all_processes_mb": watch.total >> 20,
    }
    print(json.dumps(measured), file=sys.stderr)
    if "UNBAKE_SOAK_REPORT" in os.environ:
        with open(os.environ["UNBAKE_SOAK_REPORT"], "a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")
    assert watch.largest < 1 << 30, "bytes of one process, what is shared left out"
