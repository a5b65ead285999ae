"""Job: the spec, the run directory and the voice that every stage shares, and how a stage is guarded."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import transformers

from engine.checkpoints import Endpoints
from engine.encode import Encoder, spec_encoder
from engine.errors import UserError
from engine.evaluate.task import TestSet
from engine.lock import RunLock
from engine.precision import settled
from engine.rundir import ENDPOINTS, SPEC, RunDir, fingerprint
from engine.sources import resolve
from engine.spec import RunSpec
from jobs.progress import Progress
from jobs.stopping import request_stop
from jobs.testset import read_test


@dataclasses.dataclass
class Job:
    """One invocation: `spec`, whose `auto` types are decided here, its run directory, and where it reports to."""

    spec: RunSpec
    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.run = RunDir(self.spec.run_dir)
        given, self.spec = self.spec, begun(self.spec, self.run)
        self.widened = self.spec != given
        self.progress = Progress(self.run, self.quiet)

    def guarded(
        self,
        stage: str,
        inputs: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        resumes: bool = False,
        outputs: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Run a stage unless it is complete with equal inputs; its result either way.

        Args:
            resumes: the stage leaves partial output that a later start goes on from, so its inputs are
                recorded first. The inputs of other stages are recorded when they succeed: after a mistake
                they may be mended.
            outputs: files of the run that the stage writes; their sha256 go into the completion record.

        Raises:
            UserError: the run directory holds this stage's output for other inputs.
        """
        if self.run.completed(stage, inputs):
            self.progress.skip(stage)
            return self.run.stage_result(stage)
        if resumes:
            self._record(stage, inputs)
        result = work()
        self._record(stage, inputs)
        self.run.finish(stage, inputs, result, outputs)
        return result

    def locked(self) -> RunLock:
        """The run's lock, to be held while anything is written: `with job.locked(): ...`; see `RunLock`."""

        def lost() -> None:
            request_stop(f"another driver has taken over {self.run.uri}, so this one stops")

        return RunLock(self.run, self.progress.say, lost)

    def _record(self, stage: str, inputs: dict[str, Any]) -> None:
        self.run.begin(stage, inputs)
        self.run.save_spec(self.spec)

    @functools.cached_property
    def endpoints(self) -> Endpoints:
        """Both models as local folders of safetensors, checked to match; converted ones lie in the run."""
        models = self.spec.models
        folder = self.run.path(ENDPOINTS) if self.run.local else _scratch(self.run.uri)
        remote = models.trust_remote_code
        base = resolve(models.base, f"{folder}/base", None, models.base_revision, remote)
        finetuned = resolve(models.finetuned, f"{folder}/finetuned", base, models.finetuned_revision, remote)
        return Endpoints(base, finetuned, remote)

    @functools.cached_property
    def model_hashes(self) -> dict[str, str]:
        """sha256 of each endpoint's weights."""
        return self.endpoints.hashes()

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The run's encoder, on the base model's tokenizer."""
        return spec_encoder(self.spec, self.endpoints.base, self.endpoints.finetuned)

    @functools.cached_property
    def test(self) -> TestSet:
        """The held-out documents of `evaluate.test`, read once."""
        return read_test(self.spec)

    def section(self, name: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """A section of the spec as flat fingerprint fields, `section.field` -> value."""
        fields = getattr(self.spec, name).model_dump(mode="json")
        return {f"{name}.{field}": value for field, value in fields.items() if field not in without}


def begun(spec: RunSpec, run: RunDir) -> RunSpec:
    """The spec as its run directory has it where it says `auto`; see `settled`."""
    return settled(spec, run.load_spec() if run.exists(SPEC) else None)


def local_copy(run: RunDir, name: str) -> str:
    """A path of this host for a folder of the run: where it is, or a copy when the run is on an object store."""
    if run.local:
        return run.path(name)
    folder = os.path.join(_scratch(run.uri), name)
    shutil.rmtree(folder, ignore_errors=True)
    run.fs.get(run.path(name) + "/", folder + "/", recursive=True)
    return folder


def _scratch(uri: str) -> str:
    """A folder of this host for models converted for a run on an object store."""
    folder = os.path.join(tempfile.gettempdir(), f"unbake-{fingerprint(uri)[:16]}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise UserError(f"{folder} belongs to somebody else: set TMPDIR to a folder of your own.")
    return folder
