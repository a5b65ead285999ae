"""Nodes that come and go change no byte; a pool begins with the nodes there are; what one stage holds the next gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch

import cluster.extract
from faults import dying
from faults.harness import Driver, assert_same, make_case, run, workers
from faults.nodes import GRADIENTS, INDEX, SPREAD, TRAINING, Nodes, wait_until

ray.cloudpickle.register_pickle_by_value(dying)  # workers cannot import it


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four partitions."""
    return make_case(tmp_path_factory.mktemp("nodes"), 24 * 64, extract=SPREAD, select={"shards": 3})


@pytest.fixture(scope="module")
def serial(case: Path, ray_session: None) -> Path:
    """The store as one worker writes it, one partition after the other."""
    return run(case, "serial", workers_min=1, workers_max=1)


RAY_ENDS_AN_ACTOR = 30
"""Seconds that Ray gives an actor that nobody holds before it kills it (actor_graceful_shutdown_timeout_ms)."""


@contextmanager
def nodes_of(count: int, **resources: object) -> Iterator[Nodes]:
    nodes = Nodes(count, **resources)
    try:
        yield nodes
    finally:
        nodes.close()


def written(run: Path) -> int:
    """Partitions with a completion record."""
    return len(list(run.glob("done/*.json")))


def test_extraction_begins_on_the_first_node_grows_onto_the_next_and_loses_none_of_a_lost_nodes_work(
    case: Path, serial: Path
) -> None:
    """workers_min is 2: with room for one it begins with one; the second node joins, then the first is lost."""
    folder = case.parent / "come-and-go"
    with nodes_of(1) as nodes:
        driver = Driver("extract", case, folder, nodes.address)
        wait_until(lambda: written(folder) >= 2, lambda: driver.alive)
        (worker,) = nodes.workers(nodes.live[0], GRADIENTS)
        worker.suspend()  # so that there is something left for the second one, however slow it starts
        second = nodes.add()
        wait_until(lambda: second in nodes.holding(GRADIENTS), lambda: driver.alive)
        nodes.lose(nodes.live[0])
        assert written(folder) < 24
        assert driver.wait() == 0, driver.said.read_text()
    assert_same(folder, serial)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_costs_no_partition_its_only_try(case: Path, serial: Path) -> None:
    """Ray is told not to try again, as if it had made all its tries before it knew that the node had gone."""
    folder = case.parent / "one-try"
    with nodes_of(2) as nodes:
        driver = Driver("extract", case, folder, nodes.address, "--extract.max_attempts", "1")
        wait_until(lambda: written(folder) >= 2, lambda: driver.alive)
        nodes.lose(wait_until(lambda: nodes.holding(GRADIENTS), lambda: driver.alive)[0])
        assert written(folder) < 24
        assert driver.wait(300) == 0, driver.said.read_text()
    assert "a node was lost" in (folder / "log.jsonl").read_text()
    assert_same(folder, serial)


def test_sigterm_to_a_gradient_worker_ends_what_it_has_begun_and_nothing_is_done_twice(
    case: Path, serial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.extract, "WritePartition", dying.ToldToGo)
    folder = run(case, "told")
    begun, ended = (
        [tuple(map(int, line.split())) for line in noted(folder, what)] for what in ("begins", "ends")
    )
    assert sorted(begun) == sorted(ended)
    assert sorted(partition for _, partition in ended) == list(range(24))
    told = int(Path(f"{folder}-told").read_text())
    last = begun.index((told, 3))
    assert all(pid != told for pid, _ in begun[last + 2 :])  # one more may be begun before the signal arrives
    assert told not in {worker.pid for worker in workers(GRADIENTS)}
    assert_same(folder, serial)


def noted(folder: Path, what: str) -> list[str]:
    """What `dying.ToldToGo` wrote down."""
    return Path(f"{folder}-{what}").read_text().splitlines()


def test_extraction_leaves_no_actor_behind(serial: Path) -> None:
    """Nor what it held: a training that needs all GPUs would wait for ever."""
    wait_until(lambda: not workers("MapWorker"), lambda: True, RAY_ENDS_AN_ACTOR + 30)
    total = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == total, lambda: True, 20)


@pytest.fixture(scope="module")
def serial_recover(case: Path, ray_session: None) -> Path:
    """The whole run, one partition after the other, selected without shards."""
    folder = case.parent / "serial-recover"
    alone = ("--extract.workers_min", "1", "--extract.workers_max", "1", "--select.shards", "1")
    driver = Driver("recover", case, folder, str(ray.get_runtime_context().gcs_address), *alone)
    assert driver.wait(300) == 0, driver.said.read_text()
    return folder


@pytest.mark.slow
def test_a_gpu_that_torch_does_not_see_is_one_sentence(case: Path) -> None:
    """Ray says what it was told; there is none on this node."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with nodes_of(1, num_gpus=1) as nodes:
        driver = Driver("extract", case, case.parent / "no-gpu", nodes.address)
        assert driver.wait() == 2
    assert "a GPU and torch sees none there: install torch" in driver.said.read_text()
    assert "Traceback" not in driver.said.read_text()


GPU = {"accelerator_type:A100": 1}
"""A custom resource that stands for a GPU: Ray's name for one of a kind, on a node that has none."""

ON_GPUS = [f"--{stage}.accelerator_type=A100" for stage in ("extract", "select", "retrain")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_every_stage_loses_a_node_and_gets_another_has_a_serial_runs_bytes(
    case: Path, serial_recover: Path
) -> None:
    """The workers of every stage are on the nodes with a GPU alone, which come and go."""
    folder = case.parent / "every-stage"
    with nodes_of(3, resources=GPU) as nodes:
        other = nodes.add(resources={}, num_cpus=4)
        driver = Driver("recover", case, folder, nodes.address, *ON_GPUS)
        wait_until(lambda: written(folder) >= 2 and nodes.holding(GRADIENTS), lambda: driver.alive)
        for kind in (GRADIENTS, INDEX, TRAINING):
            found = wait_until(lambda kind=kind: nodes.holding(kind), lambda: driver.alive)
            assert other not in found
            nodes.lose(found[0])
            nodes.add()
        assert driver.wait(300) == 0, driver.said.read_text()
    assert_same(folder, serial_recover)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_gets_the_one_cpu_that_the_stage_before_it_held(case: Path, serial_recover: Path) -> None:
    """Extraction takes all of the only node, and so does training: neither would begin beside the other."""
    folder = case.parent / "one-cpu"
    alone = ("--select.shards", "1", "--extract.workers_min", "1", "--extract.workers_max", "1")
    with nodes_of(1) as nodes:
        driver = Driver("recover", case, folder, nodes.address, *alone)
        assert driver.wait(300) == 0, driver.said.read_text()
    assert_same(folder, serial_recover)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_three_nodes_one_is_told_to_go_one_is_lost_and_the_third_does_all(
    case: Path, serial: Path
) -> None:
    folder = case.parent / "lost"
    with nodes_of(3) as nodes:
        driver = Driver("extract", case, folder, nodes.address)
        for least, goes in ((1, nodes.tell), (3, nodes.lose)):
            wait_until(lambda least=least: written(folder) >= least, lambda: driver.alive)
            goes(wait_until(lambda: nodes.holding(GRADIENTS), lambda: driver.alive)[0])
        assert driver.wait(300) == 0, driver.said.read_text()
    assert_same(folder, serial)
