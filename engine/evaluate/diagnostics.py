"""Diagnostics of a selection: what greedy did, how redundant the set is, and when not to trust it.

The checks that reviewers of the method asked for (docs/method.md, step 6): gains along the path, diminishing
returns, the ratio to the exhaustive optimum on small sets, redundancy and class balance beside other strategies,
the negative control, the error of the projection, and the confidence of the labels. All on projected gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.rows import Rows
from engine.select import Columns, select
from engine.select.baselines import CONFIDENT
from engine.select.objective import Floats, Ints, RowKind, scores, unit_target, vectors
from engine.select.view import View, target_of
from engine.spec import Select, Strategy

OTHERS: tuple[Strategy, ...] = ("random", "topk")
"""Strategies whose sets stand beside the selection."""

CANDIDATES, PREFIXES = 256, 12
"""Rows and prefixes of the path on which diminishing returns are checked."""

SUBSET, DRAWS = 16, 8
"""Rows of a set that is searched exhaustively, and how many such sets are drawn."""

REDUNDANT, UNSURE, NEAR_CONTROL, PROJECTED = 0.9, 0.5, 0.9, 0.1
"""Above these, or below for UNSURE, a warning: mean nearest-neighbour cosine of the picks; mean confidence of
the labels; f towards a random direction as a share of f towards Delta; standard error of projected cosines."""

MOSTLY_SURE, SURER = 0.5, 3.0
"""A warning where the model is sure of so large a share of the picks, and of so many times the corpus's share."""


def diagnose_selection(
    rows: Rows, order: Ints, columns: Columns, spec: Select, shares: list[float] | None = None
) -> dict[str, Any]:
    """Everything that can be said from the store and the picks alone.

    Args:
        rows: the store, as `engine.select.view_of` shows it for `spec`.
        order: (k,) the selected rows, in pick order.
        columns: as the selection had them.
        spec: the settings of the selection.
        shares: label shares of the corpus, for classification.

    Returns:
        path, returns, optimum, sets (by strategy: redundancy and balance), control.
    """
    small = spec.model_copy(update={"size": int(order.size), "stop": "size", "weights": "equal", "verify": 0})
    sets: dict[str, Ints] = {spec.strategy: order}
    for strategy in OTHERS:
        if strategy != spec.strategy:
            sets[strategy] = select(rows, columns, small.model_copy(update={"strategy": strategy})).rows
    described = {
        name: {**redundancy(rows, members, spec.rows), **balance(columns.label, members)}
        for name, members in sets.items()
    }
    return {
        "path": path_gains(rows, order, spec.rows),
        "returns": diminishing_returns(rows, order, spec.rows, spec.seed),
        "optimum": exhaustive_ratio(rows, spec.rows, spec.seed),
        "sets": described,
        "corpus_shares": shares,
        "control": negative_control(rows, order, columns, small),
    }


def path_gains(rows: Rows, order: Ints, kind: RowKind) -> dict[str, Any]:
    """Gain of each pick: [k] values, how many lowered f, and after how many picks nine tenths of f were reached."""
    u = unit_target(rows.target)
    objective = np.array([scores(total, row[None], u)[0] for total, row in _prefixes(rows, order, kind)])
    gain = np.diff(objective, prepend=0.0)
    peak = int(objective.argmax())
    return {
        "gain": gain.tolist(),
        "objective": float(objective[-1]),
        "peak_size": peak + 1,
        "peak_objective": float(objective[peak]),
        "lowering_picks": int((gain < 0).sum()),
        "picks_to_90_percent": int(np.argmax(objective >= 0.9 * objective[peak])) + 1
        if objective[peak] > 0
        else None,
    }


def diminishing_returns(rows: Rows, order: Ints, kind: RowKind, seed: int = 0) -> dict[str, Any]:
    """How often a row gains f more when added later: what submodularity would forbid.

    For prefixes S of the path and S + s one pick later, and random rows i outside both, a violation is
    ``f(S + s + i) - f(S + s) > f(S + i) - f(S)``. Also how often adding i lowers f, which monotonicity forbids.

    Returns:
        checked, violations and lowering (shares), largest (the largest violation).
    """
    u = unit_target(rows.target)
    outside = np.setdiff1d(np.flatnonzero(rows.valid), order)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(outside)[:CANDIDATES])
    at = np.unique(np.geomspace(1, max(1, order.size - 1), PREFIXES).astype(np.int64))
    if not chosen.size or order.size < 2:
        return {"checked": 0, "violations": None, "lowering": None, "largest": None}
    g = vectors(rows.take(chosen), kind)
    gaps, lowering = [], []
    for number, (total, row) in enumerate(_prefixes(rows, order, kind)):
        if number not in at:
            continue
        later = total + row
        early, late = (scores(s, g, u) - _f(s, u) for s in (total, later))
        gaps.append(late - early)
        lowering.append(early < 0)
    gap = np.concatenate(gaps)
    return {
        "checked": int(gap.size),
        "violations": float((gap > 1e-12).mean()),
        "lowering": float(np.concatenate(lowering).mean()),
        "largest": float(max(0.0, gap.max())),
    }


def exhaustive_ratio(rows: Rows, kind: RowKind, seed: int = 0) -> dict[str, Any]:
    """f of greedy over the largest f of any set of that size, on random sets of up to 16 rows.

    Every subset is scored through the Gram matrix: ``f(S)^2 ||.||`` needs sums of inner products alone.

    Returns:
        sets, rows, ratio_mean, ratio_least over sizes 1 to 8 and draws with a positive optimum.
    """
    pool = np.flatnonzero(rows.valid)
    size, rng = min(SUBSET, pool.size), np.random.default_rng(seed)
    ratios = []
    for _ in range(DRAWS):
        g = vectors(rows.take(np.sort(rng.permutation(pool)[:size])), kind)
        every = _all_subsets(g, unit_target(rows.target))
        count = np.bitwise_count(np.arange(every.size))
        chosen = 0
        for picked in range(1, min(size, SUBSET // 2) + 1):
            chosen |= 1 << max(
                (bit for bit in range(size) if not chosen >> bit & 1),
                key=lambda bit: every[chosen | 1 << bit],
            )
            best = float(every[count == picked].max())
            if best > 0:
                ratios.append(float(every[chosen]) / best)
    return {
        "sets": DRAWS,
        "rows": size,
        "ratio_mean": float(np.mean(ratios)) if ratios else None,
        "ratio_least": float(np.min(ratios)) if ratios else None,
    }


def redundancy(rows: Rows, members: Ints, kind: RowKind) -> dict[str, float | None]:
    """Mean cosine over all pairs of selected gradients, and of each to its nearest other; mean over checkpoints."""
    if members.size < 2:
        return {"mean_cosine": None, "nearest_cosine": None}
    g = vectors(rows.take(np.sort(members)), kind).transpose(1, 0, 2)
    length = np.linalg.norm(g, axis=2, keepdims=True)
    unit = (g / np.where(length > 0, length, 1)).astype(np.float32)
    k = members.size
    present = (length[:, :, 0] > 0).sum(axis=1)
    pairs = (np.linalg.norm(unit.sum(axis=1, dtype=np.float64), axis=1) ** 2 - present) / (k * (k - 1))
    nearest = []
    for at in unit:
        for start in range(0, k, 512):
            cosine = at[start : start + 512] @ at.T
            cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -np.inf
            nearest.append(cosine.max(axis=1))
    return {"mean_cosine": float(pairs.mean()), "nearest_cosine": float(np.concatenate(nearest).mean())}


def sure(
    confidence: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], members: Ints
) -> dict[str, float]:
    """Share of documents whose label has CONFIDENT or more: of the picks, and of all valid ones."""
    above = confidence >= CONFIDENT
    return {"selected": float(above[members].mean()), "corpus": float(above[valid].mean())}


def balance(label: npt.NDArray[np.int32] | None, members: Ints) -> dict[str, Any]:
    """Share of each autolabel, and their entropy over its maximum (1: all equal); nothing without labels."""
    if label is None:
        return {}
    count = np.bincount(np.maximum(label[members], 0), minlength=int(label.max()) + 1)
    share = count / max(1, count.sum())
    some = share[share > 0]
    return {
        "label_shares": share.tolist(),
        "balance": float(-(some * np.log(some)).sum() / np.log(max(2, share.size))),
    }


def negative_control(rows: Rows, order: Ints, columns: Columns, spec: Select) -> dict[str, Any]:
    """The same greedy search towards -Delta and towards a random direction of Delta's norm.

    Returns:
        objective: f of the selection towards Delta; and for negative, random: objective (towards that target) and
        overlap, the share of picks that are in the selection too.
    """
    found: dict[str, Any] = {"objective": float(_f(_sum(rows, order, spec.rows), unit_target(rows.target)))}
    view = rows if isinstance(rows, View) else View(rows, rows.target)
    for target in ("negative", "random"):
        settings = spec.model_copy(update={"strategy": "greedy", "target": target})
        picked = select(view.towards(target_of(view.store.target, settings)), columns, settings)
        found[target] = {
            "objective": float(picked.objective[-1]),
            "peak_objective": picked.peak_value,
            "overlap": float(np.isin(picked.rows, order).mean()),
        }
    return found


@dataclass(frozen=True)
class StoredProducts:
    """Exact inner products that extraction left beside the rows, (P, N): <G_i, Delta> and ||G_i||; NaN: none."""

    alignment: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]


def projection_error(
    rows: Rows, exact: StoredProducts, delta_norm: float, seed: int = 0, sample: int = 2048
) -> dict[str, Any] | None:
    """Error of the projection on a sample of rows, against exact inner products; None where none were kept.

    Returns:
        rows; target_error: standard deviation of ``<g_i, p(Delta)> - <G_i, Delta>`` over ``||G_i|| ||Delta||``, the
        error of a cosine; target_bias: its mean; norm_error: standard deviation of ``||g_i|| / ||G_i|| - 1``.
    """
    known = rows.valid & np.isfinite(exact.alignment).all(0) & (exact.norm > 0).all(0)
    members = np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(known))[:sample])
    if not members.size:
        return None
    g = vectors(rows.take(members), "raw").transpose(1, 0, 2)
    norm = exact.norm[:, members].astype(np.float64)
    error = (g @ rows.target - exact.alignment[:, members]) / (norm * delta_norm)
    return {
        "rows": int(members.size),
        "target_error": float(error.std()),
        "target_bias": float(error.mean()),
        "norm_error": float((np.linalg.norm(g, axis=2) / norm - 1).std()),
    }


def warnings(found: dict[str, Any], strategy: str, compared: list[str]) -> list[dict[str, str]]:
    """What docs/method.md says to warn of, each with what to try: {"text", "try"}.

    Args:
        found: diagnostics.json as it is so far.
        strategy: of the selection.
        compared: strategies that were retrained and judged; none before.
    """
    said: list[dict[str, str]] = []

    def say(text: str, remedy: str) -> None:
        said.append({"text": text, "try": remedy})

    chosen, control = found["sets"][strategy], found["control"]
    nearest, others = chosen["nearest_cosine"], found["sets"].get("random", {}).get("nearest_cosine")
    if nearest is not None and nearest > REDUNDANT and (others is None or nearest > others):
        say(
            f"The selection is highly redundant: a pick's gradient has cosine {nearest:.2f} with its nearest other.",
            "select.dedupe=near, a larger corpus, or fewer documents (select.stop=at_peak).",
        )
    if found["confidence"]["mean"] is not None and found["confidence"]["mean"] < UNSURE:
        say(
            f"The fine-tuned model is unsure of the corpus (mean confidence {found['confidence']['mean']:.2f}): its "
            "labels may be wrong.",
            "a corpus nearer to the task, or select.min_confidence.",
        )
    if found["behind"]:
        better = " and ".join(f"{name} (by {by:.3g})" for name, by in found["behind"].items())
        say(
            f"Retrained on this selection, the base model does worse than on that of {better}.",
            "gradients.checkpoints=1, select.strategy=greedy_balanced, more training seeds, another corpus; and "
            "prefer the better selection until one of them wins.",
        )
    reached = control["random"]["peak_objective"]
    if control["objective"] > 0 and reached > NEAR_CONTROL * control["objective"]:
        say(
            f"Greedy comes as near to a random direction (f = {reached:.3f}) as to Delta (f = "
            f"{control['objective']:.3f}): f by itself is no evidence here.",
            "fewer documents (select.size), or a larger gradients.dim; judge by retraining.",
        )
    if control["objective"] <= 0:
        say(
            "The selection does not point along Delta at all (f is not above 0).",
            "other layers (gradients.layers), another corpus, or check that base is the true base model.",
        )
    picked, everywhere = found["sure"]["selected"], found["sure"]["corpus"]
    if picked >= MOSTLY_SURE and picked > SURER * everywhere and "random_confident" not in compared:
        say(
            f"The fine-tuned model is {CONFIDENT:.0%} sure of {picked:.0%} of the selection and of {everywhere:.0%} "
            "of the corpus: documents drawn at random among those may do as well.",
            "the comparison: unbake recover with random_confident among retrain.strategies.",
        )
    shares, corpus = chosen.get("label_shares"), found.get("corpus_shares")
    if shares and max(shares) > 0.9 and (not corpus or max(corpus) <= 0.9):
        say(
            f"Nine tenths of the selection have one label ({max(shares):.0%}).",
            "select.strategy=greedy_balanced.",
        )
    projected = found.get("projection")
    if projected and projected["target_error"] > PROJECTED:
        say(
            f"The projection errs by {projected['target_error']:.2f} (standard deviation of a cosine).",
            "a larger gradients.dim, or gradients.projector=exact.",
        )
    return said


def _prefixes(rows: Rows, order: Ints, kind: RowKind) -> Any:
    """(sum before the pick (P, d), the pick (P, d)) for every pick."""
    total = np.zeros((rows.n_checkpoints, rows.dim))
    for start in range(0, order.size, 1024):
        part = order[start : start + 1024]
        ascending = np.argsort(part)
        g = np.empty((part.size, rows.n_checkpoints, rows.dim))
        g[ascending] = vectors(rows.take(part[ascending]), kind)
        for row in g:
            yield total, row
            total = total + row


def _sum(rows: Rows, order: Ints, kind: RowKind) -> Floats:
    return np.asarray(vectors(rows.take(np.sort(order)), kind).sum(axis=0))


def _f(total: Floats, u: Floats) -> float:
    """f of a set from its sums (P, d)."""
    return float(scores(total, np.zeros((1, *total.shape)), u)[0])


def _all_subsets(g: Floats, u: Floats) -> Floats:
    """f of every subset of n rows (n, P, d), (2^n,), bit i of the index standing for row i; f(empty) = 0."""
    n, checkpoints, _ = g.shape
    bits = (np.arange(1 << n)[:, None] >> np.arange(n) & 1).astype(np.float64)
    mean = np.zeros(1 << n)
    for j in range(checkpoints):
        square = np.maximum(((bits @ (g[:, j] @ g[:, j].T)) * bits).sum(axis=1), 0)
        length = np.sqrt(square)
        mean += np.divide(bits @ (g[:, j] @ u), length, out=np.zeros(1 << n), where=length > 0)
    return mean / checkpoints
