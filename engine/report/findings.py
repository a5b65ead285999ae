"""Findings of `unbake diagnose` for the report: diagnostics.json as small tables and sentences."""

from __future__ import annotations

from typing import Any

from engine.report.numbers import NONE, count, figures, fixed
from engine.select.baselines import CONFIDENT


def findings(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Tables, each with title, note, columns and rows of text; empty where nothing was diagnosed."""
    if not found:
        return []
    tables = [_sets(found), _checks(found), _trajectory(found.get("trajectory"))]
    return [table for table in tables if table]


def sentences(found: dict[str, Any] | None) -> list[str]:
    """The warnings, each with what to try."""
    return [f"{warning['text']} Try {warning['try']}" for warning in (found or {}).get("warnings", [])]


def _sets(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "Redundancy and balance",
        "note": "Mean cosine of selected gradients over all pairs, and of each to its nearest other; balance is the "
        "entropy of the labels, 1 where all are equally frequent.",
        "columns": ["Set", "Mean cosine", "Nearest cosine", "Label balance"],
        "rows": [
            [
                name,
                fixed(row["mean_cosine"], 3),
                fixed(row["nearest_cosine"], 3),
                fixed(row.get("balance"), 2),
            ]
            for name, row in found["sets"].items()
        ],
    }


def _checks(found: dict[str, Any]) -> dict[str, Any]:
    path, returns, optimum, control = (found[name] for name in ("path", "returns", "optimum", "control"))
    confidence, projection = found["confidence"], found["projection"]
    rows = [
        ["f of the selection", fixed(control["objective"], 3)],
        ["f of greedy towards −Delta (negative control)", fixed(control["negative"]["peak_objective"], 3)],
        [
            "f of greedy towards a random direction (negative control)",
            fixed(control["random"]["peak_objective"], 3),
        ],
        ["Picks that lowered f", f"{count(path['lowering_picks'])} of {count(len(path['gain']))}"],
        ["Picks to nine tenths of the largest f", count(path["picks_to_90_percent"])],
        ["Diminishing returns violated", _share(returns["violations"], returns["checked"])],
        ["A further document lowers f", _share(returns["lowering"], returns["checked"])],
        [
            f"Greedy over the exhaustive optimum, sets of {optimum['rows']}",
            f"{figures(optimum['ratio_mean'], 4)} (least {figures(optimum['ratio_least'], 4)})",
        ],
        ["Error of projected cosines", figures(projection["target_error"]) if projection else NONE],
        ["Mean confidence of labels on the corpus", fixed(confidence["mean"], 2)],
        ["Documents with confidence below one half", f"{100 * confidence['below_half']:.0f}%"],
        [
            f"Documents with confidence of {CONFIDENT} or more",
            f"{found['sure']['corpus']:.0%}; of the selection {found['sure']['selected']:.0%}",
        ],
    ]
    return {
        "title": "Checks",
        "note": "f is neither monotone nor submodular, so violations are no fault; they say how far the usual "
        "guarantee of greedy is from holding.",
        "columns": ["Check", "Found"],
        "rows": rows,
    }


def _trajectory(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [
        [row["checkpoint"], fixed(row["way"], 2), fixed(row["cosine"], 3), figures(row["gradient_norm"])]
        for row in found["recorded"]
    ]
    rows += [
        [
            f"synthetic {row['fraction']:g}",
            fixed(row["fraction"], 2),
            fixed(row["cosine"], 3),
            figures(row["gradient_norm"]),
        ]
        for row in found["synthetic"]
    ]
    return {
        "title": "Trajectory fidelity",
        "note": "Cosine of the true documents' gradient with the change in weights, along the recorded training run "
        "and at synthetic checkpoints; way 1 is the fine-tuned model.",
        "columns": ["Checkpoint", "Way", "Cosine", "Gradient norm"],
        "rows": rows,
    }


def _share(share: float | None, checked: int) -> str:
    return NONE if share is None else f"{100 * share:.0f}% of {count(checked)}"
