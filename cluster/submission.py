"""Jobs of a running cluster, over Ray's Job API: submit a spec with the code that runs it, follow, stop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.metadata
import importlib.util
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from engine.errors import UserError, first_line

PACKAGES = ("engine", "cluster", "jobs")
SPEC = "run.yaml"
STOPPED = 130
"""Exit code of a job that was stopped, as of a command that was interrupted."""


@dataclass(frozen=True)
class Work:
    """A job before it is submitted: a command for a shell, and the runtime_env that it runs in."""

    entrypoint: str
    environment: dict[str, Any]


class Cluster:
    """The Job API of a head.

    Args:
        address: of the dashboard, for example http://127.0.0.1:8265. A token is taken from RAY_AUTH_TOKEN,
            RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, as everywhere in Ray.

    Raises:
        UserError: nobody answers there, or not without a (right) token; so does every method.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"--address {address} is no dashboard: give http://HOST:8265, where HOST is the head."
            )
        self.address = address
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # they tell of uploads
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._errors():
            self._client = JobSubmissionClient(address)

    def submit(self, work: Work, run_dir: str) -> str:
        """Start a job; its id. What `carried` has packed is uploaded first."""
        with self._errors():
            return self._client.submit_job(
                entrypoint=work.entrypoint,
                runtime_env=work.environment,
                metadata={"unbake_run_dir": run_dir},
            )

    def follow(self, job: str, write: Callable[[str], None]) -> int:
        """Write a job's output as it comes, until it ends; its exit code (UserError where it failed without one)."""
        seen = 0
        while True:
            with self._errors(), contextlib.suppress(RuntimeError):  # the connection may break: begin again
                for text in self._tail(job, seen):
                    seen += len(text)
                    write(text)
            if self.status(job).is_terminal():
                rest = self.logs(job)[seen:]
                write(rest)
                return self._end(job)
            time.sleep(1)

    def _tail(self, job: str, skip: int) -> Iterator[str]:
        """The job's output from character `skip` on, while it lasts."""
        stream = self._client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while True:
                try:
                    text = runner.run(anext(stream))
                except StopAsyncIteration:
                    return
                yield text[skip:]
                skip = max(0, skip - len(text))

    def wait(self, job: str) -> int:
        """Wait for a job's end in silence; its exit code (UserError where it failed without one)."""
        while not self.status(job).is_terminal():
            time.sleep(1)
        return self._end(job)

    def _end(self, job: str) -> int:
        """Exit code of a job that has ended; a UserError where it failed without one, on a lost node for example."""
        with self._errors(job):
            info = self._client.get_job_info(job)
        if info.status == JobStatus.FAILED and info.driver_exit_code is None:
            raise UserError(f"{job} failed: {first_line(info.message or 'Ray does not say why')}")
        return self.exit_code(job)

    def status(self, job: str) -> JobStatus:
        """Where a job stands."""
        with self._errors(job):
            return self._client.get_job_status(job)

    def logs(self, job: str) -> str:
        """All that a job has written so far."""
        with self._errors(job):
            return self._client.get_job_logs(job)

    def message(self, job: str) -> str:
        """What Ray says of a job's state, in a line."""
        with self._errors(job):
            return first_line(self._client.get_job_info(job).message or "")

    def exit_code(self, job: str) -> int:
        """Of a job that has ended: its driver's, 130 if it was stopped, 1 if it never ran."""
        with self._errors(job):
            info = self._client.get_job_info(job)
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.status == JobStatus.STOPPED:
            return STOPPED
        return info.driver_exit_code or 1

    def stop(self, job: str) -> bool:
        """Ask a job to stop (SIGTERM, then SIGKILL); False if it had ended."""
        with self._errors(job):
            return self._client.stop_job(job)

    @contextlib.contextmanager
    def _errors(self, job: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"{self.address} asks for a token: set RAY_AUTH_TOKEN to the cluster's (on its head: "
                "ray get-auth-token), or put it into ~/.ray/auth_token."
            ) from None
        except ConnectionError as error:
            raise UserError(
                f"no Ray head answers at {self.address} ({first_line(error)}): is the dashboard's port open?"
            ) from None
        except RuntimeError as error:
            if job is not None and "404" in str(error):
                raise UserError(f"{self.address} knows no job {job}.") from None
            raise


def carried(spec_yaml: str, command: str, folder: Path, pip: bool) -> Work:
    """A job with the code that is here: our packages and the spec in a folder; nothing else of this machine travels.

    Args:
        command: of `python -m jobs`. Ray hands the entrypoint to a shell: it holds no other word of the user's.
        folder: is filled, and has to be there until the job is submitted.
        pip: install what unbake depends on into the job's environment; otherwise the cluster has it.
    """
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        shutil.copytree(
            Path(found.origin).parent, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    (folder / SPEC).write_text(spec_yaml, encoding="utf-8")
    environment: dict[str, Any] = {"working_dir": str(folder)}
    if pip:
        environment["pip"] = requirements()
    return Work(f"python -m jobs {command} {SPEC}", environment)


def in_image(spec_yaml: str, command: str, image: str) -> Work:
    """A job in a container of an image that has unbake in it (cluster/launch/Dockerfile); every node needs podman.

    Ray takes no uploaded files beside an image (2.60), so the spec travels in the command, in letters that mean
    nothing to a shell.
    """
    letters = base64.b64encode(spec_yaml.encode()).decode()
    write = f"spec=$(mktemp --suffix=.yaml) && echo {letters} | base64 -d > $spec"
    return Work(f"{write} && python -m jobs {command} $spec", {"image_uri": image})


def requirements() -> list[str]:
    """What unbake needs, as pip writes it; Ray itself is the cluster's."""
    names = importlib.metadata.requires("unbake") or []
    return [name for name in names if "extra ==" not in name and not name.startswith("ray")]
