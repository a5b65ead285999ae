"""The view of a store that a selection sees: another target, preconditioned rows, some of the checkpoints.

A view changes what is asked, never the store: every strategy, the certificate and the shards work on it as on
the store itself, because all it does to a row is one float32 product a number, which no batch can change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.rows import RowBlock, Rows
from engine.select.objective import Floats, stream, vectors
from engine.spec import Select

FLOOR = 1e-6
"""Second moments below this share of their mean are taken for that much: Adam's epsilon, free of units."""


class View:
    """Rows of a store with another target and, with `scale`, every number times its column's.

    Args:
        rows: the store.
        target: (d,) float64 in place of the store's.
        scale: (d,) float32, or None for rows as they are.
        checkpoints: numbers of those that are seen, ascending; None: all.
    """

    def __init__(
        self,
        rows: Rows,
        target: Floats,
        scale: npt.NDArray[np.float32] | None = None,
        checkpoints: list[int] | None = None,
    ) -> None:
        self.store, self.target, self.scale, self.checkpoints = rows, target, scale, checkpoints
        self.n_checkpoints = rows.n_checkpoints if checkpoints is None else len(checkpoints)
        self.n_rows, self.dim = rows.n_rows, rows.dim
        self.block_rows, self.chunk_rows = rows.block_rows, rows.chunk_rows

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """See `engine.rows.Rows.valid`."""
        return self.store.valid

    def read(self, start: int, stop: int) -> RowBlock:
        """See `engine.rows.Rows.read`."""
        return self._seen(self.store.read(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """See `engine.rows.Rows.take`."""
        return self._seen(self.store.take(rows))

    def towards(self, target: Floats) -> View:
        """The same rows with another target."""
        return View(self.store, target, self.scale, self.checkpoints)

    def _seen(self, block: RowBlock) -> RowBlock:
        features, lengths = block.features, block.scale
        if self.checkpoints is not None:
            features, lengths = features[self.checkpoints], lengths[self.checkpoints]
        if self.scale is not None:
            features = features.astype(np.float32) * self.scale
        return RowBlock(features, lengths, block.valid)


def view_of(rows: Rows, spec: Select, fractions: list[float] | None = None) -> Rows:
    """The rows that a selection works on; the store itself where nothing is asked for, a view as it is.

    target=negative: -Delta. target=random: a Gaussian direction of Delta's norm, from select.seed. Both are the
    negative control of docs/method.md. precondition=second_moment: ``g_c / sqrt(v_c)`` with v_c the mean square of
    coordinate c over valid rows and checkpoints, the direction an Adam step takes (Kingma & Ba 2015), since
    Delta was made of such steps and raw gradients were not. checkpoints: only those of the store's `fractions`.

    Raises:
        UserError: `spec.checkpoints` names one that the store does not have.
    """
    if isinstance(rows, View):
        return rows
    if spec.target == "delta" and spec.precondition == "none" and spec.checkpoints is None:
        return rows
    view = View(rows, target_of(rows.target, spec), None, _checkpoints(spec, fractions))
    if spec.precondition == "second_moment":
        moment = second_moment(view)
        floor = FLOOR * float(moment.mean())
        view.scale = (1.0 / np.sqrt(np.maximum(moment, floor if floor > 0 else 1.0))).astype(np.float32)
    return view


def _checkpoints(spec: Select, fractions: list[float] | None) -> list[int] | None:
    """Numbers of the checkpoints that `spec` asks for, ascending."""
    if spec.checkpoints is None:
        return None
    known = fractions or []
    absent = sorted(set(spec.checkpoints).difference(known))
    if absent:
        has = f"has {', '.join(f'{f:g}' for f in known)}" if known else "has no fractions"
        raise UserError(
            f"select.checkpoints asks for {', '.join(f'{f:g}' for f in absent)}, and the store {has}: choose of those, "
            "or extract with other gradients.checkpoints."
        )
    return [known.index(f) for f in sorted(spec.checkpoints)]


def second_moment(rows: Rows) -> Floats:
    """Mean square of each coordinate over valid rows and checkpoints, (d,), in one streaming pass."""
    total, count = np.zeros(rows.dim), 0
    for _, piece in stream(rows):
        g = vectors(piece, "raw")[piece.valid]
        total += np.square(g).sum(axis=(0, 1))
        count += g.shape[0] * g.shape[1]
    return total / max(1, count)


def target_of(delta: Floats, spec: Select) -> Floats:
    """The direction that `spec.target` names, (d,), from Delta."""
    if spec.target == "negative":
        return -delta
    if spec.target == "random":
        direction = np.random.default_rng([spec.seed, delta.size]).normal(size=delta.size)
        return np.asarray(direction * (np.linalg.norm(delta) / np.linalg.norm(direction)))
    return delta
