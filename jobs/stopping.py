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
_asked = False


class Stopped(KeyboardInterrupt):
    """The process was asked to stop; its text says why.

    It is a KeyboardInterrupt because Ray, waiting in C++ for what may take hours, lets go for no other exception; a
    plain one is then what comes out.
    """


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM raise Stopped in the block; only the first one, so that cleaning up is not cut short.

    An exception that reaches C code in the midst of making an object comes out of it as a SystemError; the one
    behind it is then raised. A KeyboardInterrupt that Ray has made of the stop is one again.

    Raises:
        Stopped: the signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _asked
    before, _asked = signal.signal(signal.SIGTERM, _stop), False
    try:
        yield
    except (SystemError, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, SystemError) else error
        if not isinstance(cause, KeyboardInterrupt):
            raise
        raise Stopped(_why) if _asked else cause from None
    finally:
        signal.signal(signal.SIGTERM, before)


def request_stop(why: str) -> None:
    """Stop this process from any of its threads, as SIGTERM would."""
    global _why
    _why = why
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(_: int, __: FrameType | None) -> None:
    global _asked
    _asked = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(_why)
