"""The one exception a user may see: a sentence that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input or the environment, not in the program.

    The command line prints the message alone and exits with code 2, so the message must stand by itself:
    what is wrong, where it was found, and what to do about it.
    """


class StorageError(UserError):
    """Storage failed, after its client's own tries, in a way that may be over when the same is tried again."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without a full stop, to be part of a sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")


def nearest(word: str, known: Sequence[str], most: int = 1, likeness: float = 0.6) -> str:
    """`did you mean x or y`, of the known words that look like one that is not; empty where none does.

    Args:
        likeness: from 0, anything, to 1, the word itself (`difflib.get_close_matches`).
    """
    found = difflib.get_close_matches(word, known, most, likeness)
    return f"did you mean {' or '.join(found)}" if found else ""


def install(extra: str) -> str:
    """The command that installs an extra of ours into the very Python that runs this."""
    return f"{sys.executable} -m pip install 'unbake[{extra}]'"
