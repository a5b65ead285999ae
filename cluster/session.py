"""Connecting to Ray: join the cluster a job runs on, or start a private local one; stop only what we started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
from ray.util.annotations import RayDeprecationWarning

from engine.errors import UserError
from engine.spec import Ray

SHAPES_KEPT = "64"
"""Shapes whose compiled products a worker keeps: those of the last few batches."""

PATIENCE = 15.0
"""Seconds that a head, which may be starting, has to answer; Ray 2.60 itself tries for a quarter of an hour."""

TOKEN = (
    "it asks for a token: set RAY_AUTH_TOKEN to the cluster's (on its head: ray get-auth-token), or put it into "
    "~/.ray/auth_token"
)
"""What Ray says in three lines of a client without the right token."""


@contextlib.contextmanager
def session(settings: Ray, verbose: bool = False) -> Iterator[None]:
    """A Ray connection for the length of a block.

    An existing connection of this process is used as it is. With `settings.address`, or inside a submitted
    job (RAY_ADDRESS), the cluster there is joined; it is never shut down. Otherwise a local instance is
    started, bound to localhost, and stopped at the end.

    Raises:
        UserError: no cluster at the address, or no token for it.
    """
    with contextlib.nullcontext() if verbose else without_raylet(), _connection(settings, verbose):
        yield


@contextlib.contextmanager
def _connection(settings: Ray, verbose: bool) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    _quiet(verbose)
    on_term = signal.getsignal(signal.SIGTERM)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _knock(address, verbose)
            ray.init(
                address=address,
                log_to_driver=verbose,
                logging_level=_level(verbose),
                runtime_env=worker_env(),
            )
        else:
            _start_local(settings, verbose)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot connect to Ray at {address or 'this machine'}: {first}") from None
    if callable(on_term) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray has put its own in place, which leaves at once
    try:
        yield
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        _end_streams()
        ray.shutdown()


def _end_streams() -> None:
    """Wait, `PATIENCE` at most, until the threads that Ray Data reads a stream with have ended.

    What was stopped in the midst of a stream leaves them behind, and one that asks Ray for something after
    `ray.shutdown` ends the whole process on the spot: without a word, with exit code 1, the run's lock left behind.
    """
    if "ray.data" not in sys.modules:
        return  # seconds to import, and nobody has read a stream
    from ray.data._internal.block_batching.util import WaitBlockPrefetcher
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    deadline = time.monotonic() + PATIENCE
    for thread in threading.enumerate():
        work = getattr(thread, "_target", None)
        if not any(str(getattr(of, "__module__", "")).startswith("ray.data.") for of in (thread, work)):
            continue
        with contextlib.suppress(
            Exception
        ):  # what led here is to be said, not what a lost cluster says of it
            if isinstance(thread, StreamingExecutor):
                thread.shutdown(force=True)
            if isinstance(reader := getattr(work, "__self__", None), WaitBlockPrefetcher):
                reader.stop()
        thread.join(max(0.0, deadline - time.monotonic()))


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames that an error has left hold, and those of what led to it, while Ray is still there.

    An executor of Ray Data's that was being started is one such thing. It ends when it is dropped, and asks Ray for
    something then: after `ray.shutdown` that would start or join another Ray, in the midst of any line of ours.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def gpus_per_worker(asked: float | None) -> float:
    """GPUs a worker gets: as asked, by default one where the cluster has any, or is known to be able to start one."""
    from cluster.resources import could_have_gpus

    return asked if asked is not None else float(could_have_gpus())


def worker_env() -> dict[str, dict[str, str]]:
    """Environment of every worker: no thread pool may take the whole machine, no progress bars in logs.

    On a CPU torch and oneDNN each keep what they compiled for the last 1,024 shapes of a 16-bit product, and every
    batch has shapes of its own: hundreds of megabytes that no later batch uses (docs/decisions.md).
    """
    return {
        "env_vars": {
            "OMP_NUM_THREADS": "1",
            "LRU_CACHE_CAPACITY": SHAPES_KEPT,
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": SHAPES_KEPT,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
    }


def _knock(address: str, verbose: bool) -> None:
    """Ask a head for an answer before `ray.init` does, which tries again and again whatever is wrong.

    Raises:
        ConnectionError: nobody answers there, or not without a (right) token.
    """
    if "://" in address or address == "local":
        return  # Ray Client has limits of its own, and a local instance is not there yet
    head = canonicalize_bootstrap_address(address)
    if head is None:
        return  # `auto`, and none is known: Ray says so at once
    for each in dict.fromkeys([head if address == "auto" else address, head]):
        _answer(each)
        try:
            with contextlib.nullcontext() if verbose else _without_stderr():
                GcsClient(address=each)
        except AuthenticationError:
            raise ConnectionError(TOKEN) from None


def _answer(address: str) -> None:
    """Wait until something listens at HOST:PORT, `PATIENCE` seconds at most; ConnectionError."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"nobody answers there ({error.strerror or error})") from None
            time.sleep(0.5)


def _start_local(settings: Ray, verbose: bool) -> None:
    try:
        with contextlib.nullcontext() if verbose else _without_stderr(), _loopback():
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=_level(verbose),
                object_store_memory=settings.object_store_mb << 20,
                runtime_env=worker_env(),
            )
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray 2.60 has no class for it
            raise
        raise ConnectionError(
            "its processes did not answer within 30 seconds, as on a machine that other work keeps busy: the same "
            "command tries again."
        ) from None


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Have the instance that is started in the block listen on 127.0.0.1 alone, as Ray's do on macOS.

    On Linux they listen on every interface: Ray 2.60 turns a loopback address that it is given into the host's
    own, and has no other setting (tests/faults/test_security.py looks at the sockets).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Close the process's stderr to Ray's C++ while it starts: it announces its own log level there."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextlib.contextmanager
def without_raylet() -> Iterator[None]:
    """Keep what the raylet has to say off stdout in the block: `log_to_driver` (Ray 2.60) does not stop it.

    It tells of each worker that an ended stream lets go; what a user has to know of it, our own sentences say.
    """
    before = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = before


def _level(verbose: bool) -> int:
    return logging.INFO if verbose else logging.ERROR


def _quiet(verbose: bool) -> None:
    if not verbose:
        os.environ.setdefault("RAY_DEDUP_LOGS", "1")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ writes to our stderr
        # The replacement it names does not exist for max_restarts and max_task_retries (Ray 2.60).
        warnings.filterwarnings("ignore", category=RayDeprecationWarning, message=".*ray_remote_args")
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
