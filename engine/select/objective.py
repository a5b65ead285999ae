"""The one function that scores a candidate, in float64 and in an order of summation fixed by IEEE arithmetic.

``f(S) = mean_j cos(sum_{i in S} g_ij, Delta)`` with ``cos(0, .) = 0`` (docs/method.md, step 5). Sums over d are a
binary fold of elementwise additions, so neither BLAS, threads, shards nor the shape of a batch can change a
bit of a score: two searches that call `scores` and break ties alike pick alike, and that is what "identical"
means in this package.

Range: a stored row is float16 or float32 times a float32 scale, so its numbers are 0 or between 2^-298 and
2^256; squares of sums of up to 2^60 of them neither overflow nor underflow float64, and nothing is rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.ahead import ahead
from engine.errors import UserError
from engine.rows import RowBlock, Rows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
RowKind = Literal["raw", "unit"]

_BLOCK_NUMBERS = 1 << 16  # float64 numbers scored together: half a megabyte stays in the core's cache
_PIECE_NUMBERS = 1 << 21  # numbers of a store converted to float64 together


def fold(x: Floats) -> Floats:
    """Sum over the last axis in a fixed binary order; x is overwritten.

    The upper half is added to the lower one until one number is left, d counting as the next power of two
    (absent numbers are zeros). Error: at most ``ceil(log2 d) 2^-53 sum|x|`` to first order.
    """
    width = x.shape[-1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        x[..., : width - half] += x[..., half:width]
        width = half
    return x[..., 0].copy()


def norms(x: Floats) -> Floats:
    """Euclidean norms over the last axis, by `fold`."""
    return np.sqrt(fold(x * x))


def unit_target(target: Floats) -> Floats:
    """u = Delta / ||Delta||, (d,); UserError when Delta is zero or not finite."""
    largest = float(np.max(np.abs(target), initial=0.0))
    if not math.isfinite(largest):
        raise UserError(
            "the target (Delta) holds numbers that are not finite: the models or the projection failed."
        )
    if largest == 0.0:
        raise UserError(
            "the target (Delta) is zero: base and fine-tuned model do not differ on the chosen layers."
        )
    scaled: Floats = target / largest
    return np.asarray(scaled / norms(scaled))


def vectors(block: RowBlock, kind: RowKind) -> Floats:
    """The rows that are summed, (n, P, d) float64.

    raw: ``g_ij = scale_ij feature_ij``, an exact product. unit: the stored feature in float64 divided by its
    norm as `norms` computes it (features are of unit norm only up to float16 rounding, so this and not the
    feature is a unit row). A row whose scale or feature is zero stays zero.
    """
    features = block.features.transpose(1, 0, 2).astype(np.float64)
    scale = block.scale.T.astype(np.float64)[:, :, None]
    if kind == "raw":
        return np.asarray(features * scale)
    length = norms(features)[:, :, None]
    length[(length == 0) | (scale == 0)] = np.inf
    return np.asarray(features / length)


def scores(sums: Floats, rows: Floats, u: Floats) -> Floats:
    """f(S + i) of every candidate i: the canonical score.

    Args:
        sums: (P, d), sum of the rows of S at each checkpoint.
        rows: (n, P, d), candidates from `vectors`.
        u: (d,), from `unit_target`.

    Returns:
        (n,) float64: ``mean_j <s_j + g_ij, u> / ||s_j + g_ij||``, a zero sum contributing 0.
    """
    n, checkpoints, dim = rows.shape
    result = np.empty(n)
    step = max(1, _BLOCK_NUMBERS // (checkpoints * dim))
    for start in range(0, n, step):
        total = sums + rows[start : start + step]
        along = fold(total * u)
        total *= total
        length = np.sqrt(fold(total))
        cosines = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        mean = cosines[:, 0]
        for j in range(1, checkpoints):
            mean = mean + cosines[:, j]
        result[start : start + step] = mean / checkpoints
    return result


def rank(score: Floats, rows: Ints, size: int) -> Ints:
    """The `size` rows of largest score, best first; ties go to the lowest row."""
    return rows[np.lexsort((rows, -score))[:size]]


def stream(
    rows: Rows, start: int = 0, stop: int | None = None, only: Ints | None = None
) -> Iterator[tuple[slice, RowBlock]]:
    """Rows start..stop-1, partition by partition, in pieces small enough to be converted to float64.

    Args:
        only: rows, ascending; partitions that hold none of them are left out.

    Yields:
        (the piece's rows, the piece); one read serves all pieces of a partition.
    """
    stop = rows.n_rows if stop is None else stop
    step = max(1, _PIECE_NUMBERS // (rows.n_checkpoints * rows.dim))
    firsts = range(start - start % rows.block_rows, stop, rows.block_rows)
    spans = [(max(first, start), min(first + rows.block_rows, stop)) for first in firsts]
    if only is not None:
        held = np.searchsorted(only, np.array(spans))
        spans = [span for span, (low, high) in zip(spans, held.tolist(), strict=True) if low < high]
    for (begin, end), block in zip(spans, ahead(lambda span: rows.read(*span), spans), strict=True):
        for low in range(0, end - begin, step):
            part = slice(low, min(low + step, end - begin))
            piece = RowBlock(block.features[:, part], block.scale[:, part], block.valid[part])
            yield slice(begin + low, begin + part.stop), piece


def stream_scores(rows: Rows, kind: RowKind, sums: Floats, u: Floats, eligible: Bools) -> Floats:
    """Canonical scores of all eligible rows by one streaming pass, (N,); -inf where not eligible."""
    result = np.full(rows.n_rows, -np.inf)
    for part, piece in stream(rows):
        if eligible[part].any():
            result[part] = np.where(eligible[part], scores(sums, vectors(piece, kind), u), -np.inf)
    return result
