"""The same commands as submitted jobs: a real head, `ray job submit`, and a cluster that outlives the job."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from ray.runtime_env import RuntimeEnv

from cluster.submission import in_image
from engine.rundir import RunDir
from engine.store import GradientStore
from jobs.stopping import EXIT_CODE, Stopped
from jobs.submit import attend

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PORTS = (
    "port", "object-manager-port", "node-manager-port", "ray-client-server-port", "dashboard-port",
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip


TOKEN = secrets.token_hex(32)


def environment() -> dict[str, str]:
    """This Python first in the path, and no trace of another Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return {**kept, **token, "PATH": path, "OMP_NUM_THREADS": "1"}


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(address: str) -> bool:
    try:
        request = urllib.request.Request(
            f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A head of one's own, on free ports and in a folder of its own; its dashboard's address."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths end at 107 bytes
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--object-store-memory={150 << 20}"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = open(f"{folder}/start.log", "w")  # noqa: SIM115
    process = subprocess.Popen(
        command, env=environment(), stdout=log, stderr=log, start_new_session=True, cwd=folder
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        deadline = time.monotonic() + 300
        while not answers(address):
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()  # it stops what it started; should something stay, it is in its process group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: str, tiny_finetuned: str, tiny_corpus: str
) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    spec = {
        "run_dir": str(folder / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "extract": {"workers_max": 1, "threads": 1},
        "select": {"size": 16},
        "retrain": {"strategies": ["greedy"], "epochs": 1, "batch_size": 8, "threads": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def submit(head: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- python -m jobs ...` from the repository."""
    command = [
        str(RAY),
        "job",
        "submit",
        f"--address={head}",
        "--working-dir=.",
        "--",
        "python",
        "-m",
        "jobs",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow  # what `unbake submit` does below, by Ray's own command
def test_a_submitted_job_does_its_work_and_leaves_the_cluster_running(head: str, config: Path) -> None:
    done = submit(head, "extract", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    assert GradientStore.open(RunDir(str(config.parent / "run"))).read(0, 200).valid.all()
    assert answers(head)


def test_a_submitted_mistake_is_one_sentence_and_fails_the_job(head: str, config: Path) -> None:
    done = submit(head, "extract", "--config", str(config), "--gradients.dim", "8", "--gradients.seed", "-1")
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "unbake extract: " in text
    assert "gradients.seed" in text
    assert "Traceback" not in text


def unbake(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`unbake ...` from a folder that holds nothing."""
    command = [str(Path(sys.executable).parent / "unbake"), *arguments]
    kept = {**environment(), **environ}
    return subprocess.run(command, cwd="/", env=kept, capture_output=True, text=True, timeout=500)


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"^(raysubmit_\w+) is submitted", done.stderr, re.MULTILINE)
    assert found, done.stderr
    return found[1]


def test_submit_carries_the_code_and_the_spec_follows_and_returns_the_jobs_exit_code(
    head: str, config: Path
) -> None:
    run = config.parent / "run-submitted"
    where = ("--address", head, "--run_dir", str(run))
    done = unbake("submit", str(config), *where, "--command", "extract")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 documents" in done.stdout  # the job's own words
    assert GradientStore.open(RunDir(str(run))).read(0, 200).valid.all()
    job = job_of(done)
    assert "succeeded" in unbake("status", job, "--address", head).stdout
    assert "had ended" in unbake("stop", job, "--address", head).stdout
    state = unbake("status", str(run))
    assert "4 of 4 partitions" in state.stdout
    assert "nobody is at work" in state.stdout
    # the job refuses another dim for the same run directory: its sentence and its exit code come through
    refused = unbake("submit", str(config), *where, "--command", "extract", "--gradients.dim", "64")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "unbake extract: " in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_no_token_or_a_wrong_one_is_one_sentence_with_the_remedy(
    head: str, token: str, tmp_path: Path
) -> None:
    found = unbake("status", "any", "--address", head, RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert found.returncode == 2
    assert "asks for a token: set RAY_AUTH_TOKEN" in found.stderr
    assert "Traceback" not in found.stderr


def test_an_unknown_job_and_paths_of_this_machine_are_refused(head: str, config: Path) -> None:
    unknown = unbake("status", "raysubmit_none", "--address", head)
    assert unknown.returncode == 2
    assert "knows no job raysubmit_none" in unknown.stderr
    relative = unbake("submit", str(config), "--address", head, "--run_dir", "runs/here")
    assert relative.returncode == 2
    assert "run_dir = runs/here is relative" in relative.stderr


def test_without_following_nothing_of_the_job_is_shown_but_its_exit_code(head: str, config: Path) -> None:
    where = ("--address", head, "--run_dir", str(config.parent / "run-empty"), "--command", "report")
    done = unbake("submit", str(config), *where, "--no-follow")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr == f"{job_of(done)} is submitted; unbake status {job_of(done)} --address {head}\n"


def test_sigterm_leaves_the_job_running_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: str) -> int:
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    cluster = SimpleNamespace(wait=stop, address="http://head:8265")
    assert attend(cluster, "raysubmit_1", follow=False) == EXIT_CODE
    assert (
        capsys.readouterr().err
        == "\nraysubmit_1 goes on; unbake stop raysubmit_1 --address http://head:8265\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "ended"), [(None, "running"), ("n", "running"), ("y", "stopped")])
def test_ctrl_c_stops_the_job_only_where_somebody_says_so(
    head: str, config: Path, tmp_path: Path, answer: str | None, ended: str
) -> None:
    """Who is asked sits at a terminal; without one the job goes on."""
    run, said = config.parent / f"run-{answer}", tmp_path / "said"
    keyboard, stdin = pty.openpty()
    command = [str(Path(sys.executable).parent / "unbake"), "submit", str(config), "--run_dir", str(run)]
    with said.open("w") as file:
        following = subprocess.Popen(
            [*command, "--address", head], env=environment(), cwd="/", stdout=file, stderr=file,
            stdin=stdin if answer else subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs behind
        )  # fmt: skip
    wait_for(lambda: (run / "spec.yaml").exists())  # the job is at work
    following.send_signal(signal.SIGINT)
    if answer:
        wait_for(lambda: "too? [y/N]" in said.read_text())
        os.write(keyboard, f"{answer}\n".encode())
    assert following.wait(60) == 130, said.read_text()
    (job,) = re.findall(r"^(raysubmit_\w+) is submitted", said.read_text(), re.MULTILINE)
    assert ("goes on; unbake stop" in said.read_text()) == (ended == "running")
    assert "Traceback" not in said.read_text()
    if ended == "running":
        assert "running" in unbake("status", job, "--address", head).stdout
        unbake("stop", job, "--address", head)
    wait_for(lambda: "stopped" in unbake("status", job, "--address", head).stdout)
    os.close(keyboard), os.close(stdin)


def test_a_job_in_an_image_has_its_spec_from_the_command(config: Path, tmp_path: Path) -> None:
    """Ray takes the environment; the command is run here as the container's shell would run it."""
    text = yaml.safe_dump({**yaml.safe_load(config.read_text()), "run_dir": str(tmp_path / "it's $HOME")})
    work = in_image(text, "report", "registry/unbake:1")
    assert RuntimeEnv(**work.environment).image_uri() == "registry/unbake:1"
    done = subprocess.run(
        ["sh", "-c", work.entrypoint], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "it's $HOME" in done.stderr
    both = unbake("submit", str(config), "--address", "http://127.0.0.1:1", "--pip", "--image", "i")
    assert both.returncode == 2
    assert "not allowed with" in both.stderr


def test_a_job_that_cannot_begin_is_one_sentence(head: str, config: Path) -> None:
    """No node here has podman."""
    if shutil.which("podman"):
        pytest.skip("podman is here")
    run = str(config.parent / "run-image")
    done = unbake("submit", str(config), "--address", head, "--run_dir", run, "--image", "registry/unbake:1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"^unbake submit: raysubmit_\w+ failed: .*runtime", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_that_is_stopped_goes_on_when_submitted_again(head: str, config: Path) -> None:
    run = config.parent / "run-stopped"
    where = ("--address", head, "--run_dir", str(run))
    begun = unbake("submit", str(config), *where, "--no-wait")
    job = job_of(begun)
    deadline = time.monotonic() + 300
    while not (run / "stages/extract.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "is being stopped" in unbake("stop", job, "--address", head).stdout
    while "stopped" not in unbake("status", job, "--address", head).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not (run / "report.html").exists()
    record = (run / "stages/extract.json").read_bytes()
    again = unbake("submit", str(config), *where)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (run / "report.html").exists()
    assert (run / "stages/extract.json").read_bytes() == record


@pytest.mark.slow
def test_a_submitted_recover_goes_through(head: str, config: Path) -> None:
    done = submit(head, "recover", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (config.parent / "run/report.html").exists()
    assert (config.parent / "run/models/greedy-0/model.safetensors").exists()
