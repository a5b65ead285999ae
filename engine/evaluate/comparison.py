"""Comparison of strategies: mean and spread over paired seeds, and the share of the gap each closes.

metrics.json, written by the evaluate stage, is what `metrics` returns::

    format            1
    metric            accuracy | perplexity; the key of the judged number in each model's test result
    higher_is_better  true for accuracy
    models            one entry a model: model (base | finetuned | retrained), strategy, seed (null for the
                      two endpoints), validation, test (each as `engine.evaluate.task.evaluate_model` returns
                      it; validation null without a validation share), seconds (judging it)
    measured          {validation, test}: {documents, tokens} of one model's judging, or null
    seconds           of the whole stage
    base, finetuned   the metric of the two endpoints on the test share
    strategies        the table, one row a strategy in the order of the spec: see `compare`
    distances         with evaluate.train: one row a selection, with strategy, seed (null where the selection
                      does not depend on it) and what `engine.evaluate.distances.compare_sets` returns
    warnings          sentences

Choices (early stopping, options) are made on the validation share; the test share is opened once, here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

REFERENCE = "random"
"""The strategy that a gap is measured from."""

TO_BEAT = {
    REFERENCE: "its selection is not to be trusted here",
    "random_confident": "documents that the fine-tuned model is sure of did better, without a gradient",
}
"""Strategies that a greedy one has to be ahead of, and what it means where it is behind."""

LEVEL = 0.95
"""Confidence level of every interval."""


def metrics(models: list[dict[str, Any]], metric: str, seconds: float) -> dict[str, Any]:
    """The content of metrics.json (see the module's docstring).

    Args:
        models: the entries of `models`, in the order of the table.
        metric: accuracy or perplexity.
        seconds: duration of the evaluation.
    """
    values: dict[str, Any] = {"base": None, "finetuned": None, "runs": []}
    for entry in models:
        value = entry["test"][metric]
        if entry["model"] == "retrained":
            values["runs"].append({"strategy": entry["strategy"], "seed": entry["seed"], "metric": value})
        else:
            values[entry["model"]] = value
    first = models[0] if models else {}
    measured = {
        part: {k: first[part][k] for k in ("documents", "tokens")} if first.get(part) else None
        for part in ("validation", "test")
    }
    higher = metric == "accuracy"
    head = {"format": 1, "metric": metric, "higher_is_better": higher, "seconds": seconds}
    return {**head, "models": models, "measured": measured, **compare(values, higher)}


def compare(results: dict[str, Any], higher_is_better: bool) -> dict[str, Any]:
    """The table: every strategy beside base and fine-tuned.

    With m_s, r_s the metric of method and random at seed s, F the fine-tuned model's, and m, r the means over
    the seeds both have: gap closed ``g = (m - r) / (F - r)`` (docs/method.md, step 6). Its spread is that of the
    paired values, linearised so that one lucky random seed cannot blow a ratio up,
    ``g + ((m_s - m) - (1 - g) (r_s - r)) / (F - r)``; their mean is g, the standard error spread / sqrt(n).

    Args:
        results: base and finetuned (numbers or None), runs: [{strategy, seed, metric}]; a metric of None is a
            model whose logits were not finite: it is left out and named in a warning.
        higher_is_better: True for accuracy, False for perplexity.

    Returns:
        base, finetuned, warnings, and strategies, each with strategy, seeds, values, n, mean, spread (sample
        standard deviation over seeds; None for one), gap_closed, gap_spread, gap_stderr, gap_n (paired
        seeds). The gap is None without random, without a shared seed, or where fine-tuned is not better
        than random.
    """
    base, finetuned = results["base"], results["finetuned"]
    runs: dict[str, dict[int, float]] = {}
    warnings = []
    for run in results["runs"]:
        by_seed = runs.setdefault(run["strategy"], {})
        if run["metric"] is None:
            warnings.append(
                f"{run['strategy']} with seed {run['seed']} gave logits that are not finite: it is left out."
            )
        else:
            by_seed[run["seed"]] = float(run["metric"])
    sign = 1.0 if higher_is_better else -1.0
    reference = runs.get(REFERENCE, {})
    rows = [
        {"strategy": strategy, **_mean_row(by_seed), **_gap(by_seed, reference, finetuned, sign)}
        for strategy, by_seed in runs.items()
    ]
    warnings += _endpoint_warnings(base, finetuned, reference, sign)
    for strategy in runs:
        if strategy.startswith("greedy"):
            for other in TO_BEAT:
                warnings += _select_warnings(
                    strategy, other, _lead(runs[strategy], runs.get(other, {}), sign)
                )
    if runs and max(len(by_seed) for by_seed in runs.values()) == 1:
        warnings.append("One seed only: differences between strategies may be chance; set retrain.seeds.")
    return {"base": base, "finetuned": finetuned, "strategies": rows, "warnings": warnings}


def _mean_row(by_seed: dict[int, float]) -> dict[str, Any]:
    values = list(by_seed.values())
    return {
        "seeds": list(by_seed),
        "values": values,
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "spread": _spread(np.array(values)),
    }


def _gap(
    method: dict[int, float], reference: dict[int, float], finetuned: float | None, sign: float
) -> dict[str, Any]:
    m, r = _paired(method, reference)
    row: dict[str, Any] = {"gap_closed": None, "gap_spread": None, "gap_stderr": None, "gap_n": len(m)}
    if finetuned is None or len(m) == 0 or sign * (finetuned - r.mean()) <= 0:
        return row
    width = finetuned - r.mean()
    gap = float((m.mean() - r.mean()) / width)
    spread = _spread(((m - m.mean()) - (1 - gap) * (r - r.mean())) / width)
    stderr = None if spread is None else spread / math.sqrt(len(m))
    return row | {"gap_closed": gap, "gap_spread": spread, "gap_stderr": stderr}


def half_width(spread: float | None, n: int) -> float | None:
    """Half the confidence interval of a mean: t(LEVEL, n - 1) spread / sqrt(n); None for fewer than two."""
    if spread is None or n < 2:
        return None
    return float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * spread / math.sqrt(n)


def _endpoint_warnings(
    base: float | None, finetuned: float | None, reference: dict[int, float], sign: float
) -> list[str]:
    warnings = []
    if base is not None and finetuned is not None and sign * (finetuned - base) <= 0:
        warnings.append(
            "The fine-tuned model is not better than the base on this test set: it may not be its task, the template "
            "or the labels may be others than it was trained with, or the two models may be swapped."
        )
    random = float(np.mean(list(reference.values()))) if reference else None
    if finetuned is not None and random is not None and sign * (finetuned - random) <= 0:
        warnings.append("Random documents do as well as the fine-tuned model: there is no gap to close.")
    return warnings


def behind(metrics: dict[str, Any], strategy: str) -> dict[str, float]:
    """Those of `TO_BEAT` that a strategy is behind in metrics.json, and by how much over the seeds of both."""
    sign = 1.0 if metrics["higher_is_better"] else -1.0
    runs = {
        row["strategy"]: dict(zip(row["seeds"], row["values"], strict=True)) for row in metrics["strategies"]
    }
    leads = {other: _lead(runs.get(strategy, {}), runs.get(other, {}), sign) for other in TO_BEAT}
    return {other: -float(lead.mean()) for other, lead in leads.items() if lead.size and lead.mean() < 0}


def _lead(method: dict[int, float], other: dict[int, float], sign: float) -> npt.NDArray[np.float64]:
    """By how much a strategy is better than another at each seed that both have, (n,)."""
    m, r = _paired(method, other)
    return sign * (m - r)


def _select_warnings(strategy: str, other: str, lead: npt.NDArray[np.float64]) -> list[str]:
    if lead.size == 0:
        return []
    mean, spread = float(lead.mean()), _spread(lead)
    if mean < 0:
        return [f"{strategy} is worse than {other} by {-mean:.3g}: {TO_BEAT[other]}."]
    if spread is not None and mean < spread:
        return [
            f"{strategy} is ahead of {other} by {mean:.3g}, less than its spread over seeds ({spread:.3g})."
        ]
    return []


def _paired(
    method: dict[int, float], reference: dict[int, float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both strategies' metrics (n,) at the seeds they share."""
    seeds = [seed for seed in method if seed in reference]
    return np.array([method[s] for s in seeds]), np.array([reference[s] for s in seeds])


def _spread(values: npt.NDArray[np.float64]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
