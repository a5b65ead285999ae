"""Distances between a selection and the true training set, when that is known (docs/method.md, step 6).

All are None-safe numbers of two lists of documents: optimal transport between their sentence embeddings, how
much of the true set's words and documents the selection holds, how far each selected document is from its
nearest true one, and whether labels agree. Sets beyond a limit are subsampled, and the error that brings stated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError, install

Vectors = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]

REGULARISATION = 0.05
"""Entropic regularisation of Sinkhorn; distances between unit vectors are at most 2."""

DRAWS = 3
"""Subsamples of a set beyond the limit; the spread over them is the stated error."""

EDIT_PAIRS = 4_000_000
"""Pairs of documents whose edit distance is computed; selected documents are subsampled to stay below."""

EDIT_CHARS = 1000
"""Characters of a document that edit distance looks at."""


@dataclass(frozen=True)
class Documents:
    """One set: n texts, unit embeddings (n, hidden) float32, labels (n,) int64 (-1: unknown) or None."""

    texts: Sequence[str]
    embeddings: npt.NDArray[np.float32]
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, members: npt.NDArray[np.int64]) -> Documents:
        """The documents at the given positions."""
        return Documents(
            [self.texts[i] for i in members],
            self.embeddings[members],
            None if self.labels is None else self.labels[members],
        )


def compare_sets(selected: Documents, true: Documents, limit: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All distances of a selection from the true set.

    Returns:
        emd: exact optimal transport (Wasserstein-1) between the embeddings, uniform weights, Euclidean cost;
        sinkhorn: the transport cost of the entropic plan (Cuturi 2013; regularisation 0.05), an upper bound of
        emd; emd_error, sinkhorn_error: standard error over subsamples, None where the sets are compared whole;
        vocabulary: share of the true set's distinct words that the selection has;
        true_found: share of true documents that are selected, case and white space aside;
        selected_true: share of selected documents that are true ones;
        edit: mean over selected documents of the normalised Levenshtein distance (0 equal, 1 nothing alike) to
        the nearest true one, with edit_error, its standard error, where not all are looked at;
        label_agreement: share of selected true documents whose label is the true one (None without any),
        neighbour_label_agreement: share of selected documents with the label of the true one nearest by
        embedding (None without labels); compared: documents compared of (selected, true).

    Raises:
        UserError: an empty set, or packages that are not installed.
    """
    if not len(selected) or not len(true):
        raise UserError("distances need documents on both sides: the selection or evaluate.train is empty.")
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = _transport_draws(selected, true, limit, rng)
    result |= {"vocabulary": vocabulary(selected.texts, true.texts)}
    result |= _exact(selected, true)
    result |= _edit(selected.texts, true.texts, rng)
    result["neighbour_label_agreement"] = _neighbour_labels(selected, true)
    return result


def transport(a: Vectors, b: Vectors) -> tuple[float, float]:
    """(exact, Sinkhorn) transport cost between uniform distributions on the rows of a (n, h) and b (m, h)."""
    try:
        import ot
    except ImportError:
        raise UserError(f"distances need the packages POT and rapidfuzz: {install('distances')}.") from None
    cost = ot.dist(a.astype(np.float64), b.astype(np.float64), metric="euclidean")
    u, v = np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))
    exact = float(ot.emd2(u, v, cost, numItermax=10_000_000))
    plan = ot.sinkhorn(u, v, cost, REGULARISATION, numItermax=5000, stopThr=1e-9, warn=False)
    return exact, float((plan * cost).sum())


def vocabulary(selected: Sequence[str], true: Sequence[str]) -> float:
    """|words(true) & words(selected)| / |words(true)|, words in lower case."""
    words = [
        {word for text in texts for word in re.findall(r"\w+", text.casefold())} for texts in (selected, true)
    ]
    return len(words[0] & words[1]) / max(1, len(words[1]))


def nearest(selected: Documents, true: Documents) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The true document nearest to each selected one by its embedding.

    Returns:
        positions in `true` and distances, 1 - cosine, both (n,).
    """
    found, distance = [], []
    for part in np.array_split(selected.embeddings, max(1, -(-len(selected) // 256))):
        cosine = part @ true.embeddings.T
        found.append(cosine.argmax(axis=1))
        distance.append(1 - cosine.max(axis=1))
    return np.concatenate(found), np.concatenate(distance)


def _transport_draws(
    selected: Documents, true: Documents, limit: int, rng: np.random.Generator
) -> dict[str, Any]:
    whole = len(selected) <= limit and len(true) <= limit
    found = []
    for _ in range(1 if whole else DRAWS):
        sides = [side.embeddings[_some(len(side), limit, rng)] for side in (selected, true)]
        found.append(transport(sides[0], sides[1]))
    values = np.array(found)
    error = [None, None] if whole else (values.std(axis=0, ddof=1) / math.sqrt(DRAWS)).tolist()
    return {
        "emd": float(values[:, 0].mean()),
        "emd_error": error[0],
        "sinkhorn": float(values[:, 1].mean()),
        "sinkhorn_error": error[1],
        "compared": [min(len(selected), limit), min(len(true), limit)],
    }


def _exact(selected: Documents, true: Documents) -> dict[str, Any]:
    chosen = [" ".join(text.casefold().split()) for text in selected.texts]
    known: dict[str, int] = {}
    for i, text in enumerate(true.texts):
        known.setdefault(" ".join(text.casefold().split()), i)
    hits = [(i, known[text]) for i, text in enumerate(chosen) if text in known]
    agreement = None
    if hits and selected.labels is not None and true.labels is not None:
        ours, theirs = np.array(hits).T
        agreement = float((selected.labels[ours] == true.labels[theirs]).mean())
    return {
        "true_found": len({j for _, j in hits}) / len(known),
        "selected_true": len(hits) / len(chosen),
        "label_agreement": agreement,
    }


def _edit(selected: Sequence[str], true: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    try:
        from rapidfuzz import process
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError(f"distances need the packages POT and rapidfuzz: {install('distances')}.") from None
    sides = [[text[:EDIT_CHARS] for text in texts] for texts in (selected, true)]
    some = _some(len(selected), max(1, EDIT_PAIRS // len(true)), rng)
    nearest = np.concatenate(
        [
            process.cdist(
                [sides[0][i] for i in part],
                sides[1],
                scorer=Levenshtein.normalized_distance,
                dtype=np.float32,
            ).min(axis=1)
            for part in np.array_split(some, -(-len(some) // 64))
        ]
    )
    whole = len(some) == len(selected)
    error = None if whole or len(some) < 2 else float(nearest.std(ddof=1) / math.sqrt(len(some)))
    return {"edit": float(nearest.mean()), "edit_error": error}


def _neighbour_labels(selected: Documents, true: Documents) -> float | None:
    if selected.labels is None or true.labels is None:
        return None
    return float((selected.labels == true.labels[nearest(selected, true)[0]]).mean())


def _some(n: int, limit: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Positions of at most `limit` of n documents, ascending."""
    return np.arange(n) if n <= limit else np.sort(rng.permutation(n)[:limit])
