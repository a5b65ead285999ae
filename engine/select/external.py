"""Features that a user brings, used exactly as given: a matrix in a file, or the store of bergson or TRAK.

Of those stores the format is read, none of their code: bergson's is a folder with `gradients.bin`, row after
row, and `info.json` with its shape and type; TRAK's a folder per model with `grads.mmap`, an .npy file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from engine.errors import UserError, first_line
from engine.rows import RowBlock, Rows

Matrix = npt.NDArray[np.floating]
TYPES = ("float16", "float32", "bfloat16")
MEAN_ROWS = 4096
"""Rows read at once where a target is the mean of rows."""


class FileRows:
    """Rows (docs/method.md, step 5) of one checkpoint, scale 1, all valid, read from a matrix on disk when asked.

    Pages are read, not mapped, so resident memory is what is asked for and not what was touched.
    """

    def __init__(self, name: str, matrix: _FileMatrix | _ZarrMatrix, target: npt.NDArray[np.float64]) -> None:
        """Args: matrix: (N, d) float16 or float32; target: (d,)."""
        self._name, self._matrix = name, matrix
        self.n_checkpoints, self.n_rows, self.dim = 1, int(matrix.shape[0]), int(matrix.shape[1])
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


class _FileMatrix:
    """A matrix in a file, row after row, read with pread so that several threads can share it.

    Args:
        shape: (rows, dim).
        kind: float16, float32 or bfloat16; numpy has no bfloat16, so its rows come as float32, exactly.
        offset: bytes before the first row.
    """

    chunk_rows = 1

    def __init__(self, path: str, shape: tuple[int, ...], kind: str, offset: int = 0) -> None:
        self.shape, self._path, self._offset = shape, path, offset
        self._stored = np.dtype(np.uint16 if kind == "bfloat16" else kind)
        self.dtype = np.dtype(np.float32 if kind == "bfloat16" else kind)
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, start: int, stop: int) -> Matrix:
        out = np.empty((stop - start, self.shape[1]), self._stored)
        self._fill(out, start)
        return self._numbers(out)

    def take(self, rows: npt.NDArray[np.int64]) -> Matrix:
        out = np.empty((rows.size, self.shape[1]), self._stored)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for first, last in zip(starts, np.append(starts[1:], rows.size), strict=True):
            self._fill(out[first:last], int(rows[first]))
        return self._numbers(out)

    def _numbers(self, stored: npt.NDArray[Any]) -> Matrix:
        """bfloat16 is the upper half of a float32."""
        if stored.dtype == self.dtype:
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)

    def _fill(self, out: npt.NDArray[Any], row: int) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY)
        view = out.reshape(-1).view(np.uint8).data
        offset, done = self._offset + row * self.shape[1] * self._stored.itemsize, 0
        while done < len(view):
            got = os.preadv(self._file, [view[done:]], offset + done)
            if got == 0:
                raise UserError(f"{self._path} is shorter than its header says: write it again.")
            done += got


class _ZarrMatrix:
    """A Zarr array."""

    def __init__(self, path: str) -> None:
        self._array = zarr.open_array(path, mode="r")
        filters = getattr(self._array.metadata, "filters", None) or ()  # of Zarr format 2
        for codec in (*filters, getattr(self._array.metadata, "compressor", None)):
            if getattr(codec, "codec_id", "") == "pickle":
                raise UserError(
                    f"{path} holds pickles, which are not read: write it again without that codec."
                )
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self.chunk_rows = int(self._array.chunks[0])

    def read(self, start: int, stop: int) -> Matrix:
        return np.asarray(self._array[start:stop])

    def take(self, rows: npt.NDArray[np.int64]) -> Matrix:
        return np.asarray(self._array.oindex[rows])


def open_features(features: str, target: str) -> Rows:
    """Open rows and target that a user brings, without copying or converting them.

    Args:
        features: (rows, dim), float16 or float32: an .npy file, a Zarr array (any URI Zarr opens), a folder
            that bergson wrote (bfloat16 too), or TRAK's folder of a model.
        target: the direction that the rows are to sum to, (dim,): an .npy file; of rows, (n, dim), in any of
            the forms above, their mean.

    Raises:
        UserError: a file is missing, unreadable, or of another type or shape; the two do not fit; the target
            is not finite. Rows that are not finite are reported when they are read.
    """
    matrix = _opened(_matrix, features)
    vector = _opened(_vector, target)
    if vector.size != matrix.shape[1]:
        raise UserError(
            f"{target} has {vector.size} numbers, but the rows of {features} have {matrix.shape[1]}."
        )
    if not np.isfinite(vector).all():
        raise UserError(f"{target} holds numbers that are not finite.")
    return FileRows(features, matrix, vector)


def _matrix(path: str) -> _FileMatrix | _ZarrMatrix:
    """A matrix in any of the forms; UserError or what numpy and zarr raise."""
    matrix: _FileMatrix | _ZarrMatrix
    if os.path.isfile(os.path.join(path, "info.json")):
        matrix = _bergson(path)
    elif path.rstrip("/").endswith(".zarr"):
        matrix = _ZarrMatrix(path)
    elif os.path.isdir(path):
        matrix = _npy(_trak(path))
    else:
        matrix = _npy(path)
    if len(matrix.shape) != 2 or 0 in matrix.shape or matrix.dtype not in (np.float16, np.float32):
        raise _not_a_matrix(path, matrix.dtype, matrix.shape)
    return matrix


def _not_a_matrix(path: str, kind: Any, shape: Any) -> UserError:
    return UserError(
        f"{path} must be a matrix (rows, dim) of float16 or float32, but it is {kind} of shape {tuple(shape)}."
    )


def _vector(path: str) -> npt.NDArray[np.float64]:
    """A target: a vector in an .npy file, or the mean of the rows of a matrix."""
    if os.path.isfile(path):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.ndim not in (1, 2) or found.dtype.kind != "f":
            raise UserError(
                f"{path} must be a vector (dim,) of float16, float32 or float64, or rows to take the mean of."
            )
        if found.ndim == 1:
            return np.array(found, np.float64)
    matrix = _matrix(path)
    total = np.zeros(matrix.shape[1])
    for start in range(0, matrix.shape[0], MEAN_ROWS):
        total += matrix.read(start, min(start + MEAN_ROWS, matrix.shape[0])).astype(np.float64).sum(axis=0)
    return total / matrix.shape[0]


def _npy(path: str) -> _FileMatrix:
    """An .npy file, whatever it is called."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.memmap):
        raise ValueError("it is not a plain .npy file")
    if mapped.ndim != 2 or mapped.dtype not in (np.float16, np.float32):
        raise _not_a_matrix(path, mapped.dtype, mapped.shape)
    if not mapped.flags.c_contiguous:
        raise UserError(f"{path} is stored column by column: save it again with numpy.ascontiguousarray.")
    return _FileMatrix(path, mapped.shape, mapped.dtype.name, mapped.offset)


def _bergson(folder: str) -> _FileMatrix:
    """The gradients of a folder that bergson wrote: one row a document, its modules side by side."""
    if os.path.isfile(os.path.join(folder, "offsets.npy")):
        raise UserError(f"{folder} holds a gradient a token: build it again with one a document.")
    with open(os.path.join(folder, "info.json"), encoding="utf-8") as file:
        info = json.load(file)
    try:
        shape = int(info["num_grads"]), sum(int(size) for size in info["grad_sizes"].values())
        kind = str(info["base_dtype"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{folder}/info.json does not have num_grads, grad_sizes and base_dtype: bergson 0.4 or newer writes "
            "them; save the gradients as .npy from an older one."
        ) from None
    path = os.path.join(folder, "gradients.bin")
    if kind not in TYPES:
        raise _not_a_matrix(path, kind, shape)
    matrix = _FileMatrix(path, shape, kind)
    wanted = shape[0] * shape[1] * (4 if kind == "float32" else 2)
    if os.path.getsize(path) != wanted:
        raise UserError(
            f"{path} has {os.path.getsize(path):,} bytes, and info.json says {wanted:,}: build it again."
        )
    return matrix


def _trak(folder: str) -> str:
    """The file of projected gradients in a folder of TRAK's: that of one model, or of a store of one model."""
    models = [name for name in sorted(os.listdir(folder)) if os.path.isfile(f"{folder}/{name}/grads.mmap")]
    if len(models) > 1:
        raise UserError(
            f"{folder} has the gradients of {len(models)} models, each with its own projection: give one, such as "
            f"{folder}/{models[0]}."
        )
    own = os.path.join(folder, models[0]) if models else folder.rstrip("/")
    path = os.path.join(own, "grads.mmap")
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} is neither a folder of bergson's (info.json) nor of TRAK's (grads.mmap): give an .npy file, a "
            "Zarr array, or, where TRAK's gradients were deleted, its features.mmap."
        )
    parent, name = os.path.split(os.path.abspath(own))
    record = os.path.join(parent, f"id_{name}.json")
    if os.path.isfile(record):
        with open(record, encoding="utf-8") as file:
            done = int(json.load(file)[name]["total_num_featurized"])
        rows = np.load(path, mmap_mode="r", allow_pickle=False).shape[0]
        if done != rows:
            raise UserError(
                f"{own} is unfinished: {done:,} of {rows:,} rows were computed; the others are zero."
            )
    return path


def _opened(opener: Callable[[str], Any], path: str) -> Any:
    try:
        return opener(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} does not exist.") from None
    except Exception as error:  # numpy, json and zarr raise many types for a file that is not theirs
        raise UserError(f"cannot read {path}: {first_line(error)}.") from None
