"""Joining a cluster: who does not answer, or not to us, is named in one sentence in seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import session
from cluster.session import _answer, _knock
from engine.errors import UserError
from engine.spec import Ray


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


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("verbose", [False, True])
def test_what_the_raylet_says_is_shown_only_if_asked_for(
    verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        session.ray_worker, "print_to_stdstream", lambda data, **_: said.extend(data["lines"])
    )
    with session.session(Ray(), verbose):
        session.ray_worker.print_to_stdstream({"lines": ["in"]}, ignore_prefix=False)
    session.ray_worker.print_to_stdstream({"lines": ["after"]}, ignore_prefix=False)
    assert said == (["in", "after"] if verbose else ["after"])


def test_a_machine_too_busy_to_start_ray_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "The current node timed out during startup. This could happen because some of the raylet failed"

    def late(**_: object) -> None:
        raise Exception(said)

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(UserError, match="its processes did not answer within 30 seconds"),
        session.session(Ray()),
    ):
        pass
    said = "another of Ray's own mistakes"
    with pytest.raises(Exception, match="another of"), session.session(Ray()):
        pass


def alone(script: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which it may end or leave in any state."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(session.__file__).parents[1],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


STOPPED_AS_IT_STARTS = """
import gc
import ray
import ray.data
from ray.data.iterator import DataIterator
from cluster.session import session
from engine.spec import Ray
from jobs.stopping import Stopped

def stop(*_, **__):
    raise Stopped("now")

def read():
    stream = ray.data.from_items([{"x": 1}, {"x": 2}], override_num_blocks=2).map(lambda row: row)
    for row in stream.iter_rows():
        print(row)

DataIterator._create_batch_iterator = stop  # the executor runs, and nobody has it in hand to end it
try:
    with session(Ray(num_cpus=2)):
        read()
except Stopped as error:
    kept = error  # as a traceback that is printed is kept
assert not ray.is_initialized()
del kept
gc.collect()
assert not ray.is_initialized()  # an executor that ends now would have started a Ray to ask
print("whole")
"""


STOPPED_AS_IT_READS = """
import threading
import time
import ray
import ray.data
from cluster.session import session
from engine.spec import Ray
from jobs.stopping import Stopped

def read():
    stream = ray.data.from_items([{"x": x} for x in range(64)], override_num_blocks=64)
    for row in stream.map(lambda row: row).iter_rows():
        ray._private.worker.global_worker.core_worker = Slow()
        raise Stopped("now")

class Slow:
    # as on a machine under load: others come first between the check for a connection and what needs it

    def __getattr__(self, name):
        return getattr(core, name)

    def get_objects(self, *arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            asking.set()
            time.sleep(4)
        return core.get_objects(*arguments, **options)

asking = threading.Event()
ended = ray.shutdown
def shutdown():
    assert asking.is_set()
    ended()
ray.shutdown = shutdown
try:
    with session(Ray(num_cpus=2)):
        core = ray._private.worker.global_worker.core_worker
        try:
            read()
        finally:
            asking.wait(20)
except Stopped as error:
    print("whole")
time.sleep(5)
"""


def test_a_stop_waits_for_what_still_reads_which_would_end_the_process_without_a_word() -> None:
    done = alone(STOPPED_AS_IT_READS)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


STOPPED_AS_IT_WAITS = """
import os
import signal
import threading
import time
import ray
from cluster.session import session
from engine.spec import Ray
from jobs.stopping import Stopped, stoppable

@ray.remote
def long():
    time.sleep(300)

try:
    with stoppable(), session(Ray(num_cpus=2)):
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ray.get(long.remote())  # in C++, as for a training or an index
except Stopped as error:
    print(error)
"""


def test_a_stop_does_not_wait_for_what_ray_waits_for() -> None:
    done = alone(STOPPED_AS_IT_WAITS)
    assert (done.returncode, done.stdout) == (0, "stopped by SIGTERM\n"), done.stderr


def test_a_stop_as_ray_data_starts_leaves_nothing_that_starts_another_ray() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    done = alone(STOPPED_AS_IT_STARTS, environ)
    assert done.stdout.endswith("whole\n"), done.stderr
    assert "Exception ignored" not in done.stderr
