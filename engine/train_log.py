"""A training's log: a JSON line a step always; TensorBoard, MLflow and W&B, by their own writers, where asked for.

A line of a step has step, epoch, loss (of the step's documents), learning_rate, grad_norm (before clipping),
documents_per_second, tokens_per_second and seconds; one of a judgement step, epoch, validation_loss and
validation_accuracy. Each step stands there once, also when a training went back to a checkpoint.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from engine.errors import UserError, first_line, install
from engine.storage import Folder

TRACKING = "MLFLOW_TRACKING_URI"
"""MLflow's own variable for where it writes to."""

MODE, DIRECTORY = "WANDB_MODE", "WANDB_DIR"
"""W&B's own variables for whether it sends anything (here it does not, unless told to) and where it writes to."""

REWRITE_SECONDS = 30.0
"""An object store cannot append: there the file is written anew, at most so often."""


def check_loggers(folder: str, loggers: list[str]) -> None:
    """UserError for a logger whose package is not installed, or that cannot write below `folder`."""
    for name in loggers:
        found = importlib.util.find_spec(name)
        if (
            found is None or found.origin is None
        ):  # without an origin: a folder that is called so, as W&B makes them
            raise UserError(f"retrain.loggers has {name}: {install(name)}, or remove it.")
    place = Folder(folder)
    if "tensorboard" in loggers and not place.local:
        raise UserError(
            f"retrain.loggers: TensorBoard's event files need a local run_dir, not {place.uri}: remove it."
        )
    if "mlflow" in loggers and not place.local and TRACKING not in os.environ:
        raise UserError(f"retrain.loggers: set {TRACKING} to log to MLflow from a run in {place.uri}.")
    if "wandb" in loggers and not place.local and DIRECTORY not in os.environ:
        raise UserError(f"retrain.loggers: set {DIRECTORY} to a local folder to log to W&B from {place.uri}.")


class Logger(Protocol):
    """Takes the numbers of a step."""

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Record finite numbers by name."""

    def restart(self, step: int) -> None:
        """This step and those after it are about to come again."""

    def close(self) -> None:
        """Flush."""


class TrainLog:
    """`<folder>/<name>.jsonl`, and what else was asked for.

    Args:
        folder: path or URI; TensorBoard writes to `tensorboard/<name>` in it, MLflow to `mlruns` unless
            MLFLOW_TRACKING_URI says otherwise, W&B to `wandb` unless WANDB_DIR does.
        name: of the training.
        loggers: tensorboard, mlflow, wandb.
        parameters: of the training, for MLflow and W&B.

    Raises:
        UserError: as `check_loggers`, or MLflow or W&B refuses.
    """

    def __init__(self, folder: str, name: str, loggers: list[str], parameters: dict[str, Any]) -> None:
        check_loggers(folder, loggers)
        self._lines = _Lines(Folder(folder), f"{name.replace('/', '-')}.jsonl")
        makers: dict[str, Callable[..., Logger]] = {
            "tensorboard": TensorBoard,
            "mlflow": MLflow,
            "wandb": WandB,
        }
        self._loggers: list[Logger] = [makers[kind](folder, name, parameters) for kind in loggers]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Record lines in the order of their steps; a step that is there already begins the log anew from it."""
        again = self._lines.add(lines)
        for logger in self._loggers:
            if again:
                logger.restart(lines[0]["step"])
            for line in lines:
                numbers = {k: v for k, v in line.items() if k != "step" and math.isfinite(v)}
                logger.add(line["step"], numbers)

    def close(self) -> None:
        """Write what is not yet written."""
        self._lines.write()
        for logger in self._loggers:
            logger.close()


class _Lines:
    """The lines of one file, which goes on where an earlier driver left it."""

    def __init__(self, folder: Folder, file: str) -> None:
        self._folder, self._file = folder, file
        self._lines: list[tuple[int, bool, str]] = []  # step, whether of a step, text
        self._written, self._when = 0, -math.inf
        if folder.exists(file):
            for text in folder.read_bytes(file).decode("utf-8", "replace").splitlines():
                try:
                    self._take(json.loads(text))
                except (ValueError, TypeError, KeyError):
                    break  # the end of what a killed driver wrote
            self._rewrite()

    def add(self, lines: list[dict[str, Any]]) -> bool:
        """Take in lines; whether they go back to a step that was there."""
        last = max((step for step, training, _ in self._lines if training), default=0)
        again = bool(lines) and "loss" in lines[0] and lines[0]["step"] <= last
        if again:
            self._lines = [kept for kept in self._lines if kept[0] < lines[0]["step"]]
            self._rewrite()
        for line in lines:
            self._take(line)
        if self._folder.local:
            self._append()
        elif time.monotonic() - self._when > REWRITE_SECONDS:
            self._rewrite()
        return again

    def write(self) -> None:
        """Bring all lines to storage."""
        if self._folder.local:
            self._append()
        else:
            self._rewrite()

    def _take(self, line: dict[str, Any]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in line.items() if v is not None}
        self._lines.append((int(line["step"]), "loss" in line, json.dumps(finite)))

    def _rewrite(self) -> None:
        self._folder.write_bytes(self._file, "".join(text + "\n" for _, _, text in self._lines).encode())
        self._written, self._when = len(self._lines), time.monotonic()

    def _append(self) -> None:
        new = "".join(text + "\n" for _, _, text in self._lines[self._written :])
        self._folder.make()
        try:
            with open(self._folder.path(self._file), "a", encoding="utf-8") as file:
                file.write(new)
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder.path(self._file)}: {error.strerror or error}."
            ) from None
        self._written = len(self._lines)


class TensorBoard:
    """Event files by torch's own `SummaryWriter`."""

    def __init__(self, folder: str, name: str, parameters: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = functools.partial(SummaryWriter, Folder(folder).path(f"tensorboard/{name}"))
        self._writer = self._make()

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """See `Logger`."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def restart(self, step: int) -> None:
        """See `Logger`. TensorBoard hides what the steps were before."""
        self._writer.close()
        self._writer = self._make(purge_step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class MLflow:
    """A run of the experiment `unbake` by MLflow's own client."""

    def __init__(self, folder: str, name: str, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric, self._error = Metric, MlflowException
        uri = os.environ.get(TRACKING)
        if uri is None:
            # MLflow 3 asks for consent to its older kind of store, the one that needs no database
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = f"file://{Folder(folder).path('mlruns')}"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name("unbake")
            number = experiment.experiment_id if experiment else self._client.create_experiment("unbake")
            self._run = self._client.create_run(number, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in parameters.items()]
            self._client.log_batch(self._run, params=params)
        except (MlflowException, OSError) as error:
            raise UserError(f"retrain.loggers: MLflow at {uri} refuses: {first_line(error)}.") from None

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """See `Logger`."""
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in numbers.items()]
        try:
            self._client.log_batch(self._run, metrics=metrics)
        except (self._error, OSError) as error:
            raise UserError(f"retrain.loggers: MLflow takes no more: {first_line(error)}.") from None

    def restart(self, step: int) -> None:
        """See `Logger`. MLflow keeps both values of a step, with their times."""

    def close(self) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of the project `unbake` by W&B's own client, offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: str, name: str, parameters: dict[str, Any]) -> None:
        import wandb

        settings = {"console": "off", "silent": True, "x_disable_stats": True}
        settings |= {"disable_git": True, "disable_code": True, "disable_job_creation": True}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "unbake"),
                name=name,
                config=parameters,
                dir=os.environ.get(DIRECTORY) or Folder(folder).path(""),
                mode=os.environ.get(MODE, "offline"),  # type: ignore[arg-type]
                reinit="create_new",  # several trainings are logged at once
                settings=wandb.Settings(**settings),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(f"retrain.loggers: W&B refuses: {first_line(error)}.") from None
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """See `Logger`."""
        self._run.log({"step": step, **numbers})

    def restart(self, step: int) -> None:
        """See `Logger`. W&B keeps both values of a step, in their order."""

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()
