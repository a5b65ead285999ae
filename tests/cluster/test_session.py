"""Joining a cluster: who does not answer, or not to us, is named in one sentence in seconds."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from cluster import session
from cluster.session import _answer, _knock


def free_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def test_where_nobody_listens_that_is_said_once_the_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"^nobody answers there \(Connection refused\)$"):
        _knock(free_address(), verbose=False)
    assert time.monotonic() - began < 5


def test_a_head_that_is_starting_is_waited_for() -> None:
    address = free_address()
    host, port = address.split(":")
    made: list[socket.socket] = []
    later = threading.Timer(0.7, lambda: made.append(socket.create_server((host, int(port)))))
    later.start()
    _answer(address)
    later.join()
    assert made
    made[0].close()


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:1"])
def test_what_is_no_address_of_a_head_is_left_to_ray(address: str) -> None:
    _knock(address, verbose=False)
