"""Runs that are killed: drivers as processes of their own, victims found and killed, bytes compared at the end."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

from engine.integrity import verify
from engine.lock import LOCK
from engine.rundir import RunDir
from engine.spec import RunSpec
from jobs.extract import extract
from jobs.job import Job
from jobs.stopping import EXIT_CODE

_drivers = multiprocessing.get_context("forkserver")  # what takes seconds to import is imported once
_drivers.set_forkserver_preload(["faults.preload"])

ACTORS = ("MapWorker", "ShardActor", "RayTrainWorker")
"""What our Ray workers call themselves: extraction's two pools, index shards, training."""


def make_case(folder: Path, documents: int = 1024, partition_rows: int = 64, **sections: Any) -> Path:
    """A spec whose extraction has 16 partitions and takes seconds; its file. Models are made beside it."""
    if not (folder / "base").exists():
        tiny.save_model(folder / "base")
        tiny.save_model(folder / "finetuned", perturb=0.02)
        rng = random.Random(1)
        texts = [text for text, _ in tiny.sentences(documents * 4, seed=3)]
        rows = [{"text": " ".join(rng.choices(texts, k=rng.randint(1, 7)))} for _ in range(documents)]
        rows[17]["text"] = ""  # one that is quarantined
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "models": {"base": str(folder / "base"), "finetuned": str(folder / "finetuned")},
        "corpus": {"paths": [str(folder / "corpus.jsonl")], "partition_rows": partition_rows},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 96},
        "gradients": {"dtype": "float32", "checkpoints": 2, "projector": "tensorsketch", "dim": 256},
        "extract": {
            "threads": 1, "workers_min": 2, "workers_max": 2, "cpus_per_worker": 0.5, "max_attempts": 10
        },
        "select": {"size": 240, "shards": 2, "index_memory_mb": 4},
        "retrain": {
            "strategies": ["greedy"], "epochs": 2, "batch_size": 8, "dtype": "float32", "threads": 1,
            "checkpoint_steps": 4, "learning_rate": 1e-3, "max_failures": 20,
        },
    }  # fmt: skip
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def run(case: Path, name: str, **settings: object) -> Path:
    """One extraction in this process, whose workers' classes tests may change, into `name`."""
    fields = yaml.safe_load(case.read_text())
    fields["run_dir"] = str(case.parent / name)
    fields["extract"] |= settings
    extract(Job(RunSpec.from_dict(fields), quiet=True))
    return case.parent / name


def outputs(run: Path) -> dict[str, str]:
    """sha256 of everything that has to be equal after any faults: plan, store, records, selections, weights."""
    kinds = ("plan.parquet", "gradients", "done", "selection.parquet", "comparisons", "quarantine.parquet")
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and (name.startswith(kinds) or path.name == "model.safetensors"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_same(run: Path, reference: Path) -> None:
    """Every output has the bytes of the undisturbed run's, and the run verifies."""
    ours, theirs = outputs(run), outputs(reference)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    other = [name for name in theirs if ours[name] != theirs[name]]
    assert other == [], other  # pytest says nothing of an assertion outside tests
    damage = verify(RunDir(str(run))).damage
    assert damage == [], damage


class Driver:
    """One `unbake COMMAND` in a process of its own, connected to the Ray at `address`."""

    def __init__(self, command: str, config: Path, run: Path, address: str | None, *more: str) -> None:
        arguments = [command, "--config", str(config), "--run_dir", str(run), "--quiet", *more]
        arguments += ["--ray.address", address] if address else []
        self.said = run.parent / f"{run.name}-{time.monotonic_ns()}.said"
        self.process = _drivers.Process(target=_drive, args=(arguments, str(self.said)))
        self.process.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the driver hangs"
        return self.process.exitcode


def _drive(arguments: list[str], said: str) -> None:
    from jobs.__main__ import main

    with open(said, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def workers(*kinds: str) -> list[psutil.Process]:
    """Live worker processes of this process's Ray whose title names one of the kinds."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and any(kind in title for kind in kinds or ACTORS):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(process: psutil.Process) -> bool:
    """kill -9; False when it was gone already."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def stage_of(run: Path) -> str:
    """The stage that the log of a run says is running; of a selection that has kept no pick yet, "index"."""
    try:
        last = (run / "log.jsonl").read_text().splitlines()[-1]
        record = json.loads(last)
    except (OSError, IndexError, ValueError):
        return "start"
    if record["event"] in ("end", "failed", "skipped"):
        return "between"
    picked = any(run.glob("stages/*.journal/[0-9]*.json"))
    return "index" if record["stage"] == "select" and not picked else str(record["stage"])


def progress_of(run: Path) -> tuple[int, ...]:
    """Numbers that grow while a run gets on: records, journal steps, log lines, files of checkpoints."""
    counts = [len(list(run.glob(pattern))) for pattern in ("done/*.json", "stages/**/*.json")]
    log = run / "log.jsonl"
    return (*counts, log.stat().st_size if log.exists() else 0)


@dataclass
class Soak:
    """Random kills over as many runs of a case as it takes; each run has to end with the reference's bytes.

    A driver may end by the signal that it was sent, with one sentence after a worker was killed, or well.
    """

    config: Path
    reference: Path
    address: str
    seed: int
    command: str = "recover"
    patience: float = 3.0
    per_stage: int = 12
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._others: set[int] = set()
        self._struck = False
        self._here = Counter[str]()
        self._deadline = float("inf")

    @property
    def kills(self) -> int:
        """How many kill -9 so far."""
        return sum(self.killed.values())

    def until(self, kills: int, seconds: float = float("inf")) -> None:
        """Run, kill, resume and compare until so many kills; after so many seconds no more are begun."""
        self._deadline = time.monotonic() + seconds
        while self.kills < kills and time.monotonic() < self._deadline:
            self.one_run(kills)

    def one_run(self, limit: int) -> None:
        """One run directory from nothing to its end, `per_stage` kills in each stage, or until `limit` in all."""
        self._here.clear()
        run = self.reference.parent / f"soak-{self.seed}-{self.runs}"
        driver = self._start(run)
        while True:
            late = self.kills >= limit or time.monotonic() >= self._deadline
            if driver.alive and not late and self._here[stage_of(run)] < self.per_stage:
                self._wait_for_a_moment(run, driver)
                if driver.alive:
                    self._strike(run, driver)
            else:
                driver.process.join(0.1)
            if not driver.alive:
                code = driver.wait()
                if code == 0:
                    break
                said = (code, driver.said.read_text()[-3000:] if driver.said.exists() else "nothing")
                assert self._struck, said
                assert code in (-signal.SIGKILL, -signal.SIGTERM, EXIT_CODE, 2), said
                driver = self._start(run)
        assert_same(run, self.reference)
        self.runs += 1
        shutil.rmtree(run)

    def _start(self, run: Path) -> Driver:
        self.starts += 1
        self._struck = False
        self._others = {process.pid for process in workers()}  # a dead driver's, on their way out
        return Driver(self.command, self.config, run, self.address)

    def _wait_for_a_moment(self, run: Path, driver: Driver) -> None:
        """Mostly until the run has got on since the last kill, and a random while longer; at times at once."""
        if self._rng.random() < 0.9:
            deadline = time.monotonic() + self.patience
            while driver.alive and not self._victims() and time.monotonic() < deadline:
                time.sleep(0.05)
        if self._rng.random() < 0.6:
            before, deadline = progress_of(run), time.monotonic() + self.patience
            while driver.alive and progress_of(run) == before and time.monotonic() < deadline:
                time.sleep(0.02)
        deadline = time.monotonic() + self._rng.random() * 0.7
        while driver.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def _victims(self) -> list[psutil.Process]:
        return [process for process in workers() if process.pid not in self._others]

    def _strike(self, run: Path, driver: Driver) -> None:
        kinds = ("worker", "all workers", "driver", "stop")
        stage, kind = stage_of(run), self._rng.choices(kinds, (8, 1, 2, 0.5))[0]
        if kind in ("driver", "stop"):
            self._struck = True
            driver.signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)
            code = driver.wait()
            if kind == "driver":
                self._count(stage, kind)
            elif code == EXIT_CODE:  # not one that had ended, or had not begun to listen
                self.stopped[stage] += 1
                assert not (run / LOCK).exists()
                assert "to go on from here: unbake" in driver.said.read_text()
            return
        victims = self._victims()
        if kind == "worker":
            victims = [self._rng.choice(victims)] if victims else []
        died = [kill(victim) for victim in victims]
        if any(died):
            self._struck = True
            self._count(stage, kind)

    def _count(self, stage: str, kind: str) -> None:
        self.killed[stage, kind] += 1
        self._here[stage] += 1
