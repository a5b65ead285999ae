"""One private Ray instance for all tests of the cluster room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


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

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths end at 107 bytes
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
