"""Features that a user brings: a matrix in an .npy file or a Zarr array, used exactly as given."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from engine.errors import UserError
from engine.rows import RowBlock, Rows

Matrix = npt.NDArray[np.floating]


class FileRows:
    """Rows (METHOD section 5) of one checkpoint, scale 1, all valid, read from a matrix on disk when asked.

    Pages are read, not mapped, so resident memory is what is asked for and not what was touched.
    """

    def __init__(self, name: str, matrix: _NpyMatrix | _ZarrMatrix, target: npt.NDArray[np.float64]) -> None:
        """Args: matrix: (N, d) float16 or float32; target: (d,)."""
        self._name, self._matrix = name, matrix
        self.n_checkpoints, (self.n_rows, self.dim) = 1, matrix.shape
        self.block_rows, self.chunk_rows = 4096, matrix.chunk_rows
        self.target = target
        self.valid = np.ones(self.n_rows, np.bool_)

    def read(self, start: int, stop: int) -> RowBlock:
        """See `Rows.read`; UserError when a number is not finite."""
        stop = min(stop, self.n_rows)
        return self._block(self._matrix.read(start, stop), np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """See `Rows.take`; UserError when a number is not finite."""
        return self._block(self._matrix.take(rows), rows)

    def _block(self, values: Matrix, rows: npt.NDArray[np.int64]) -> RowBlock:
        finite = np.isfinite(values)
        if not finite.all():
            bad = int(rows[np.flatnonzero(~finite.all(axis=1))[0]])
            raise UserError(f"{self._name}: row {bad} holds a number that is not finite; remove or mend it.")
        return RowBlock(values[None], np.ones((1, rows.size), np.float32), np.ones(rows.size, np.bool_))


class _NpyMatrix:
    """A C-ordered .npy file, read with pread so that several threads can share it."""

    chunk_rows = 1

    def __init__(self, path: str) -> None:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.memmap):
            raise ValueError("it is not a plain .npy file")
        self.shape, self.dtype = mapped.shape, mapped.dtype
        self.c_order = bool(mapped.flags.c_contiguous)
        self._offset, self._path = mapped.offset, path
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, start: int, stop: int) -> Matrix:
        out = np.empty((stop - start, self.shape[1]), self.dtype)
        self._fill(out, start)
        return out

    def take(self, rows: npt.NDArray[np.int64]) -> Matrix:
        out = np.empty((rows.size, self.shape[1]), self.dtype)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for first, last in zip(starts, np.append(starts[1:], rows.size), strict=True):
            self._fill(out[first:last], int(rows[first]))
        return out

    def _fill(self, out: Matrix, row: int) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY)
        view = out.reshape(-1).view(np.uint8).data
        offset, done = self._offset + row * self.shape[1] * self.dtype.itemsize, 0
        while done < len(view):
            got = os.preadv(self._file, [view[done:]], offset + done)
            if got == 0:
                raise UserError(f"{self._path} is shorter than its header says: write it again.")
            done += got


class _ZarrMatrix:
    """A Zarr array."""

    c_order = True

    def __init__(self, path: str) -> None:
        self._array = zarr.open_array(path, mode="r")
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self.chunk_rows = int(self._array.chunks[0])

    def read(self, start: int, stop: int) -> Matrix:
        return np.asarray(self._array[start:stop])

    def take(self, rows: npt.NDArray[np.int64]) -> Matrix:
        return np.asarray(self._array.oindex[rows])


def open_features(features: str, target: str) -> Rows:
    """Open rows and target that a user brings, without copying or converting them.

    Args:
        features: .npy file or Zarr array (any URI Zarr opens), (rows, dim), float16 or float32.
        target: .npy file, (dim,), float16, float32 or float64: the direction that the rows are to sum to.

    Raises:
        UserError: a file is missing, unreadable, or of another type or shape; the two do not fit; the target
            is not finite. Rows that are not finite are reported when they are read.
    """
    kind = _ZarrMatrix if features.rstrip("/").endswith(".zarr") else _NpyMatrix
    matrix = _opened(kind, features)
    if len(matrix.shape) != 2 or 0 in matrix.shape or matrix.dtype not in (np.float16, np.float32):
        raise UserError(
            f"{features} must be a matrix (rows, dim) of float16 or float32, "
            f"but it is {matrix.dtype} of shape {tuple(matrix.shape)}."
        )
    if not matrix.c_order:
        raise UserError(f"{features} is stored column by column: save it again with numpy.ascontiguousarray.")
    vector = _opened(lambda path: np.load(path, allow_pickle=False), target)
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind != "f":
        raise UserError(f"{target} must be a vector (dim,) of float16, float32 or float64.")
    if vector.size != matrix.shape[1]:
        raise UserError(
            f"{target} has {vector.size} numbers, but the rows of {features} have {matrix.shape[1]}."
        )
    if not np.isfinite(vector).all():
        raise UserError(f"{target} holds numbers that are not finite.")
    return FileRows(features, matrix, vector.astype(np.float64))


def _opened(opener: Any, path: str) -> Any:
    try:
        return opener(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # numpy and zarr raise many types for a file that is not theirs
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}."
        ) from None
