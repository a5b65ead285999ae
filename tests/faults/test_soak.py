"""Random kills, seeded: whatever dies and whenever, the run ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from faults.harness import Driver, Soak, make_case

KILLS = int(os.environ.get("UNBAKE_SOAK_KILLS", "200"))
SECONDS = float(os.environ.get("UNBAKE_SOAK_SECONDS", "inf"))
SEED = int(os.environ.get("UNBAKE_SOAK_SEED", "1"))


def undisturbed(command: str, config: Path, address: str) -> Path:
    """A run that nothing happened to."""
    run = config.parent / "undisturbed"
    driver = Driver(command, config, run, address)
    assert driver.wait(300) == 0, driver.said.read_text()
    return run


def report(soak: Soak) -> None:
    """What was killed, for the person who ran it."""
    table = {f"{stage}: {kind}": n for (stage, kind), n in sorted(soak.killed.items())}
    table |= {f"{stage}: SIGTERM to the driver": n for stage, n in sorted(soak.stopped.items())}
    text = json.dumps({"kills": soak.kills, "runs": soak.runs, "starts": soak.starts, **table}, indent=2)
    print(text, file=sys.stderr)
    if "UNBAKE_SOAK_REPORT" in os.environ:
        with open(os.environ["UNBAKE_SOAK_REPORT"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": soak.seed, **json.loads(text)}) + "\n")


@pytest.mark.slow  # test_nodes.py kills a node, test_kills.py stops a driver, and both compare bytes
def test_a_few_random_kills_of_extraction_change_no_byte(tmp_path: Path, address: str) -> None:
    config = make_case(tmp_path, documents=768)
    soak = Soak(config, undisturbed("extract", config, address), address, seed=0, command="extract")
    soak.until(4)
    report(soak)
    assert soak.kills >= 4
    assert soak.runs >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_soak_of_random_kills_changes_no_byte(tmp_path: Path, address: str) -> None:
    """Extraction, selection with index shards, retraining; UNBAKE_SOAK_KILLS kills, UNBAKE_SOAK_SEED."""
    config = make_case(tmp_path)
    soak = Soak(config, undisturbed("recover", config, address), address, seed=SEED)
    try:
        soak.until(KILLS, SECONDS)
    finally:
        report(soak)
    assert soak.kills >= KILLS or float("inf") > SECONDS
