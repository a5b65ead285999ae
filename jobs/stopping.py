"""A clean stop: SIGTERM, which schedulers and spot machines send before they take a machine, as an exception."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""143, as a shell reports a process that SIGTERM ended."""

_why = "stopped by SIGTERM"


class Stopped(BaseException):
    """The process was asked to stop; its text says why."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM raise Stopped in the block; only the first one, so that cleaning up is not cut short.

    An exception that reaches C code in the midst of making an object comes out of it as a SystemError; the one
    behind it is then raised.

    Raises:
        Stopped: the signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Stopped | KeyboardInterrupt):
            raise error.__cause__ from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def request_stop(why: str) -> None:
    """Stop this process from any of its threads, as SIGTERM would."""
    global _why
    _why = why
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(_why)
