"""Progress of several trainings at once: each has its line while it is at work, and none after."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.rundir import RunDir
from jobs import progress
from jobs.progress import Progress


def test_each_training_at_work_has_a_line_under_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(RunDir(str(tmp_path))).stage("retrain", 40, "documents") as stage:
        stage.row("greedy-0", 8, 20, "step 1 of 3, loss 0.5")
        stage.row("random-0", 4, 20, "step 1 of 3, loss 0.7")
        stage.update(12)
        both = capsys.readouterr().err
        stage.row("greedy-0", 20, 20, "step 3 of 3, loss 0.4")
        stage.update(24)
        one = capsys.readouterr().err
    assert "12 of 40 documents" in both
    assert "greedy-0: step 1 of 3, loss 0.5" in both
    assert "random-0: step 1 of 3, loss 0.7" in both
    assert "greedy-0" not in one, "it has ended"
    assert "random-0" in one
