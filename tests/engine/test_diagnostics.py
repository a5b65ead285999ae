"""Diagnostics find what was put there: redundancy, imbalance, controls, violations, optima, projection error."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from engine.evaluate.diagnostics import (
    StoredProducts,
    balance,
    diagnose_selection,
    diminishing_returns,
    exhaustive_ratio,
    path_gains,
    projection_error,
    redundancy,
    sure,
    warnings,
)
from engine.rows import ArrayRows
from engine.select import Columns, select
from engine.spec import Select


def rows_of(features: np.ndarray, target: np.ndarray) -> ArrayRows:
    return ArrayRows(features.astype(np.float32), target, block_rows=32)


@pytest.fixture
def rows() -> ArrayRows:
    rng = np.random.default_rng(2)
    target = rng.normal(size=24)
    return rows_of(rng.normal(size=(2, 120, 24)) + 0.3 * target, target)


def f(rows: ArrayRows, members: Any) -> float:
    """f(S) by numpy's own sums."""
    total = rows.take(np.sort(np.array(members))).features.astype(np.float64).sum(axis=1)
    u = rows.target / np.linalg.norm(rows.target)
    return float(np.mean([t @ u / np.linalg.norm(t) for t in total]))


def test_gains_add_up_to_the_objective_and_falls_are_counted(rows: ArrayRows) -> None:
    order = select(rows, Columns(), Select(strategy="random", size=40)).rows
    found = path_gains(rows, order, "raw")
    assert sum(found["gain"]) == pytest.approx(f(rows, order))
    path = [f(rows, order[: i + 1]) for i in range(40)]
    assert found["lowering_picks"] == int((np.diff(path, prepend=0) < 0).sum())
    assert found["peak_size"] == int(np.argmax(path)) + 1
    assert path[found["picks_to_90_percent"] - 1] >= 0.9 * max(path)


def test_violations_of_diminishing_returns_are_those_that_a_search_by_hand_finds(rows: ArrayRows) -> None:
    order = select(rows, Columns(), Select(size=6)).rows
    found = diminishing_returns(rows, order, "raw")
    outside = [i for i in range(120) if i not in set(order.tolist())]
    late, early = [], []
    for t in (1, 2, 3, 4, 5):  # every prefix of a path this short
        small, large = order[:t], order[: t + 1]
        late += [f(rows, [*large, i]) - f(rows, large) for i in outside]
        early += [f(rows, [*small, i]) - f(rows, small) for i in outside]
    gap = np.array(late) - np.array(early)
    assert found["checked"] == gap.size
    assert found["violations"] == pytest.approx((gap > 1e-12).mean())
    assert found["violations"] > 0  # the objective is not submodular
    assert found["lowering"] == pytest.approx((np.array(early) < 0).mean())
    assert found["largest"] == pytest.approx(gap.max())


def test_the_exhaustive_ratio_is_greedy_over_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(9)
    target = rng.normal(size=6)
    few = rows_of(rng.normal(size=(1, 9, 6)), target)
    ratios = []
    for size in range(1, 9):
        greedy = select(few, Columns(), Select(size=size)).objective[-1]
        best = max(f(few, members) for members in combinations(range(9), size))
        ratios += [greedy / best] if best > 0 else []
    found = exhaustive_ratio(few, "raw")  # all draws are of the same nine rows
    assert found["rows"] == 9
    assert found["ratio_mean"] == pytest.approx(np.mean(ratios))
    assert found["ratio_least"] == pytest.approx(np.min(ratios))
    assert found["ratio_least"] < 1


def test_redundancy_is_one_for_copies_and_zero_for_orthogonal_rows() -> None:
    copies = rows_of(np.repeat(np.ones((1, 1, 8)), 5, axis=1), np.ones(8))
    assert redundancy(copies, np.arange(5), "raw") == pytest.approx({"mean_cosine": 1, "nearest_cosine": 1})
    apart = rows_of(3 * np.eye(8)[None], np.ones(8))
    assert redundancy(apart, np.arange(8), "raw") == pytest.approx({"mean_cosine": 0, "nearest_cosine": 0})
    pair = rows_of(np.array([[[1.0, 0], [1, 0], [0, 1]]]), np.ones(2))
    assert redundancy(pair, np.arange(3), "raw") == pytest.approx(
        {"mean_cosine": 1 / 3, "nearest_cosine": 2 / 3}
    )


def test_balance_is_the_entropy_of_the_labels() -> None:
    label = np.array([0, 1, 2, 3, 0, 0], np.int32)
    assert balance(label, np.array([0, 1, 2, 3]))["balance"] == pytest.approx(1)
    assert balance(label, np.array([0, 4, 5])) == {"label_shares": [1, 0, 0, 0], "balance": 0}
    assert balance(None, np.arange(3)) == {}


def test_the_control_finds_that_delta_is_special_or_that_nothing_is() -> None:
    rng = np.random.default_rng(5)
    target = np.zeros(64)
    target[0] = 1
    rows = rows_of(rng.normal(size=(1, 200, 64)) * 0.1 + target, target)
    spec = Select(size=10)
    chosen = select(rows, Columns(), spec)
    control = diagnose_selection(rows, chosen.rows, Columns(), spec)["control"]
    assert control["objective"] == pytest.approx(chosen.objective[-1])
    assert control["objective"] > 0.9
    assert control["random"]["peak_objective"] < 0.6
    assert control["negative"]["peak_objective"] < control["objective"]
    assert 0 <= control["random"]["overlap"] <= 1


def test_projection_error_is_that_of_the_projection() -> None:
    rng = np.random.default_rng(0)
    exact, delta = rng.normal(size=(500, 400)), rng.normal(size=400)
    matrix = rng.normal(size=(400, 64)) / 8
    rows = rows_of((exact @ matrix)[None], delta @ matrix)
    kept = StoredProducts(
        (exact @ delta)[None].astype(np.float32), np.linalg.norm(exact, axis=1)[None].astype(np.float32)
    )
    found = projection_error(rows, kept, float(np.linalg.norm(delta)))
    assert found is not None
    assert found["target_error"] == pytest.approx(1 / 8, rel=0.3)  # 1 / sqrt(dim)
    assert abs(found["target_bias"]) < 0.03
    whole = projection_error(rows_of(exact[None], delta), kept, float(np.linalg.norm(delta)))
    assert whole is not None
    assert whole["target_error"] < 1e-6
    nothing = StoredProducts(np.full((1, 500), np.nan, np.float32), kept.norm)
    assert projection_error(rows, nothing, 1.0) is None


def test_sure_documents_are_counted_among_valid_ones_and_a_missing_confidence_is_not_sure() -> None:
    confidence = np.array([0.995, 0.2, np.nan, 0.99, 1.0], np.float32)
    valid = np.array([True, True, True, True, False])
    assert sure(confidence, valid, np.array([0, 2])) == {"selected": 0.5, "corpus": 0.5}


def findings(**changes: Any) -> dict[str, Any]:
    fine = {
        "sets": {
            "greedy": {"nearest_cosine": 0.4, "label_shares": [0.5, 0.5]},
            "random": {"nearest_cosine": 0.3},
        },
        "control": {"objective": 0.6, "random": {"peak_objective": 0.2}},
        "confidence": {"mean": 0.8},
        "sure": {"selected": 0.8, "corpus": 0.4},
        "behind": {},
        "corpus_shares": [0.5, 0.5],
        "projection": {"target_error": 0.01},
    }
    return {**fine, **changes}


def test_a_sound_selection_is_warned_of_nothing() -> None:
    assert warnings(findings(), "greedy", []) == []


def test_a_comparison_that_was_made_is_not_asked_for() -> None:
    found = findings(sure={"selected": 0.85, "corpus": 0.08})
    assert warnings(found, "greedy", ["random", "random_confident", "greedy"]) == []
    assert len(warnings(found, "greedy", ["random", "topk", "greedy"])) == 1


@pytest.mark.parametrize(
    ("changes", "word", "remedy"),
    [
        ({"sets": {"greedy": {"nearest_cosine": 0.97}}}, "redundant", "dedupe"),
        ({"confidence": {"mean": 0.3}}, "unsure", "min_confidence"),
        ({"sure": {"selected": 0.85, "corpus": 0.08}}, "99% sure of 85%", "random_confident"),
        ({"behind": {"random": 0.1}}, "worse than on that of random (by 0.1)", "greedy_balanced"),
        ({"control": {"objective": 0.6, "random": {"peak_objective": 0.58}}}, "random direction", "dim"),
        ({"control": {"objective": -0.1, "random": {"peak_objective": 0.2}}}, "not point along", "layers"),
        (
            {"sets": {"greedy": {"nearest_cosine": 0.1, "label_shares": [0.95, 0.05]}}},
            "one label",
            "balanced",
        ),
        ({"projection": {"target_error": 0.2}}, "projection errs", "gradients.dim"),
    ],
    ids=["redundant", "unsure", "sure", "worse", "control", "nothing", "labels", "projection"],
)
def test_each_warning_says_what_is_wrong_and_what_to_try(
    changes: dict[str, Any], word: str, remedy: str
) -> None:
    (found,) = warnings(findings(**changes), "greedy", [])
    assert word in found["text"]
    assert remedy in found["try"]
