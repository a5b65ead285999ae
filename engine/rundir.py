"""The run directory: names of everything a run writes, stage records, and the fingerprints that guard reuse."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from engine.errors import UserError
from engine.spec import RunSpec
from engine.storage import Folder

SPEC = "spec.yaml"
PLAN = "plan.parquet"
STORE = "gradients.zarr"
LAYOUT = "gradients.json"
DONE = "done"
SELECTION = "selection.parquet"
COMPARISONS = "comparisons"
DUPLICATES = "duplicates"
QUARANTINE = "quarantine.parquet"
TRAIN = "train"
MODELS = "models"
LOGS = "logs"
NEAREST = "nearest.parquet"
METRICS = "metrics.json"
DIAGNOSTICS = "diagnostics.json"
REPORT = "report.html"
LOG = "log.jsonl"
STAGES = "stages"
ENDPOINTS = "endpoints"
CORPUS = "corpus"


def fingerprint(inputs: Any) -> str:
    """sha256 (hex) of a JSON-able value; equal values, whatever their key order, give equal fingerprints."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class RunDir(Folder):
    """A run's folder on any fsspec URI.

    A stage's output counts as complete only when `stages/<stage>.json`, written last, exists; the record
    keeps every input the output depends on, so that a mismatch can be refused by the name of its field.
    """

    def completed(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether `stage` was completed with exactly these inputs.

        Args:
            inputs: flat mapping from field name to JSON-able value: all that the stage's output depends on.

        Raises:
            UserError: the stage was begun or completed with other inputs; the message names a field.
        """
        self.check_inputs(stage, inputs)
        return self.exists(f"{STAGES}/{stage}.json")

    def check_inputs(self, stage: str, inputs: dict[str, Any]) -> None:
        """Refuse inputs that differ from those the stage was begun with."""
        name = f"{STAGES}/{stage}.inputs.json"
        if not self.exists(name):
            return
        before, now = self.read_json(name), json.loads(json.dumps(inputs, default=str))
        for field in sorted(before.keys() | now.keys()):
            if before.get(field) != now.get(field):
                other = "use another run_dir"
                if stage != "extract" and self.exists(f"{STAGES}/extract.json"):
                    other += f" (unbake fork {self.uri} NEW makes one that keeps the extraction)"
                raise UserError(
                    f"{self.uri} holds output of the stage {stage} made with {field} = "
                    f"{_short(before.get(field))}, and this run has {_short(now.get(field))}: {other}, or remove "
                    f"{self.path('')} to start over."
                )

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Record the inputs of a stage before its first byte of output."""
        self.check_inputs(stage, inputs)
        if not self.exists(f"{STAGES}/{stage}.inputs.json"):
            self.write_json(f"{STAGES}/{stage}.inputs.json", inputs)

    def finish(
        self,
        stage: str,
        inputs: dict[str, Any],
        result: dict[str, Any] | None = None,
        outputs: Iterable[str] = (),
    ) -> None:
        """Write the completion record: last, and atomically. It holds the sha256 of the files `outputs`."""
        record = {
            "fingerprint": fingerprint(inputs),
            "result": result or {},
            "outputs": {name: self.digest(name) for name in outputs},
        }
        self.write_json(f"{STAGES}/{stage}.json", record)

    def stage_result(self, stage: str) -> dict[str, Any]:
        """What a completed stage left in its record."""
        return dict(self.read_json(f"{STAGES}/{stage}.json")["result"])

    def stage_fingerprint(self, stage: str) -> str:
        """Fingerprint of a completed stage, an input of the stages after it; UserError when not complete."""
        name = f"{STAGES}/{stage}.json"
        if not self.exists(name):
            raise UserError(f"{self.uri} has no completed {stage} stage: run `unbake {stage}` first.")
        return str(self.read_json(name)["fingerprint"])

    def forget(self, stage: str) -> None:
        """Take back `begin` of a stage that failed and left nothing, so that mended inputs are not refused."""
        if not self.exists(f"{STAGES}/{stage}.json"):
            self.remove(f"{STAGES}/{stage}.inputs.json")

    def save_spec(self, spec: RunSpec) -> None:
        """Write the resolved spec; the last one written replays the run."""
        self.write_bytes(SPEC, spec.to_yaml().encode())

    def load_spec(self) -> RunSpec:
        """The spec that was written last; UserError when the folder is no run directory."""
        if not self.exists(SPEC):
            raise UserError(f"{self.uri} is not a run directory: it has no {SPEC}.")
        return RunSpec.from_yaml(self.read_bytes(SPEC).decode(), self.path(SPEC))

    def model_name(self, strategy: str, seed: int) -> str:
        """Folder of one retrained model."""
        return f"{MODELS}/{strategy}-{seed}"

    def selection_name(self, strategy: str, seed: int | None) -> str:
        """File of one comparison selection; the seed is None for strategies that do not depend on it."""
        return f"{COMPARISONS}/{strategy}{'' if seed is None else f'-{seed}'}.parquet"

    @contextlib.contextmanager
    def unchanged_on_mistake(self) -> Iterator[None]:
        """Create the folder, and leave it as it was if the block raises UserError.

        Raises:
            UserError: the folder cannot be created or written to.
        """
        existed, before = self.exists(""), set(self.names())
        self.make()
        if self.local and not os.access(self.root, os.W_OK):
            raise UserError(f"cannot write to {self.root}: permission denied.")
        try:
            yield
        except UserError:
            for name in set(self.names()) - before:
                self.remove(name)
            if not existed:
                self.remove("")
            raise

    @contextlib.contextmanager
    def not_half_written(self, name: str) -> Iterator[None]:
        """Remove `name` if the block fails: nothing half-written stays behind."""
        try:
            yield
        except BaseException:
            self.remove(name)
            raise


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
