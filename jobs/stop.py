"""unbake stop: stop a submitted job; the same `unbake submit` goes on where it was."""

from __future__ import annotations

import argparse

from jobs.options import Parser


def main(arguments: list[str]) -> int:
    """Ask the cluster to stop a job."""
    options = parser().parse_args(arguments)
    from cluster.submission import Cluster

    stopped = Cluster(options.address).stop(options.job)
    print(f"{options.job} {'is being stopped' if stopped else 'had ended'}.")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake stop`."""
    made = Parser(prog="unbake stop", description="stop a submitted job", allow_abbrev=False)
    made.add_argument("job", metavar="JOB", help="as `unbake submit` printed it")
    made.add_argument("--address", required=True, metavar="URL", help="the dashboard of the head")
    return made
