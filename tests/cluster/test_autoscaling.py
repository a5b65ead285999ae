"""A cluster that grows with a run and goes away after it, by Ray's own autoscaler: `benchmarks/autoscaling.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.integrity import verify
from engine.rundir import RunDir

ROOT = Path(__file__).parents[2]
GRADIENTS = "gradient actors"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_and_the_gradient_pool_grow_from_none_while_a_run_goes_on_and_are_gone_after_it(
    tmp_path: Path,
) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/autoscaling.py", "--nodes", "3", "--documents", "140_000"]
    done = subprocess.run(
        [*command, "--json", str(found), "--folder", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text())
    samples, (began, ended) = result["samples"], result["stages"]["extract"]
    assert samples[0]["worker nodes"] == 0
    assert max(s["worker nodes"] for s in samples) == 3
    in_extraction = [s for s in samples if began <= s["seconds"] <= ended]
    on_nodes = [s[f"{GRADIENTS}, nodes"] for s in in_extraction if s[GRADIENTS]]
    assert on_nodes[0] == 1  # it does not wait for the others
    assert max(on_nodes) >= 2  # and takes them while it goes on
    assert samples[-1]["worker nodes"] == 0
    assert (tmp_path / "run/report.html").exists()
    assert verify(RunDir(str(tmp_path / "run"))).damage == []
