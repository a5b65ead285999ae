"""Rows: read access to projected gradients, the one thing that selection asks of a store.

A row i at checkpoint j is ``g_ij = scale_ij * feature_ij`` (docs/method.md, steps 4 and 5). Selection reads rows
through this interface alone, so a Zarr store, an .npy file and an array in memory select alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RowBlock:
    """Consecutive or gathered rows.

    features: (P, n, d) float16 or float32; scale: (P, n) float32; valid: (n,) bool, False for rows that
    are missing or quarantined and must never be selected.
    """

    features: npt.NDArray[np.floating]
    scale: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]

    def exact(self, checkpoint: int) -> npt.NDArray[np.float64]:
        """The rows themselves, (n, d) float64; the product of a float16 or float32 and a float32 is exact."""
        return (
            self.features[checkpoint].astype(np.float64) * self.scale[checkpoint].astype(np.float64)[:, None]
        )


class Rows(Protocol):
    """N rows of d numbers at P checkpoints, and the projected target Delta = theta_0 - theta_f."""

    @property
    def n_checkpoints(self) -> int:
        """P."""

    @property
    def n_rows(self) -> int:
        """N, valid or not."""

    @property
    def dim(self) -> int:
        """d."""

    @property
    def block_rows(self) -> int:
        """Rows of a partition: the unit of a streaming read. Blocks start at multiples of it."""

    @property
    def chunk_rows(self) -> int:
        """Rows that the storage reads together (an inner chunk): the unit of a random read."""

    @property
    def target(self) -> npt.NDArray[np.float64]:
        """Projected Delta, (d,) float64, the same for every checkpoint."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) bool, as in `RowBlock`; read without the rows."""

    def read(self, start: int, stop: int) -> RowBlock:
        """Rows start..stop-1, one sequential read."""

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """The given rows (ascending, distinct), in that order; rows of one chunk are read together."""


class ArrayRows:
    """Rows over an array or memory map, used exactly as given, without a copy.

    Args:
        features: (N, d) or (P, N, d), float16 or float32.
        target: (d,).
        scale: (P, N) float32; default 1.
        valid: (N,) bool; default all True.
        block_rows: rows read together when streaming.

    Raises:
        ValueError: shapes do not fit together.
    """

    def __init__(
        self,
        features: npt.NDArray[np.floating],
        target: npt.NDArray[np.floating],
        scale: npt.NDArray[np.float32] | None = None,
        valid: npt.NDArray[np.bool_] | None = None,
        block_rows: int = 4096,
    ) -> None:
        self._features = features[None] if features.ndim == 2 else features
        if self._features.ndim != 3:
            raise ValueError(f"features must be (rows, dim) or (P, rows, dim), got shape {features.shape}")
        p, n, d = self._features.shape
        if target.shape != (d,):
            raise ValueError(f"target has shape {target.shape}, features have dim {d}")
        self._scale = np.ones((p, n), np.float32) if scale is None else scale
        self.valid = np.ones(n, np.bool_) if valid is None else valid
        self.n_checkpoints, self.n_rows, self.dim = p, n, d
        self.block_rows, self.chunk_rows = block_rows, 1
        self.target: npt.NDArray[np.float64] = np.asarray(target, np.float64)

    def read(self, start: int, stop: int) -> RowBlock:
        """See `Rows.read`."""
        stop = min(stop, self.n_rows)
        return RowBlock(self._features[:, start:stop], self._scale[:, start:stop], self.valid[start:stop])

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """See `Rows.take`."""
        return RowBlock(self._features[:, rows], self._scale[:, rows], self.valid[rows])
