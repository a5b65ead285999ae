"""Weights of picks: how much each selected gradient counts in the sum that is to point along Delta."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from engine.errors import UserError
from engine.rows import Rows
from engine.select.objective import Floats, Ints, RowKind, vectors


def nnls_weights(rows: Rows, order: Ints, kind: RowKind) -> Floats:
    """argmin_{w >= 0} || sum_i w_i g_i - Delta ||, over all checkpoints at once; mean 1.

    The weighting of gradient matching (Killamsetty et al., *GRAD-MATCH*, ICML 2021) on a fixed set. Scaling
    Delta scales w, so w is divided by its mean: as loss weights only proportions count.

    Args:
        rows: the store or a view of it.
        order: (k,) selected rows.

    Returns:
        (k,) float64, none negative; many are 0 where k exceeds P d.

    Raises:
        UserError: no selected gradient points along Delta at all, so that every weight is 0.
    """
    ascending = np.argsort(order)
    matrix = vectors(rows.take(order[ascending]), kind).reshape(order.size, -1).T
    wanted = np.tile(rows.target, rows.n_checkpoints)
    if matrix.shape[0] > matrix.shape[1]:  # an orthogonal change of basis leaves the minimum where it is
        basis, matrix = np.linalg.qr(matrix)
        wanted = basis.T @ wanted
    size = np.linalg.norm(matrix, axis=0).max() or 1.0
    found, _ = nnls(matrix / size, wanted / (np.linalg.norm(wanted) or 1.0))
    if not found.any():
        raise UserError(
            "select.weights=nnls: no selected gradient points along Delta, so every weight would be 0; use "
            "select.weights=equal."
        )
    weights = np.empty(order.size)
    weights[ascending] = found / found.mean()
    return weights
