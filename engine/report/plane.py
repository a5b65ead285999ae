"""The map of a selection: gradients of selected documents and of a sample of the corpus in two dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.rows import Rows

CORPUS, SELECTED = 1500, 500
"""Documents of each kind on the map at most: more cannot be told apart."""


def plane(rows: Rows, selected: npt.NDArray[np.int64], seed: int = 0) -> dict[str, Any] | None:
    """Principal directions of the corpus' unit gradients, and where documents and Delta fall in their plane.

    Gradients count as directions (unit norm, the last checkpoint), so that a few large ones do not spread
    the axes; the plane is that of a sample of the corpus alone, centred, so that the selection cannot bend it.

    Args:
        selected: rows of the selection, (k,), in pick order; beyond SELECTED, evenly spread ones are taken.
        seed: of the sample.

    Returns:
        corpus, selected: [[x, y], ...]; target: [x, y] of Delta's direction; variance: share of the sample's
        variance along x and along y. None where there are too few gradients to span a plane.
    """
    sample = _runs(rows, CORPUS, seed)
    spread = np.linspace(0, selected.size - 1, min(selected.size, SELECTED)).round().astype(np.int64)
    corpus, chosen = _units(rows, sample), _units(rows, np.unique(selected[spread]))
    if min(corpus.shape) < 3:
        return None
    centre = corpus.mean(axis=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, s, v = torch.pca_lowrank(torch.from_numpy(corpus - centre), q=min(6, *corpus.shape), center=False)
    axes = v[:, :2].numpy()
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) < 0, -1, 1)
    total = float(((corpus - centre) ** 2).sum()) or 1.0
    target = rows.target / max(float(np.linalg.norm(rows.target)), 1e-300)
    flat = lambda x: np.round((x - centre) @ axes, 5).tolist()  # noqa: E731
    return {
        "corpus": flat(corpus),
        "selected": flat(chosen),
        "target": flat(target[None].astype(np.float32))[0],
        "variance": (s[:2].numpy().astype(np.float64) ** 2 / total).round(4).tolist(),
    }


def _runs(rows: Rows, size: int, seed: int) -> npt.NDArray[np.int64]:
    """About `size` rows, ascending: whole storage chunks at random, so that a remote store is read in few reads."""
    step = min(rows.chunk_rows, 64)
    starts = np.arange(0, rows.n_rows, step)
    taken = np.random.default_rng(seed).permutation(starts)[: -(-size // step)]
    found = (np.sort(taken)[:, None] + np.arange(step)).ravel()
    return found[found < rows.n_rows]


def _units(rows: Rows, which: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Valid, non-zero rows of unit norm at the last checkpoint, (n, d)."""
    block = rows.take(which)
    features = block.features[-1][block.valid].astype(np.float32)
    norm = np.linalg.norm(features, axis=1)
    return features[norm > 0] / norm[norm > 0, None]
