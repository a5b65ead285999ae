"""The training log: a line a step, each once; TensorBoard, MLflow and W&B read what was written."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.spec import Retrain, Task
from engine.storage import Folder
from engine.train_log import TrainLog


def line(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "epoch": step / 4, "loss": loss, "learning_rate": 0.1, "grad_norm": 2.0}


def judged(step: int) -> dict:
    return {"step": step, "epoch": step / 4, "validation_loss": 0.5, "validation_accuracy": 0.75}


def read(folder: str, name: str = "greedy-0") -> list[dict]:
    text = Folder(folder).read_bytes(f"{name}.jsonl").decode()
    return [json.loads(entry) for entry in text.splitlines()]


def steps(folder: str) -> list[int]:
    return [entry["step"] for entry in read(folder) if "loss" in entry]


def folders(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "logs"), f"memory://logs-{os.path.basename(tmp_path)}"]


def test_each_step_stands_there_once_also_after_a_step_back(tmp_path: Path) -> None:
    for folder in folders(tmp_path):
        log = TrainLog(folder, "greedy-0", [], {})
        log.add([line(1), line(2)])
        log.add([judged(2)])
        log.add([line(3), line(4), line(5)])
        log.add([line(4, 9.0), line(5)])  # workers were lost: it went on from step 3
        log.close()
        assert steps(folder) == [1, 2, 3, 4, 5]
        assert [entry["step"] for entry in read(folder) if "validation_loss" in entry] == [2]
        assert read(folder)[4]["loss"] == 9.0


def test_a_second_driver_goes_on_with_the_file_and_mends_its_end(tmp_path: Path) -> None:
    for folder in folders(tmp_path):
        log = TrainLog(folder, "greedy-0", [], {})
        log.add([line(step) for step in range(1, 6)])
        log.close()
        place = Folder(folder)
        place.write_bytes("greedy-0.jsonl", place.read_bytes("greedy-0.jsonl") + b'{"step": 6, "lo')
        log = TrainLog(folder, "greedy-0", [], {})
        log.add([line(step) for step in (5, 6)])
        log.close()
        assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    log = TrainLog(str(tmp_path), "greedy-0", [], {})
    log.add([{**line(1), "grad_norm": math.inf}])
    log.close()
    assert read(str(tmp_path))[0]["grad_norm"] is None


def test_a_trainings_lines_say_what_its_steps_did(tmp_path: Path, tiny_base: str) -> None:
    """Loss, rate and norm against the curve, the schedule and the gradient taken by hand."""
    encoder = Encoder(load_tokenizer(tiny_base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")

    def documents(n: int, seed: int) -> pa.Table:
        texts, labels = zip(*tiny.sentences(n, seed), strict=True)
        return pa.table({"text": list(texts), "label": list(labels)})

    examples, held_out = (load_examples(documents(n, s), encoder) for n, s in [(20, 0), (9, 5)])
    recipe = Retrain(
        epochs=3, batch_size=8, learning_rate=1e-2, dtype="float32", eval_steps=4, warmup_share=0
    )
    log = TrainLog(str(tmp_path), "greedy-0", [], {})
    model = load_model(tiny_base, torch.float32)
    result = train_plain(
        model, examples, recipe, 0, encoder.label_ids, held_out, lambda event: log.add(event["log"])
    )
    log.close()
    lines = read(str(tmp_path))
    trained = [entry for entry in lines if "loss" in entry]
    assert [[entry["step"], entry["loss"]] for entry in trained] == result["curve"]
    np.testing.assert_allclose(
        [entry["learning_rate"] for entry in trained], [1e-2 * (9 - step) / 9 for step in range(9)]
    )
    assert [entry["epoch"] for entry in trained] == pytest.approx([step / 3 for step in range(1, 10)])
    assert all(entry["documents_per_second"] > 0 for entry in trained)
    assert all(entry["tokens_per_second"] > entry["documents_per_second"] for entry in trained)
    seconds = [entry["seconds"] for entry in trained]
    assert seconds == sorted(seconds)
    evaluations = [entry for entry in lines if "validation_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8, 9], "every four steps, and at the end"
    assert [e["validation_loss"] for e in evaluations] == [v["loss"] for v in result["validation"]]

    from engine.losses import document_losses
    from engine.padding import pad
    from engine.recipe import epoch_order

    fresh = load_model(tiny_base, torch.float32)
    first = pad(examples, epoch_order(20, 0, 0)[:8])
    document_losses(fresh, first, encoder.label_ids).mean().backward()
    norm = torch.stack([p.grad.square().sum() for p in fresh.parameters() if p.grad is not None]).sum().sqrt()
    assert trained[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TrainLog(str(tmp_path), "greedy-0", ["tensorboard"], {})
    log.add([line(step, 1.0 / step) for step in (1, 2, 3)])
    log.add([line(3, 0.25), line(4, 0.2)])
    log.add([judged(4)])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "greedy-0"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.25), (4, pytest.approx(0.2))]
    assert events.Scalars("validation_accuracy")[0].value == 0.75


def test_mlflow_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    log = TrainLog(str(tmp_path), "greedy-0", ["mlflow"], {"epochs": 4})
    log.add([line(step, 1.0 / step) for step in (1, 2)])
    log.close()
    client = MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    experiment = client.get_experiment_by_name("unbake")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "greedy-0"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "4"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.0), (2, 0.5)]


def wandb_records(path: Path) -> Iterator[Any]:
    """W&B's records in a file of an offline run: a header, then framed protobuf messages in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + size]
        whole = (
            piece if kind in (1, 2) else whole + piece
        )  # 1: a whole message, 2 to 4: its first to last piece
        at += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def test_wandb_holds_what_was_logged_and_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # whatever is sent fails
    logs = [
        TrainLog(str(tmp_path / "logs"), name, ["wandb"], {"epochs": 4}) for name in ("greedy-0", "topk-0")
    ]
    for log in logs:
        log.add([line(step, 1.0 / step) for step in (1, 2)])
    for log in logs:
        log.add([line(2, 0.75), judged(2)])  # workers were lost: the second step came again
        log.close()
    found = {}
    for file in (tmp_path / "logs/wandb").glob("offline-run-*/run-*.wandb"):
        records, deadline = list(wandb_records(file)), time.monotonic() + 60
        while not (
            records and records[-1].HasField("exit")
        ):  # its process writes a moment longer than it says
            assert time.monotonic() < deadline, [record.WhichOneof("record_type") for record in records]
            time.sleep(0.1)
            records = list(wandb_records(file))
        run = next(record.run for record in records if record.HasField("run"))
        assert run.project == "unbake"
        assert {entry.key: entry.value_json for entry in run.config.update}["epochs"] == "4"
        found[run.display_name] = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
    assert found.keys() == {"greedy-0", "topk-0"}
    for history in found.values():
        losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
        assert losses == [(1, 1.0), (2, 0.5), (2, 0.75)]
        assert [row["validation_accuracy"] for row in history if "validation_accuracy" in row] == [0.75]


def test_a_folder_that_is_called_like_a_logger_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(  # where the package itself is missing
        importlib.util,
        "find_spec",
        lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )
    with pytest.raises(UserError, match=r"pip install 'unbake\[wandb\]'"):
        TrainLog(str(tmp_path), "x", ["wandb"], {})


def test_loggers_that_cannot_be_had_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    find = importlib.util.find_spec
    for name in ("tensorboard", "mlflow", "wandb"):
        with monkeypatch.context() as gone:
            gone.setattr(
                importlib.util, "find_spec", lambda asked, name=name: None if asked == name else find(asked)
            )
            with pytest.raises(UserError, match=rf"pip install 'unbake\[{name}\]'"):
                TrainLog(str(tmp_path), "x", [name], {})
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    for name, message in [
        ("mlflow", "set MLFLOW_TRACKING_URI"),
        ("tensorboard", "need a local run_dir"),
        ("wandb", "set WANDB_DIR"),
    ]:
        with pytest.raises(UserError, match=message):
            TrainLog("memory://logs", "x", [name], {})
