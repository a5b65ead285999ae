"""unbake verify: check every byte of a run directory; with --repair, have the next start make anew what is damaged."""

from __future__ import annotations

import argparse

from engine.errors import UserError
from engine.integrity import Findings, verify
from engine.rundir import SPEC, RunDir
from jobs.options import Parser
from jobs.progress import Progress


def main(arguments: list[str]) -> int:
    """Verify the run directory named; the exit code: 0 sound, 1 damaged."""
    options = vars(parser().parse_args(arguments))
    run = RunDir(options["run"])
    if not run.exists(SPEC):
        raise UserError(f"{run.uri} is not a run directory: it has no {SPEC}.")
    count = Progress(run, options["quiet"]).counter("verify", "documents")
    findings = verify(run, count)
    for damage in findings.damage:
        print(damage)
    if findings.damage and options["repair"]:
        for name in dict.fromkeys(name for damage in findings.damage for name in damage.withdraw):
            run.remove(name)
    if findings.damage or not options["quiet"]:
        print(_summary(run, findings, options["repair"]))
    return 1 if findings.damage else 0


def _summary(run: RunDir, findings: Findings, repair: bool) -> str:
    read = f"{findings.partitions:,} partitions, {findings.documents:,} documents"
    unfinished = f"; {findings.missing:,} partitions are not extracted yet" if findings.missing else ""
    if not findings.damage:
        return f"{run.uri}: {read}, all sound{unfinished}"
    again = f"`unbake recover --config {run.path(SPEC)}` makes just that anew"
    if not any(damage.withdraw for damage in findings.damage):
        mend = "it cannot be repaired: extract into another run_dir"
    elif repair:
        mend = f"the records of what is damaged were taken back: {again}"
    else:
        mend = f"`unbake verify {run.uri} --repair` takes its records back, then {again}"
    return f"{run.uri}: {len(findings.damage)} damaged ({read} read{unfinished}); {mend}"


def parser() -> argparse.ArgumentParser:
    """The options of `unbake verify`."""
    made = Parser(prog="unbake verify", description=__doc__.partition(": ")[2], allow_abbrev=False)
    made.add_argument("run", metavar="RUN", help="the run directory: a folder or an fsspec URI")
    made.add_argument("--repair", action="store_true", help="take back the records of what is damaged")
    made.add_argument("-q", "--quiet", action="store_true", help="print damage and errors only")
    return made
