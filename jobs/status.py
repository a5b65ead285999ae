"""unbake status: where a run stands, from its run directory alone; or a submitted job, from its cluster."""

from __future__ import annotations

import argparse
import json

from engine.lock import owner
from engine.rundir import DONE, LOG, PLAN, SPEC, STAGES, RunDir
from engine.spec import RunSpec
from jobs.options import Parser


def main(arguments: list[str]) -> int:
    """Print the state; the exit code: 0, or that of a submitted job which failed."""
    options = parser().parse_args(arguments)
    if options.address:
        return _job(options.address, options.what)
    run = RunDir(options.what)
    state = run_state(run, run.load_spec())
    print(json.dumps(state, indent=1) if options.json else _text(run, state))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake status`."""
    made = Parser(prog="unbake status", description=__doc__.partition(": ")[2], allow_abbrev=False)
    made.add_argument(
        "what", metavar="RUN|JOB", help="a run directory (folder or URI); with --address, a job"
    )
    made.add_argument("--address", metavar="URL", help="the dashboard of the head that has the job")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run_state(run: RunDir, spec: RunSpec) -> dict[str, object]:
    """What a run directory tells, on any URI and without Ray.

    Returns:
        driver: "host H, process P, since S" of the one at work, or None. partitions, partitions_done: of the
        extraction (None before the plan). stages: name -> complete or begun. picks: name -> picks kept of a
        selection at work. last: the last line of log.jsonl.
    """
    names = run.names(STAGES)
    complete = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    complete -= {name for name in complete if name.endswith(".inputs")}
    begun = {name.removesuffix(".inputs.json") for name in names if name.endswith(".inputs.json")}
    rows = run.read_table(PLAN, columns=["partition"])["partition"].to_pylist() if run.exists(PLAN) else None
    return {
        "driver": owner(run),
        "partitions": None if rows is None else max(rows, default=-1) + 1,
        "partitions_done": sum(name.endswith(".json") and name[0].isdigit() for name in run.names(DONE)),
        "stages": {name: "complete" if name in complete else "begun" for name in sorted(complete | begun)},
        "picks": {
            f"{name.removesuffix('.journal')}": _picks(run, f"{STAGES}/{name}")
            for name in names
            if name.endswith(".journal")
        },
        "size": spec.select.size,
        "last": _last(run),
    }


def _picks(run: RunDir, journal: str) -> int:
    """Picks kept: each file of a journal is named by those before it."""
    steps = sorted(name for name in run.names(journal) if name[0].isdigit() and name.endswith(".json"))
    return int(steps[-1].removesuffix(".json")) + len(run.read_json(f"{journal}/{steps[-1]}")) if steps else 0


def _last(run: RunDir) -> dict[str, object] | None:
    lines = run.read_bytes(LOG).splitlines() if run.exists(LOG) else []
    for line in reversed(lines[-2:]):  # the very last one may be half-written
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return None


def _text(run: RunDir, state: dict[str, object]) -> str:
    lines = [f"{run.uri}: {'at work: ' + str(state['driver']) if state['driver'] else 'nobody is at work'}"]
    if state["partitions"] is not None:
        lines.append(f"  extract: {state['partitions_done']} of {state['partitions']} partitions")
    stages, picks = state["stages"], state["picks"]
    assert isinstance(stages, dict)
    assert isinstance(picks, dict)
    for name, is_ in stages.items():
        kept = f", {picks[name]} of {state['size']} picks kept" if name in picks else ""
        lines.append(f"  {name}: {is_}{kept}")
    if not state["driver"] and "begun" in stages.values():
        lines.append(f"unbake recover {run.path(SPEC)} goes on from here.")
    return "\n".join(lines)


def _job(address: str, job: str) -> int:
    from cluster.submission import Cluster

    cluster = Cluster(address)
    status = cluster.status(job)
    print(f"{job}: {status.value.lower()}. {cluster.message(job)}")
    return cluster.exit_code(job) if status.is_terminal() else 0
