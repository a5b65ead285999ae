"""Rows of one shard file on a local disk, read without Zarr's machinery, which costs more than the read.

Layout (Zarr v3, sharding_indexed): inner chunks of `chunk_rows` rows, little-endian, each followed by its
CRC32C; at the end one (offset, length) pair of uint64 a chunk and the CRC32C of those. Certified greedy wants
a few single rows a pick: a chunk is read whole and checked when it is first touched, later only the rows asked.
Its passes want all rows in order: chunks are read to where they belong, and always checked.
"""

from __future__ import annotations

import os

import google_crc32c
import numpy as np
import numpy.typing as npt

_CRC = 4  # bytes of a CRC32C
_ABSENT = np.iinfo(np.uint64).max


class ShardRows:
    """Rows of a shard of float16 features (rows, dim).

    Args:
        path: the shard's file. chunk_rows: rows of an inner chunk, a divisor of the shard's.

    Raises:
        ValueError, OSError: the index is damaged or the file cannot be read.
    """

    def __init__(self, path: str, shard_rows: int, chunk_rows: int, dim: int) -> None:
        self.path, self.chunk_rows, self.dim = path, chunk_rows, dim
        chunks = shard_rows // chunk_rows
        with open(path, "rb") as file:
            file.seek(-(16 * chunks + _CRC), os.SEEK_END)
            index = file.read()
        if google_crc32c.value(index[:-_CRC]) != int.from_bytes(index[-_CRC:], "little"):
            raise ValueError(_mismatch("index", path))
        self._at, self._length = np.frombuffer(index[:-_CRC], "<u8").reshape(chunks, 2).T
        self._checked = np.zeros(chunks, np.bool_)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """The given rows of the shard (n, dim), ascending.

        Raises:
            ValueError, OSError: a chunk is missing, fails its checksum or cannot be read.
        """
        out = np.empty((rows.size, self.dim), np.float16)
        row_bytes = 2 * self.dim
        with open(self.path, "rb", buffering=0) as file:
            chunks, first = np.unique(rows // self.chunk_rows, return_index=True)
            for chunk, low, high in zip(
                chunks.tolist(), first.tolist(), [*first[1:].tolist(), rows.size], strict=True
            ):
                inside = (rows[low:high] - chunk * self.chunk_rows).tolist()
                if not self._checked[chunk]:
                    out[low:high] = self._chunk(file.fileno(), chunk)[inside]
                    continue
                for place, row in enumerate(inside, low):
                    data = os.pread(file.fileno(), row_bytes, int(self._at[chunk]) + row * row_bytes)
                    out[place] = np.frombuffer(data, "<f2")
        return out

    def read(self, start: int, out: npt.NDArray[np.float16]) -> None:
        """Rows start, start + 1, ... of the shard into `out` (n, dim), contiguous.

        Raises:
            ValueError, OSError: a chunk is missing, fails its checksum or cannot be read.
        """
        low = 0
        with open(self.path, "rb", buffering=0) as file:
            while low < len(out):
                chunk, first = divmod(start + low, self.chunk_rows)
                high = min(len(out), low + self.chunk_rows - first)
                if high - low == self.chunk_rows:
                    self._chunk_into(file.fileno(), chunk, out[low:high])
                else:
                    out[low:high] = self._chunk(file.fileno(), chunk)[first : first + high - low]
                low = high

    def _chunk_into(self, file: int, chunk: int, out: npt.NDArray[np.float16]) -> None:
        """A whole chunk into `out` (chunk_rows, dim), its checksum compared."""
        if self._at[chunk] == _ABSENT:
            raise ValueError(f"chunk {chunk} of {self.path} was never written")
        data, check = out.reshape(-1).view(np.uint8), bytearray(_CRC)
        got = os.preadv(file, [data.data, check], int(self._at[chunk]))
        if got != self._length[chunk] or google_crc32c.value(data) != int.from_bytes(check, "little"):
            raise ValueError(_mismatch(f"chunk {chunk}", self.path))
        self._checked[chunk] = True

    def _chunk(self, file: int, chunk: int) -> npt.NDArray[np.float16]:
        """A whole chunk (chunk_rows, dim), its checksum compared."""
        out = np.empty((self.chunk_rows, self.dim), np.float16)
        self._chunk_into(file, chunk, out)
        return out


def _mismatch(what: str, path: str) -> str:
    return f"the checksum of {what} of {path} does not match its data"
