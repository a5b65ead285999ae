"""Fixtures of the whole suite: tiny models and corpora, and one private Ray instance, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # else Ray's workers wait for the other test process
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no test gets a Ray that nobody has started

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import settings

# CI repeats one set of examples, so that a submission is not judged by chance; by hand new ones are tried.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(1)

NOBODY = 65534
"""The user who owns nothing, on Linux."""

LONGEST = (
    "test_recover.py",
    "test_experiment.py",
    "test_stored_examples.py",
    "test_train.py",
    "test_submit.py",
    "test_kills.py",
    "test_notebook.py",
)
"""Files that begin first, so that neither of `make test`'s two processes is left waiting for the other's last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within each file stays."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaMA folder with tied embeddings."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def tiny_finetuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with every weight moved a little."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "finetuned", perturb=0.02)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 unlabelled documents in a jsonl file."""
    return tiny.save_corpus(tmp_path_factory.mktemp("corpus") / "seed.jsonl")


@pytest.fixture(scope="session")
def tiny_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 labelled documents in a jsonl file."""
    return Path(tiny.save_corpus(tmp_path_factory.mktemp("corpus") / "test.jsonl", 80, seed=5, labelled=True))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder, in a test that permissions hold for: root, whom they do not stop, becomes nobody meanwhile."""
    folder, user = Path(tempfile.mkdtemp(prefix="unbake-", dir="/tmp")), os.geteuid()
    if user == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size (`300k`, `8m`) on a new folder; skips where that is not permitted."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    made: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{len(made)}"
        folder.mkdir()
        command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = (
            subprocess.run(command, capture_output=True, text=True, timeout=60) if mount and unmount else None
        )
        if done is None or done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run([str(unmount), "-l", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on eight pretended CPUs, in a temp folder of its own so that no other instance is found."""
    os.environ.update(
        RAY_AUTH_MODE="disabled",
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        RAY_BACKEND_LOG_LEVEL="fatal",
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    )
    import ray

    from cluster.session import without_raylet

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths end at 107 bytes
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,  # a GPU has tests of its own: here every machine does the same
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        _temp_dir=folder,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # what it says once would be in one test's output
    with without_raylet():  # what it says late would be in the next one's
        yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
