"""Another number of workers goes on from a checkpoint, within the stated tolerance of the plain loop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_train import TASK, plain, recipe, save_documents

from cluster.train import TrainJob

TOLERANCE = 1e-4
"""Of every step's loss after a change, relative, in float32: only the order of sums differs (docs/retraining.md)."""

WORKER = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=sys.argv[1])
    rank, world, port, stop, jobs = *map(int, sys.argv[1:5]), sys.argv[5]
    import pickle
    import pyarrow.parquet as pq
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    from pathlib import Path
    from cluster import train_worker
    from cluster.checkpoints import Checkpoints
    from engine import training
    from engine.encode import Encoder
    from engine.examples import load_examples
    from engine.models import load_tokenizer
    from engine.recipe import passes_per_step
    for job in pickle.loads(Path(jobs).read_bytes()):
        encoder = Encoder(load_tokenizer(job.base), job.task, job.scope)
        examples = load_examples(pq.read_table(job.selection), encoder)
        checkpoints = Checkpoints(job.checkpoints, 1, local_rank=rank)
        record = checkpoints.last()
        passes = passes_per_step(len(examples), job.retrain, world)
        resized = record is not None and record["workers"] != world
        stepper = train_worker._stepper(job, encoder.label_ids, passes, torch.device("cpu"), resized)
        position = training.Position()
        if record is not None:
            train_worker._load(checkpoints, record, stepper, world)
            position = training.Position(**record["position"])
        class Stop(Exception): pass
        def checkpoint(position):
            record = {"position": position.as_dict(), "workers": world}
            checkpoints.save(position.step, record, stepper.save)
            if position.step == stop:
                raise Stop
        try:
            training.fit(stepper, examples, job.retrain, job.seed, position,
                         hooks=training.Hooks(checkpoint=checkpoint))
        except Stop:
            pass
        if rank == 0:
            Path(job.target).write_text(json.dumps(position.losses))
        stepper.close()
    dist.destroy_process_group()
"""


def run_workers(world: int, stop: int, jobs: Path) -> None:
    """One group of workers without Ray, which trains every job from its checkpoint to step `stop`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, *map(str, (rank, world, port, stop, jobs))],
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=200)
        assert worker.returncode == 0, said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_become_one_and_two_again(tmp_path: Path) -> None:
    """ZeRO 1 to 3, with frozen blocks and with adapters: losses of all steps are the plain loop's."""
    import pickle

    base = tiny.save_model(tmp_path / "base")
    selection = save_documents(tmp_path / "selection.parquet", 37, 0)
    elastic = {"workers": 1, "workers_max": 2, "checkpoint_steps": 5, "epochs": 3}
    cases = {
        "zero1": recipe(zero_stage=1, weight_decay=0.1, **elastic),
        "zero2": recipe(zero_stage=2, freeze_below=1, **elastic),
        "zero3": recipe(zero_stage=3, **elastic),
        "lora2": recipe(zero_stage=2, lora={"rank": 4}, **elastic),
        "lora3": recipe(zero_stage=3, lora={"rank": 4}, **elastic),
    }
    jobs = [
        TrainJob(
            name, base, selection, str(tmp_path / name), str(tmp_path / f"{name}-checkpoints"), TASK,
            "last_token", retrain, 3,
        )
        for name, retrain in cases.items()
    ]  # fmt: skip
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    for world, stop in ((2, 5), (1, 10), (2, -1)):
        run_workers(world, stop, tmp_path / "jobs")
    for job in jobs:
        losses = json.loads(Path(job.target).read_text())
        assert len(losses) == 15
        expected = [loss for _, loss in plain(job)[0]["curve"]]
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE, err_msg=job.name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_grows_onto_a_node_that_joins(tmp_path: Path) -> None:
    """One worker on a node of one CPU; a second node joins; Ray Train starts two workers from the checkpoint."""
    script = """
        import sys, threading
        from dataclasses import replace
        from pathlib import Path
        import ray
        from ray.cluster_utils import Cluster
        import cluster.train
        from cluster.train import train
        from test_train import job, recipe
        base, selection, folder = sys.argv[1:]
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
        ray.init(address=nodes.address, log_to_driver=False)
        cluster.train.RESIZE_SECONDS = 3.0
        retrain = recipe(workers=1, workers_max=2, zero_stage=2, epochs=1000, checkpoint_steps=20,
                         learning_rate=1e-3)
        wanted, joined = threading.Event(), []
        train_in = threading.Thread(target=lambda: joined.append(train(
            job(base, selection, Path(folder), "grown", retrain),
            lambda event: wanted.set() if event["step"] >= 40 else None)))
        train_in.start()
        assert wanted.wait(200)
        nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
        train_in.join()
        (result,) = joined
        assert result["workers"] == 2, result["workers"]
        assert result["resumed_at"] >= 40
        ray.shutdown()  # before its nodes, whose end would be the driver's
        nodes.shutdown()
    """
    base = tiny.save_model(tmp_path / "base")
    selection = save_documents(tmp_path / "selection.parquet", 37, 0)
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    env = {
        **os.environ,
        "PYTHONPATH": ":".join(paths),
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
    }
    command = [sys.executable, "-c", textwrap.dedent(script), base, selection, str(tmp_path)]
    subprocess.run(command, env=env, timeout=550, check=True)
    result = json.loads((tmp_path / "grown/training.json").read_text())
    retrain = recipe(
        workers=1, workers_max=2, zero_stage=2, epochs=1000, checkpoint_steps=20, learning_rate=1e-3
    )
    job = TrainJob("plain", base, selection, "", "", TASK, "last_token", retrain, 3)
    got, want = (np.array([loss for _, loss in r["curve"]]) for r in (result, plain(job)[0]))
    # over so many steps the differences add up where the loss is next to nothing
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=TOLERANCE)
