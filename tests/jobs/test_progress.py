"""Progress: a live bar with rate and time left in a terminal, plain lines without colour elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGE = """
import sys, time
import jobs.progress
from engine.rundir import RunDir
jobs.progress.LINE_SECONDS = 0.05
progress = jobs.progress.Progress(RunDir(sys.argv[1]))
progress.warn("extract", "mind the gap")
with progress.stage("extract", 4000, "documents", 1000) as stage:
    for _ in range(3):
        time.sleep(0.15)
        stage.advance(500)
"""


def in_terminal(folder: Path) -> str:
    """What the stage writes to a terminal of 120 columns."""
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    env = {k: v for k, v in env.items() if k not in ("NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(folder)],
        cwd=ROOT,
        env=env,
        stdout=theirs,
        stderr=theirs,
        stdin=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:  # the other end is closed: how Linux ends a terminal
        pass
    os.close(ours)
    assert process.wait(60) == 0, seen.decode()
    return seen.decode()


def test_a_terminal_sees_rate_and_time_left(tmp_path: Path) -> None:
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(tmp_path))
    assert re.search(r"extract .*2000/4000 documents .*\d/s, \d+\.\d s left", seen)
    assert "extract: 2,500 documents in" in seen.replace("\r", "\n")


def test_a_pipe_sees_plain_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "\x1b" not in done.stderr
    assert lines[:2] == ["warning: mind the gap", "extract: 3,000 documents to do"]
    assert re.fullmatch(r"extract: 1,500 of 4,000 documents, [\d,.]+/s, \d+\.\d s left", lines[2])
    assert re.fullmatch(r"extract: 2,500 documents in \d\.\d s", lines[-1])
