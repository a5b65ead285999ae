"""A full object store: what does not fit goes to the disk and comes back, and no byte differs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray

from faults.harness import Driver, assert_same, make_case

ROOT = Path(__file__).parents[2]

FULL = """
    import sys, tempfile, threading, time
    from pathlib import Path
    import numpy as np, ray
    from jobs.__main__ import main
    disk = Path(sys.argv[3])
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False,
             object_store_memory=100 << 20, object_spilling_directory=str(disk),
             _temp_dir=tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    # Most of the store is in use by somebody else: what is looked at can neither be moved nor removed.
    inuse = [ray.get(ray.put(np.ones(11 << 20, np.uint8))) for _ in range(9)]
    spilled = set()
    def watch():
        while True:
            spilled.update(path.name for path in disk.rglob("*") if path.is_file())
            time.sleep(0.005)
    threading.Thread(target=watch, daemon=True).start()
    code = main(["extract", "--config", sys.argv[1], "--run_dir", sys.argv[2], "--quiet"])
    print("spilled", len(spilled), sum(map(len, inuse)), flush=True)
    ray.shutdown()
    sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_partitions_that_are_spilled_to_the_disk_keep_their_bytes(tmp_path: Path, ray_session: None) -> None:
    """Encoded partitions of half a megabyte wait in a store that has one megabyte left."""
    case = make_case(tmp_path, documents=16_384, partition_rows=1024)
    quiet = Driver("extract", case, tmp_path / "quiet", str(ray.get_runtime_context().gcs_address))
    assert quiet.wait(300) == 0, quiet.said.read_text()
    (tmp_path / "spilled").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), *map(str, (case, tmp_path / "full", tmp_path / "spilled"))],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("spilled"))
    print(line, file=sys.stderr)
    assert int(line.split()[1]) > 0
    assert_same(tmp_path / "full", tmp_path / "quiet")
