"""SIGTERM is one exception in the main thread, wherever it hits, and only once."""

from __future__ import annotations

import os
import signal

import pytest

from jobs.stopping import Stopped, stoppable


def test_the_first_sigterm_stops_and_the_next_ones_leave_cleaning_up_alone() -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Stopped, match="stopped by SIGTERM"), stoppable():
        interrupted()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("hidden", [Stopped("stopped by SIGTERM"), KeyboardInterrupt()])
def test_a_stop_that_c_code_turned_into_a_system_error_is_a_stop(hidden: BaseException) -> None:
    with pytest.raises(type(hidden)), stoppable():
        raise SystemError("returned a result with an exception set") from hidden


def test_another_system_error_stays_what_it_is() -> None:
    with pytest.raises(SystemError, match="something else"), stoppable():
        raise SystemError("something else") from ValueError()
