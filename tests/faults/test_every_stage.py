"""All workers of a stage killed at once, and SIGTERM, in every stage of a whole run: no byte differs at the end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from engine.lock import LOCK
from faults.harness import Driver, assert_same, kill, make_case, stage_of, workers
from faults.nodes import wait_until
from jobs.stopping import EXIT_CODE

pytestmark = pytest.mark.slow

STAGES = (
    ("extract", "EncodePartition"),
    ("extract", "WritePartition"),
    ("index", "ShardActor"),
    ("retrain", "RayTrainWorker"),
)
"""Stages in their order, as `stage_of` calls them, and the workers that are there."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def undisturbed(case: Path, address: str) -> Path:
    run = case.parent / "undisturbed"
    driver = Driver("recover", case, run, address)
    assert driver.wait(300) == 0, driver.said.read_text()
    return run


def wait_for(stage: str, kind: str, run: Path, driver: Driver) -> None:
    """Until a stage runs and its workers are there."""
    wait_until(lambda: stage_of(run) == stage and workers(kind), lambda: driver.alive)


def test_all_workers_of_a_stage_killed_at_once_cost_nothing(
    case: Path, undisturbed: Path, address: str
) -> None:
    run = case.parent / "all-workers"
    driver = Driver("recover", case, run, address)
    for stage, kind in STAGES:
        wait_for(stage, kind, run, driver)
        died = [kill(worker) for worker in workers(kind)]
        assert any(died)
    assert driver.wait(300) == 0, driver.said.read_text()
    assert_same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_stopped_or_killed_in_every_stage_goes_on_where_it_was(
    number: signal.Signals, case: Path, undisturbed: Path, address: str
) -> None:
    run = case.parent / number.name
    others = set(workers())  # of the Ray of tests before, where one whose every worker dies is still there
    for stage, kind in STAGES:
        driver = Driver("recover", case, run, address)
        wait_for(stage, kind, run, driver)
        driver.signal(number)
        code, said = driver.wait(60), driver.said.read_text()
        if number == signal.SIGTERM:
            assert code == EXIT_CODE, said
            assert "stopped by SIGTERM; to go on from here: unbake recover --config" in said
            assert not (run / LOCK).exists()
        wait_until(lambda: not set(workers()) - others, lambda: True, 60)  # its workers see that it has gone
    driver = Driver("recover", case, run, address)
    assert driver.wait(300) == 0, driver.said.read_text()
    assert_same(run, undisturbed)
