"""The one exception a user may see: a sentence that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import sys


class UserError(Exception):
    """A mistake in the input or the environment, not in the program.

    The command line prints the message alone and exits with code 2, so the message must stand by itself:
    what is wrong, where it was found, and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without a full stop, to be part of a sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")


def install(extra: str) -> str:
    """The command that installs an extra of ours into the very Python that runs this."""
    return f"{sys.executable} -m pip install 'unbake[{extra}]'"
