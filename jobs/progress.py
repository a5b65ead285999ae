"""Progress of long stages: a live bar in a terminal, plain lines elsewhere, and log.jsonl for machines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.progress
from rich.console import Console
from rich.text import Text

from engine.errors import UserError
from engine.rundir import LOG, RunDir
from engine.storage import reason

LINE_SECONDS = 15.0
"""Seconds between progress lines where there is no terminal."""

LOG_SECONDS = 2.0
"""Seconds between progress records in log.jsonl."""


class Log:
    """Appends records to log.jsonl of a run; on an object store, which cannot append, at the end of a stage."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._pending: list[str] = []

    def write(self, stage: str, event: str, **fields: Any) -> None:
        """One line: {"time": unix seconds, "stage", "event", ...}."""
        record = {"time": round(time.time(), 3), "stage": stage, "event": event, **fields}
        self._pending.append(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if self._run.local:
            self.flush()

    def flush(self) -> None:
        """Bring pending lines to the file."""
        if not self._pending:
            return
        lines, self._pending = "".join(self._pending), []
        if self._run.local:
            self._run.make()
            try:
                with open(self._run.path(LOG), "a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:
                raise UserError(f"cannot write {self._run.path(LOG)}: {reason(error)}.") from None
            return
        before = self._run.read_bytes(LOG) if self._run.exists(LOG) else b""
        self._run.write_bytes(LOG, before + lines.encode())


class Stage:
    """One running stage: `advance` counts units done; everybody who shows progress hangs on it."""

    def __init__(self, progress: Progress, name: str, total: int, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._progress, self._first = progress, done
        self._start = self._logged = self._printed = time.monotonic()
        self._bar: rich.progress.TaskID | None = None
        self._rows: dict[str, str] = {}
        self._row_bars: dict[str, rich.progress.TaskID] = {}

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second in this process."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    @property
    def pace(self) -> str:
        """Rate and time left, as people read them; empty before anything is done."""
        if not self.rate:
            return ""
        from engine.report.numbers import duration  # loads what draws reports

        return f"{self.rate:,.1f}/s, {duration((self.total - self.done) / self.rate)} left"

    def advance(self, units: int = 1) -> None:
        """Count units as done."""
        self.done += units
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._progress.log.write(
                self.name, "progress", done=self.done, total=self.total, rate=round(self.rate, 3)
            )
        if self._bar is not None and self._progress.live is not None:
            self._progress.live.update(self._bar, completed=self.done, pace=self.pace)
        elif now - self._printed >= LINE_SECONDS:
            self._printed = now
            self._progress.say(f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {self.pace}")
            for name, text in self._rows.items():
                self._progress.say(f"  {name}: {text}")

    def row(self, name: str, done: int, total: int, text: str) -> None:
        """Show one of several things at work under the stage, until its last unit; `advance` prints it."""
        self._rows[name] = text
        if done >= total:
            del self._rows[name]
        if self._bar is not None and self._progress.live is not None:
            if name not in self._row_bars:
                self._row_bars[name] = self._progress.live.add_task("", total=total)
            self._progress.live.update(self._row_bars[name], completed=done, description=f"  {name}: {text}")

    def update(self, done: int, total: int | None = None) -> None:
        """Set the number of units done, and the total where it becomes known late."""
        if total is not None and total != self.total:
            self.total = total
            if self._bar is not None and self._progress.live is not None:
                self._progress.live.update(self._bar, total=total)
        if done > self.done:
            self.advance(done - self.done)


class _Pace(rich.progress.ProgressColumn):
    """Rate and time left over the whole stage: partitions come in bursts, which rich's own estimate follows."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(task.fields.get("pace", ""))


class Progress:
    """Where a job talks to: the terminal, unless quiet, and the run's log.

    Args:
        run: the run directory.
        quiet: print nothing but results and errors.
    """

    def __init__(self, run: RunDir, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.out = Console(highlight=False)
        self.log = Log(run)
        self.quiet = quiet
        self.live: rich.progress.Progress | None = None

    def say(self, text: str) -> None:
        """One line for the person."""
        self.console.print(text, markup=False, soft_wrap=True)

    def skip(self, stage: str) -> None:
        """Say that a stage is complete already."""
        self.say(f"{stage}: complete already, skipped")
        self.log.write(stage, "skipped")

    def warn(self, stage: str, text: str) -> None:
        """A warning, for the person and the log."""
        self.say(f"warning: {text}")
        self.log.write(stage, "warning", text=text)

    def counter(self, name: str, unit: str) -> Callable[[int], None]:
        """For work of unknown length: a function that takes the units done so far, and says so now and then."""
        last = time.monotonic()

        def count(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.say(f"{name}: {done:,} {unit}")
                self.log.write(name, "progress", done=done)

        return count

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Stage]:
        """Run a stage of `total` units, of which `done` were done by an earlier start."""
        stage = Stage(self, name, total, unit, done)
        self.log.write(name, "begin", total=total, unit=unit, done=done)
        try:
            with self._bar(stage):
                yield stage
        except BaseException as error:
            self.log.write(
                name, "failed", error=f"{type(error).__name__}: {error}", seconds=round(stage.seconds, 3)
            )
            self.log.flush()
            raise
        self.log.write(
            name, "end", done=stage.done, seconds=round(stage.seconds, 3), rate=round(stage.rate, 3)
        )
        self.log.flush()
        self.say(f"{name}: {stage.done:,} {unit} in {stage.seconds:,.1f} s")

    @contextlib.contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        if self.quiet or not sys.stderr.isatty():
            if not self.quiet and stage.total:
                self.say(f"{stage.name}: {stage.total - stage.done:,} {stage.unit} to do")
            yield
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(stage.unit),
            rich.progress.TimeElapsedColumn(),
            _Pace(),
        )
        with rich.progress.Progress(*columns, console=self.console, transient=True) as self.live:
            stage._bar = self.live.add_task(stage.name, total=stage.total, completed=stage.done)
            try:
                yield
            finally:
                self.live = None
