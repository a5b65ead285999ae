"""unbake fork: a new run directory that begins with another's extraction, for other selections and trainings."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator

from engine.errors import UserError
from engine.rundir import CORPUS, DONE, ENDPOINTS, LAYOUT, PLAN, QUARANTINE, STAGES, STORE, RunDir
from engine.storage import reason
from jobs.options import Parser

KEPT = (ENDPOINTS, PLAN, CORPUS, STORE, LAYOUT, DONE, QUARANTINE, f"{STAGES}/extract.inputs.json")
"""What an extraction is made of, but for the record that it is complete, which is written last."""


def main(arguments: list[str]) -> int:
    """Fork a run directory; say what to do with it."""
    options = parser().parse_args(arguments)
    new = fork(RunDir(options.run), RunDir(options.new))
    print(
        f"{new.uri} has the extraction of {options.run}; next: unbake recover {options.new} --select.size K"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake fork`."""
    made = Parser(prog="unbake fork", description=__doc__.partition(": ")[2], allow_abbrev=False)
    made.add_argument("run", metavar="RUN", help="a run directory whose extraction is complete")
    made.add_argument(
        "new", metavar="NEW", help="a folder that is not there yet; on RUN's disk it takes no space"
    )
    return made


def fork(run: RunDir, new: RunDir) -> RunDir:
    """Give `new` the extraction of `run`: hard links on one disk, copies elsewhere. Returns `new`.

    Files of a run are replaced, never written into, so what happens to one run leaves the other as it was.

    Raises:
        UserError: the extraction is not complete, `new` is not empty, or it cannot be written.
    """
    spec = run.load_spec()
    run.stage_fingerprint("extract")
    if new.names():
        raise UserError(f"{new.uri} is not empty: name a folder that is not there yet.")
    for name in _files(run):
        _share(run, new, name)
    new.save_spec(spec.model_copy(update={"run_dir": new.uri}))
    _share(run, new, f"{STAGES}/extract.json")
    return new


def _files(run: RunDir) -> Iterator[str]:
    for name in KEPT:
        if run.exists(name):
            yield from run.walk(name)


def _share(run: RunDir, new: RunDir, name: str) -> None:
    new.make(os.path.dirname(name))
    if run.local and new.local:
        try:
            os.link(run.path(name), new.path(name))
            return
        except OSError:  # another disk, or one without hard links
            pass
    try:
        with run.fs.open(run.path(name), "rb") as source, new.fs.open(new.path(name), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise UserError(f"cannot write {new.path(name)}: {reason(error)}.") from None
