"""unbake submit: run a spec on a cluster that is up, and follow it from here."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UserError
from jobs.options import parse_spec, spec_parser
from jobs.stopping import EXIT_CODE, Stopped

if TYPE_CHECKING:
    from cluster.submission import Cluster
    from engine.spec import RunSpec

COMMANDS = ("recover", "extract", "select", "retrain", "evaluate", "report")


def main(arguments: list[str]) -> int:
    """Submit, and unless told otherwise follow; the job's exit code."""
    spec, options = parse_spec(parser(), arguments)
    if spec is None:
        return 0
    check_paths(spec)
    from cluster.submission import Cluster, carried, in_image

    cluster = Cluster(options["address"])
    told = (spec.to_yaml(), options["command"])
    with tempfile.TemporaryDirectory(prefix="unbake-") as folder:
        image = options["image"]
        work = in_image(*told, image) if image else carried(*told, Path(folder), options["pip"])
        job = cluster.submit(work, spec.run_dir)
    print(f"{job} is submitted; unbake status {job} --address {options['address']}", file=sys.stderr)
    if not options["wait"]:
        return 0
    return attend(cluster, job, options["follow"])


def parser() -> argparse.ArgumentParser:
    """The options of `unbake submit`."""
    made = spec_parser("submit", "run a spec on a Ray cluster that is up")
    group = made.add_argument_group("the cluster")
    group.add_argument(
        "--address", required=True, metavar="URL", help="the dashboard of the head: http://127.0.0.1:8265"
    )
    group.add_argument("--command", choices=COMMANDS, default="recover", help="default: recover")
    group.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="until it ends")
    group.add_argument(
        "--follow", action=argparse.BooleanOptionalAction, default=True, help="show its output"
    )
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--pip", action="store_true", help="install unbake's dependencies there; default: the nodes have them"
    )
    where.add_argument(
        "--image", metavar="URI", help="run in containers of this image, which has unbake; nodes need podman"
    )
    return made


def check_paths(spec: RunSpec) -> None:
    """Refuse paths that mean something on this machine alone.

    Raises:
        UserError: a relative path, which the cluster would look for in a folder of the job's.
    """
    paths = {
        "run_dir": [spec.run_dir],
        "corpus.paths": spec.corpus.paths,
        "evaluate.test": spec.evaluate.test,
    }
    paths["evaluate.train"] = spec.evaluate.train
    for name in ("base", "finetuned"):
        source = getattr(spec.models, name)
        if Path(source).exists() or source.startswith("."):  # else it may be a name on the Hub
            paths[f"models.{name}"] = [source]
    for name, values in paths.items():
        for value in values:
            if "://" not in value and not Path(value).is_absolute():
                raise UserError(
                    f"{name} = {value} is relative to a folder of this machine: give an absolute path that every "
                    "node sees, or a URI such as s3://bucket/path."
                )


def attend(cluster: Cluster, job: str, follow: bool) -> int:
    """Wait for a job; Ctrl-C asks whether to stop it, SIGTERM or nobody to ask leaves it running."""
    try:
        if not follow:
            return cluster.wait(job)
        return cluster.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt as error:
        stopped = isinstance(error, Stopped)
        asks = sys.stdin.isatty() and not stopped
        if asks and input(f"\nstop {job} too? [y/N] ").strip().lower() in ("y", "yes"):
            cluster.stop(job)
            return 130
        print(f"\n{job} goes on; unbake stop {job} --address {cluster.address}", file=sys.stderr)
        return EXIT_CODE if stopped else 130
