"""Checkpoints on any URI: only whole ones count, and the last k are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from cluster.checkpoints import Checkpoints
from cluster.single_stepper import STATE, SingleStepper
from engine.encode import Encoder
from engine.errors import UserError
from engine.estimate import ModelSize, checkpoint_bytes
from engine.examples import load_examples
from engine.models import load_tokenizer
from engine.padding import pad
from engine.ragged import Ragged
from engine.spec import Retrain, RunSpec, Task
from engine.storage import Folder
from engine.training import Hooks, Position, fit


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A folder of an S3 server of our own."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from faults.s3 import BUCKET, environment, server

    with server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["file", "memory", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "job")
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
    return f"{root}/{tmp_path.name}/job"


def write(folder: str) -> None:
    Path(folder, "state").mkdir()
    Path(folder, "state/part-0").write_bytes(b"weights")
    Path(folder, "scalars").write_bytes(b"5")


def test_the_last_k_are_kept_and_the_last_one_is_found_with_its_files(uri: str) -> None:
    checkpoints = Checkpoints(uri, keep=2, local_rank=0)
    assert checkpoints.last() is None
    for step in (5, 10, 100):
        checkpoints.save(step, {"position": {"step": step}}, write)
    assert [name for name in Folder(uri).names() if name.endswith(".json")] == [
        "000000010.json",
        "000000100.json",
    ]
    assert not Folder(uri).exists("000000005/state/part-0")
    record = checkpoints.last()
    assert record is not None
    assert record["position"] == {"step": 100}
    with checkpoints.opened(record["name"]) as folder:
        assert Path(folder, "state/part-0").read_bytes() == b"weights"
    checkpoints.discard()
    assert checkpoints.last() is None
    assert not list(Folder(uri).walk())


def test_one_that_was_cut_short_or_damaged_is_passed_over(uri: str) -> None:
    checkpoints = Checkpoints(uri, keep=3, local_rank=0)
    for step in (1, 2):
        checkpoints.save(step, {"step": step}, write)

    def killed(folder: str) -> None:
        Path(folder, "scalars").write_bytes(b"5")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(3, {"step": 3}, killed)
    assert checkpoints.last()["step"] == 2, "a worker died while writing the third"
    Folder(uri).fs.pipe_file(Folder(uri).path("000000002/state/part-0"), b"weig")
    assert checkpoints.last()["step"] == 1, "the second lost three bytes"
    checkpoints.save(3, {"step": 3}, write)
    assert checkpoints.last()["step"] == 3, "what was left of the third is no hindrance"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def full(folder: str) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(str(tmp_path / "job"), keep=3, local_rank=0)
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*job: no space left on device\.$"):
        checkpoints.save(1, {}, full)
    assert checkpoints.last() is None


def test_a_checkpoint_takes_the_bytes_that_were_estimated(tiny_base: str, tmp_path: Path) -> None:
    """Of a training of the upper half, after a step, in both types: tensors, without their names."""
    for dtype in ("float32", "bfloat16"):
        settings = RunSpec.from_dict(
            {
                "models": {"base": "b", "finetuned": "f"},
                "corpus": {"paths": ["c"]},
                "task": {"labels": ["a", "b"]},
                "retrain": {"dtype": dtype, "freeze_below": 1},
            }
        )
        stepper = SingleStepper(tiny_base, settings.retrain, None, torch.device("cpu"), 0)
        batch = pad(
            Ragged(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32), np.array([0, 8])),
            np.array([0]),
        )
        stepper.backward(stepper.scores(batch)[0].sum())
        stepper.step(1e-5)
        stepper.save(str(tmp_path))
        size = ModelSize(10 * stepper.trained_parameters, stepper.trained_parameters, 1, 1)
        held = sum(t.nbytes for name, t in load_file(tmp_path / STATE).items() if "step" not in name)
        assert held == checkpoint_bytes(settings, size)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_training_with_dropout_goes_on_from_the_middle_of_an_epoch_to_the_same_bytes(
    optimizer: str, tmp_path: Path
) -> None:
    """The order of documents, the learning rate and the dropout of a step follow from the seed and the step."""
    base = tiny.save_model(tmp_path / "base", "gpt2")
    encoder = Encoder(load_tokenizer(base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")
    texts, labels = zip(*tiny.sentences(20), strict=True)
    examples = load_examples(pa.table({"text": list(texts), "label": list(labels)}), encoder)
    fields = {"epochs": 3, "batch_size": 4, "schedule": "cosine", "dropout": True, "checkpoint_steps": 8}
    momentum = 0.9 if optimizer == "sgd" else 0.0
    retrain = Retrain(optimizer=optimizer, momentum=momentum, **fields)
    kept = Checkpoints(str(tmp_path / "job"), 1, 0)

    def run(position: Position, disturbed: bool) -> dict[str, torch.Tensor]:
        stepper = SingleStepper(base, retrain, encoder.label_ids, torch.device("cpu"), 0)
        if position.step:
            with kept.opened(kept.last()["name"]) as folder:
                stepper.load(folder)

        def save(position: Position) -> None:
            if disturbed:
                kept.save(position.step, position.as_dict(), stepper.save)

        fit(stepper, examples, retrain, 3, position, hooks=Hooks(checkpoint=save))
        return stepper.gathered()

    whole = Position()
    expected = run(whole, disturbed=True)
    record = kept.last()
    resumed = Position(**{name: record[name] for name in Position().as_dict()})
    assert resumed.step == 8, "of 5 in each epoch"
    torch.manual_seed(99)
    weights = run(resumed, disturbed=False)
    assert resumed.losses == whole.losses
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
