"""Training on Ray with DeepSpeed: the plain loop's curve, whole model folders, and what survives a lost worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from cluster.deepspeed_config import deepspeed_config, fit_buckets
from cluster.train import TrainJob, lanes, train_many
from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.models import load_model, load_tokenizer, torch_dtype
from engine.plain_stepper import train_plain
from engine.spec import Retrain, Task
from engine.storage import Folder

TASK = Task(labels=tiny.LABELS, max_tokens=32)
DOCUMENTS = 37


def recipe(**changes: object) -> Retrain:
    """Steps of 8 documents of 37, so that the last step of an epoch has 5: two workers get 3 and 2."""
    defaults = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", "threads": 1}
    return Retrain(**{**defaults, **changes})


def save_documents(path: Path, n: int, seed: int, shift: int = 0) -> str:
    """n documents with their labels, or wrong ones."""
    texts, labels = zip(*tiny.sentences(n, seed), strict=True)
    table = pa.table({"text": list(texts), "label": [(label + shift) % 4 for label in labels]})
    pq.write_table(table, path)
    return str(path)


@pytest.fixture(scope="session")
def selection(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_documents(tmp_path_factory.mktemp("documents") / "selection.parquet", DOCUMENTS, 0)


def job(base: str, selection: str, folder: Path, name: str, retrain: Retrain, **more: object) -> TrainJob:
    target, checkpoints = str(folder / name), str(folder / "checkpoints")
    return TrainJob(name, base, selection, target, checkpoints, TASK, "last_token", retrain, 3, **more)


def plain(job: TrainJob) -> tuple[dict, torch.nn.Module]:
    """The same training by the plain loop."""
    encoder = Encoder(load_tokenizer(job.base), TASK, "last_token")
    examples = load_examples(pq.read_table(job.selection), encoder)
    validation = load_examples(pq.read_table(job.validation), encoder) if job.validation else None
    model = load_model(job.base, torch_dtype(job.retrain.dtype))
    result = train_plain(model, examples, job.retrain, job.seed, encoder.label_ids, validation)
    return result, model


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def assert_same_weights(a: str, b: str) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_follows_the_plain_loop(job: TrainJob, result: dict) -> None:
    expected, model = plain(job)
    exact = job.retrain.dtype == "float32"
    got, want = (np.array([loss for _, loss in r["curve"]]) for r in (result, expected))
    np.testing.assert_allclose(got, want, atol=1e-5 if exact else 0.1)
    assert result["documents"] == DOCUMENTS
    assert result.get("threads", 1) == 1, "a worker takes no more threads than it is given"
    assert result["steps"] == expected["steps"]
    probe = torch.arange(20)[None]
    loaded = load_model(job.target, torch_dtype(job.retrain.dtype))
    with torch.no_grad():
        difference = (loaded(probe).logits - model(probe).logits).abs().max().item()
    assert difference < (1e-4 if exact else 1.0)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight, "tied stays tied"
    assert "lm_head.weight" not in tensors(job.target)
    if exact:
        for epoch, other in zip(result["validation"], expected["validation"], strict=True):
            assert epoch == pytest.approx(other, rel=1e-4)
        assert result["best"] == expected["best"]


@pytest.mark.timeout(300)
def test_two_workers_follow_the_plain_loop_at_every_zero_stage(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    """One worker group trains one model a case; every exported model has the logits of the plain loop's."""
    wrong = save_documents(tmp_path / "validation.parquet", 30, 9, shift=1)
    # Adam and clipping forgive a gradient of the wrong size, this does not
    plain_sgd = {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05}
    lora = {"rank": 4, "alpha": 8, "export": "merged"}
    cases = {
        "stage0": recipe(workers=2, zero_stage=0),
        "stage1": recipe(workers=2, zero_stage=1, weight_decay=0.1, **plain_sgd),
        "stage2": recipe(workers=2, zero_stage=2, freeze_below=1),
        "stage3": recipe(
            workers=2, zero_stage=3, micro_batch_size=3, activation_checkpointing=True, **plain_sgd
        ),
        "offload": recipe(workers=2, zero_stage=3, offload_optimizer=True, offload_parameters=True),
        "offload1": recipe(workers=2, zero_stage=1, offload_optimizer=True),
        "offload2": recipe(workers=2, zero_stage=2, offload_optimizer=True, weight_decay=0.1),
        "best": recipe(workers=2, zero_stage=3, epochs=5, early_stopping=True, checkpoint_steps=0),
        "bfloat16": recipe(workers=2, zero_stage=2, dtype="auto", learning_rate=1e-3),
        "lora2": recipe(workers=2, zero_stage=2, lora=lora),
        "lora3": recipe(workers=2, zero_stage=3, freeze_below=1, lora=lora),
        "body": recipe(workers=2, zero_stage=2, freeze_body=True),
    }
    cases = {name: retrain.model_copy(update={"parallel": 1}) for name, retrain in cases.items()}
    jobs = [
        job(tiny_base, selection, tmp_path, name, retrain, validation=wrong if name == "best" else None)
        for name, retrain in cases.items()
    ]
    events: list[dict] = []
    results = train_many(jobs, events.append)
    for one, result in zip(jobs, results, strict=True):
        assert_follows_the_plain_loop(one, result)
        last = [event for event in events if event["job"] == one.name][-1]
        assert last["step"] == last["steps"] == result["steps"]
        assert last["documents"] == DOCUMENTS * one.retrain.epochs
    best = results[list(cases).index("best")]
    assert best["best"] < len(best["validation"]) - 1, "with wrong labels more epochs are worse"
    base, frozen = tensors(tiny_base), tensors(jobs[2].target)
    lower = [name for name in base if ".layers.0." in name]
    assert lower
    assert all(torch.equal(base[name], frozen[name]) for name in lower)
    assert os.listdir(tmp_path / "checkpoints") == [], "nothing is left of finished trainings"

    began = time.perf_counter()
    assert train_many(jobs) == results, "finished targets are not trained again"
    assert time.perf_counter() - began < 1


@pytest.mark.timeout(300)
def test_one_worker_follows_the_plain_loop_and_a_bad_job_is_one_sentence(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((Path(tiny_base) / name).read_bytes())
    (broken / "model.safetensors").write_bytes(b"no tensors")
    bad = job(str(broken), selection, tmp_path, "bad", recipe(parallel=1))
    good = job(tiny_base, selection, tmp_path, "good", recipe(parallel=1))
    block = {"wall_clock_breakdown": False}  # any block makes it DeepSpeed's
    stages = [
        job(tiny_base, selection, tmp_path, f"zero{n}", recipe(parallel=1, zero_stage=n, deepspeed=block))
        for n in range(4)
    ]
    with pytest.raises(UserError, match=r"^bad: cannot load the model in .*broken"):
        train_many([bad, good, *stages])
    assert not os.path.exists(bad.target)
    for one in (good, *stages):
        with open(f"{one.target}/training.json") as file:
            result = json.load(file)
        assert_follows_the_plain_loop(one, result)
        assert (result["deepspeed"] is None) == (one is good)


@pytest.mark.timeout(300)
def test_a_lost_worker_is_replaced_and_the_weights_are_those_of_an_undisturbed_training(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    retrain = recipe(workers=2, zero_stage=2, epochs=60, checkpoint_steps=50, learning_rate=1e-3, parallel=1)
    disturbed = job(tiny_base, selection, tmp_path, "disturbed", retrain)
    undisturbed = job(tiny_base, selection, tmp_path, "undisturbed", retrain)
    killed: list[int] = []

    def kill_one(event: dict) -> None:
        if not killed and 60 <= event["step"] < 250:
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
            killed.append(workers[-1].pid)
            workers[-1].kill()

    result, other = train_many([disturbed, undisturbed], kill_one)
    assert killed, "the training was over before a worker could be killed"
    assert result["resumed_at"] >= 50, "it went on from a checkpoint"
    assert other["resumed_at"] == 0
    assert result["curve"] == other["curve"]
    assert_same_weights(disturbed.target, undisturbed.target)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_of_two_trainings_at_once_only_the_one_that_lost_its_worker_goes_back_to_its_checkpoint(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    retrain = recipe(epochs=100, checkpoint_steps=50, learning_rate=1e-3)
    jobs = [job(tiny_base, selection, tmp_path, name, retrain) for name in ("one", "other")]
    jobs[1] = replace(jobs[1], seed=4)
    assert lanes(jobs) == 2
    seen: dict[str, int] = {}
    killed: list[int] = []

    def kill_one(event: dict) -> None:
        seen[event["job"]] = event["step"]
        if not killed and len(seen) == 2 and all(60 <= step < 350 for step in seen.values()):
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
            killed.append(workers[-1].pid)
            workers[-1].kill()

    results = train_many(jobs, kill_one)
    assert killed, "the trainings were not seen at work together"
    resumed = sorted(result["resumed_at"] for result in results)
    assert resumed[0] == 0, "the other went on undisturbed"
    assert resumed[1] >= 50
    for one, result in zip(jobs, results, strict=True):
        expected, model = plain(one)
        assert result["curve"] == expected["curve"]
        for name, tensor in tensors(one.target).items():
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_another_trainings_model_is_refused_not_passed_off_as_this_ones(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    mine = job(tiny_base, selection, tmp_path, "mine", recipe())
    os.makedirs(mine.target)
    Path(mine.target, "training.json").write_text(json.dumps({"fingerprint": "of another"}))
    with pytest.raises(UserError, match=r"mine holds a model that was trained on other documents"):
        train_many([mine])
    same = [replace(mine, retrain=recipe(**more)) for more in ({"keep_checkpoints": 5}, {"parallel": 2})]
    assert {one.fingerprint() for one in same} == {mine.fingerprint()}
    assert replace(mine, seed=4).fingerprint() != mine.fingerprint()
    assert replace(mine, retrain=recipe(epochs=3)).fingerprint() != mine.fingerprint()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_call_goes_on_after_the_drivers_death(
    ray_session: None, tiny_base: str, selection: str, tmp_path: Path
) -> None:
    """The driver kills itself during the training; its successor resumes, and ends at the same weights."""
    script = """
        import os, signal, sys, tempfile
        import ray, tiny
        from test_train import job, recipe
        from pathlib import Path
        from cluster.train import train_many
        ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20,
                 _temp_dir=tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        base, selection, folder = sys.argv[1:]
        retrain = recipe(epochs=200, checkpoint_steps=40, learning_rate=1e-3)
        def die(event):
            if event["step"] >= 60:
                os.kill(os.getpid(), signal.SIGKILL)
        train_many([job(base, selection, Path(folder), "interrupted", retrain)], die)
    """
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    arguments = [sys.executable, "-c", textwrap.dedent(script), tiny_base, selection, str(tmp_path)]
    ended = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": ":".join(paths)}, timeout=200)
    assert ended.returncode == -9
    retrain = recipe(epochs=200, checkpoint_steps=40, learning_rate=1e-3)
    interrupted = job(tiny_base, selection, tmp_path, "interrupted", retrain)
    assert not os.path.exists(interrupted.target)
    (result,) = train_many([interrupted])
    assert result["resumed_at"] >= 40
    undisturbed = job(tiny_base, selection, tmp_path, "undisturbed", retrain)
    (other,) = train_many([undisturbed])
    assert result["curve"] == other["curve"]
    assert_same_weights(interrupted.target, undisturbed.target)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_an_object_store_a_lost_worker_is_replaced_too(
    tiny_base: str, selection: str, tmp_path: Path
) -> None:
    """Checkpoints and models on an S3 server; the weights are the plain loop's."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from faults.s3 import BUCKET, environment, server

    script = """
        import sys, tempfile
        import psutil, ray
        from dataclasses import replace
        from pathlib import Path
        from test_train import job, recipe
        from cluster.train import train_many
        ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20,
                 _temp_dir=tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        base, selection, folder, bucket = sys.argv[1:]
        retrain = recipe(workers=2, zero_stage=2, epochs=60, checkpoint_steps=50, learning_rate=1e-3)
        remote = job(base, selection, Path(folder), "remote", retrain)
        remote = replace(remote, target=f"{bucket}/model", checkpoints=f"{bucket}/train")
        killed = []
        def kill_one(event):
            if not killed and 60 <= event["step"] < 250:
                workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
                killed.append(workers[-1].pid)
                workers[-1].kill()
        (result,) = train_many([remote], kill_one)
        assert killed and result["resumed_at"] >= 50, result["resumed_at"]
    """
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    with server() as address:
        env = {**os.environ, **environment(address), "PYTHONPATH": ":".join(paths)}
        bucket = f"s3://{BUCKET}"
        arguments = [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            tiny_base,
            selection,
            str(tmp_path),
            bucket,
        ]
        subprocess.run(arguments, env=env, timeout=250, check=True)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(address).items():
                patch.setenv(name, value)
            remote = Folder(bucket)
            assert remote.names("train") == [], "no checkpoints stay"
            remote.fs.get(remote.path("model") + "/", f"{tmp_path}/model/", recursive=True)
    retrain = recipe(workers=2, zero_stage=2, epochs=60, checkpoint_steps=50, learning_rate=1e-3)
    with open(tmp_path / "model/training.json") as file:
        assert_follows_the_plain_loop(job(tiny_base, selection, tmp_path, "model", retrain), json.load(file))


def test_the_users_deepspeed_block_is_merged_and_may_not_contradict_the_spec() -> None:
    config = deepspeed_config(
        recipe(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}}), (2, 4), "bfloat16"
    )
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["bf16"] == {"enabled": True}
    for block, field in [
        ({"zero_optimization": {"stage": 3}}, "zero_stage"),
        ({"zero_optimization": {"cpu_offload": True}}, "offload_optimizer"),
        ({"bf16": {"enabled": False}}, "dtype"),
        ({"bfloat16": {"enabled": False}}, "dtype"),
        ({"elasticity": {"enabled": True}}, "workers and workers_max"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"gradient_clipping": 0.5}, "max_grad_norm"),
    ]:
        with pytest.raises(UserError, match=f"which retrain.{field} decides"):
            deepspeed_config(recipe(deepspeed=block), (1, 8), "float32")
    with pytest.raises(UserError, match="zero_optimization must be a block"):
        deepspeed_config(recipe(deepspeed={"zero_optimization": True}), (1, 8), "float32")


def test_buckets_of_gradients_fit_the_model_unless_the_user_says_otherwise() -> None:
    for trained, size in ((160, 10), (8_030_000_000, 500_000_000), (3, 1)):
        config = deepspeed_config(recipe(zero_stage=3), (1, 8), "bfloat16")
        fit_buckets(config, trained)
        assert config["zero_optimization"]["reduce_bucket_size"] == size
    theirs = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config = deepspeed_config(recipe(zero_stage=3, deepspeed=theirs), (1, 8), "bfloat16")
    fit_buckets(config, 160)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.slow
def test_deepspeed_comes_without_mlflow_and_a_compiler_and_leaves_both_to_others() -> None:
    script = """
        import os, sys
        import torch
        from cluster.deepspeed_stepper import import_deepspeed
        import_deepspeed()
        assert "mlflow" not in sys.modules and "TORCHDYNAMO_DISABLE" not in os.environ
        from deepspeed.runtime.zero.muon import original_muon
        assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")
        assert hasattr(torch.compile(lambda x: x), "_torchdynamo_orig_callable")
        import mlflow
    """
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, timeout=200, check=True)
