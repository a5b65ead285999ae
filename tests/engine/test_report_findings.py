"""The report shows what `unbake diagnose` found, in every format, with what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.report import render, render_json, render_markdown
from engine.rundir import RunDir
from engine.spec import RunSpec

DIAGNOSED: dict[str, Any] = {
    "path": {"gain": [0.1] * 9, "lowering_picks": 2, "picks_to_90_percent": 5},
    "returns": {"checked": 3072, "violations": 0.1234, "lowering": 0.5, "largest": 0.01},
    "optimum": {"rows": 16, "ratio_mean": 0.98766, "ratio_least": 0.9},
    "sets": {
        "greedy": {"mean_cosine": 0.0123, "nearest_cosine": 0.4567, "balance": 0.91},
        "random": {"mean_cosine": None, "nearest_cosine": None},
    },
    "control": {
        "objective": 0.6789,
        "negative": {"peak_objective": 0.3456},
        "random": {"peak_objective": 0.2345},
    },
    "projection": None,
    "confidence": {"mean": 0.77, "below_half": 0.125},
    "sure": {"selected": 0.85, "corpus": 0.08},
    "trajectory": {
        "recorded": [{"checkpoint": "step-<1>", "way": 0.5, "cosine": 0.333, "gradient_norm": 1.5}],
        "synthetic": [{"fraction": 0.25, "cosine": None, "gradient_norm": 0.0}],
    },
    "warnings": [{"text": "It is <b>redundant</b>.", "try": "select.dedupe=near."}],
}


def test_findings_are_shown_in_every_format(tmp_path: Path) -> None:
    spec = RunSpec.from_dict(
        {
            "models": {"base": "b", "finetuned": "f"},
            "corpus": {"paths": ["c.jsonl"]},
            "task": {"labels": ["yes", "no"]},
        }
    )
    table = pa.table({"text": ["one", "two"], "label": [0, 1], "objective": [0.1, 0.2], "gain": [0.1, 0.1]})
    given = (RunDir(str(tmp_path)), spec, None, table)
    page = render(*given, {"diagnosed": DIAGNOSED})
    text = render_markdown(*given, {"diagnosed": DIAGNOSED})
    for number in (
        "0.457",
        "0.679",
        "0.346",
        "0.234",
        "12% of 3,072",
        "2 of 9",
        "0.9877",
        "0.77",
        "0.333",
        "8%; of the selection 85%",
    ):
        assert number in page
        assert number in text
    assert "It is &lt;b&gt;redundant&lt;/b&gt;. Try select.dedupe=near." in page
    assert "step-&lt;1&gt;" in page
    assert "| greedy | 0.012 | 0.457 | 0.91 |" in text
    assert "select.dedupe=near" in render_json(*given, {"diagnosed": DIAGNOSED})
    assert "unbake diagnose" in render(*given, {})
    assert "Diagnostics" not in render_markdown(*given, {})
