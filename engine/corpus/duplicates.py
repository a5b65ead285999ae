"""Duplicates: which documents of a corpus repeat an earlier one, exactly or nearly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.errors import UserError, install

SHINGLE = 5
"""Words of a shingle; shorter documents are one shingle."""

PERMUTATIONS, SIMILARITY = 128, 0.8
"""MinHash permutations, and the estimated Jaccard similarity of shingles from which documents are near."""


def first_copies(texts: Iterable[str], kind: Literal["exact", "near"]) -> npt.NDArray[np.int64]:
    """For every document the position of the earliest one it repeats; its own where it repeats none.

    exact: equal but for case and white space. near: exact, or an estimated Jaccard similarity of the sets of
    5-word shingles of at least 0.8 (Broder 1997; MinHash LSH by datasketch, seeded) to a document that was kept.
    Which documents are kept depends on their order, and on nothing else. Memory grows with the documents kept:
    by a digest each for exact, by a MinHash and its place in the index for near.

    Returns:
        (N,) int64, found[i] <= i.

    Raises:
        UserError: near without the package datasketch.
    """
    seen: dict[bytes, int] = {}
    near = _Near() if kind == "near" else None
    found: list[int] = []
    for position, text in enumerate(texts):
        words = text.casefold().split()
        key = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = seen.setdefault(key, position)
        if first == position and near is not None:
            first = near.first(words, position)
            seen[key] = first
        found.append(first)
    return np.array(found, np.int64)


class _Near:
    """An LSH index of the documents kept so far."""

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError(
                f"select.dedupe=near needs the package datasketch: {install('dedupe')}."
            ) from None
        self._minhash: Any = MinHash
        self._index: Any = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._kept: dict[int, Any] = {}

    def first(self, words: list[str], position: int) -> int:
        """The earliest kept document that this one is near to; itself, now kept, where there is none."""
        sketch = self._minhash(num_perm=PERMUTATIONS, seed=1)
        words = [bare for word in words if (bare := re.sub(r"\W+", "", word))]
        shingles = {
            " ".join(words[i : i + SHINGLE]).encode("utf-8", "surrogatepass")
            for i in range(max(1, len(words) - SHINGLE + 1))
        }
        sketch.update_batch(sorted(shingles))
        near = [
            other for other in self._index.query(sketch) if sketch.jaccard(self._kept[other]) >= SIMILARITY
        ]
        if near:
            return int(min(near))
        self._kept[position] = sketch
        self._index.insert(position, sketch)
        return position
