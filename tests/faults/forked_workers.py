"""A Ray whose workers begin in a moment: each is forked from a process that has imported what takes seconds.

Such a worker runs Ray's own `default_worker.py`, with the arguments, environment, folder and outputs that the raylet
gave it, and dies like any other. Only Python and the libraries are there when it begins. A soak of kills is then
spent on the kills, and no longer on imports.

`python forked_workers.py head FOLDER` is the Ray; `python forked_workers.py ARGUMENTS`, which its raylet starts in
place of Ray's `setup_worker.py`, asks for a fork and ends.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOCKET = "UNBAKE_FORKED_WORKERS"
"""Environment variable: where the process that forks listens."""


@contextlib.contextmanager
def forked_ray() -> Iterator[str]:
    """Such a Ray on eight pretended CPUs, for the length of a block; its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # socket paths end at 107 bytes
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    environment |= {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    }
    head = subprocess.Popen(
        [sys.executable, __file__, "head", str(folder)], stdin=subprocess.PIPE, env=environment, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 300
        while not (folder / "address").exists():
            assert head.poll() is None, "the head has ended"
            assert time.monotonic() < deadline, "the head takes too long"
            time.sleep(0.1)
        yield (folder / "address").read_text()
    finally:
        head.communicate(timeout=60)  # the end of its input ends it
        shutil.rmtree(folder, ignore_errors=True)


def head(folder: str) -> None:
    """Be the Ray until the end of input."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ[SOCKET] = f"{folder}/fork"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ[SOCKET])
    listener.listen(64)
    forker = os.fork()
    if forker == 0:
        _serve(listener)
    listener.close()
    import ray
    from ray._private.parameter import RayParams

    RayParams.__init__ = _with_setup(RayParams.__init__)  # type: ignore[method-assign]
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        object_store_memory=200 << 20, _temp_dir=folder,
    )  # fmt: skip
    Path(folder, "new").write_text(str(ray.get_runtime_context().gcs_address))
    os.replace(f"{folder}/new", f"{folder}/address")
    sys.stdin.read()
    ray.shutdown()
    os.kill(forker, signal.SIGKILL)


def _with_setup(plain: Any) -> Any:
    """RayParams' constructor, with this file for what starts workers."""

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **{**options, "setup_worker_path": __file__})

    return init


def _serve(listener: socket.socket) -> None:
    """One worker for each order, for ever.

    Ray's C++ reads the number of the raylet's process, and that the worker is no job's yet, once: when it is
    imported. So it is imported in the environment of the first order, which is a worker's for any job.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        connection, _ = listener.accept()
        data, extra, *_ = connection.recvmsg(1 << 18, socket.CMSG_SPACE(8))
        order, outputs = json.loads(data), array.array("i", extra[0][2])
        if "faults.preload_workers" not in sys.modules:
            os.environ.update(order["environment"])
            import faults.preload_workers  # noqa: F401
        if os.fork() == 0:
            listener.close()
            connection.close()
            _become(order, list(outputs))
            runpy.run_path(order["arguments"][0], run_name="__main__")
            os._exit(0)
        connection.sendall(b"1")
        connection.close()
        for output in outputs:
            os.close(output)


def _become(order: dict[str, Any], outputs: list[int]) -> None:
    """Take a worker's place: its outputs, environment, folder and arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, opened in enumerate([nothing, *outputs]):
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv[:] = order["arguments"]


def ask() -> None:
    """In the process that the raylet starts: hand over what it was given, and end when there is a worker."""
    prefix = "--serialized-runtime-env-context="
    context = next((a.removeprefix(prefix) for a in sys.argv if a.startswith(prefix)), "{}")
    more = json.loads(context).get("env_vars") or {}
    arguments = [a for a in sys.argv[1:] if not a.startswith((prefix, "--language="))]
    order = {"arguments": arguments, "environment": {**os.environ, **more}, "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(os.environ[SOCKET])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))
        s.sendmsg([json.dumps(order).encode()], [rights])
        s.recv(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head(sys.argv[2])
    else:
        ask()
