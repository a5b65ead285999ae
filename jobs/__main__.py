"""The command line: `unbake <command>`, the same as `python -m jobs <command>`."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import shlex
import sys
from typing import Any

from engine.errors import UserError, first_line, nearest
from jobs.stopping import EXIT_CODE, Stopped, stoppable
from jobs.usage import example, usage

COMMANDS: dict[str, str] = {
    "recover": "two models and a corpus in: the likely training data, a retrained model and a report out",
    "extract": "label every document and write its projected gradients to the store",
    "select": "choose documents from the store, or from --features and --target of your own",
    "retrain": "train the base model on each compared strategy's selection",
    "evaluate": "judge base, fine-tuned and retrained models on the test set",
    "report": "write the report from what the run holds: HTML, Markdown or JSON",
    "plan": "hours, disk and memory of a run before it runs, from a short calibration",
    "verify": "check every byte of a run directory against its records, and have damage made anew",
    "diagnose": "why a selection is what it is, and when not to trust it",
    "experiment": "a grid of runs that share what they have in common: tables and plots",
    "export": "the selection as a Hugging Face data set or as rows for TRL and axolotl, a model with its card",
    "fork": "a new run directory with the extraction of another, for other selections and trainings",
    "doctor": "whether this machine can run all of it: versions, devices, memory, Ray, DeepSpeed, the Hub",
    "submit": "run a spec on a Ray cluster that is up, and follow it",
    "status": "where a run directory, or a submitted job, stands",
    "stop": "stop a submitted job; submitted again, it goes on",
    "completion": "completion of commands, options and values for bash or zsh",
    "demo": "the whole job on an embedded example; nothing to download but a package",
}

STAGES = {"recover": "pipeline", **{name: name for name in ("extract", "select", "retrain", "evaluate")}}
"""Commands that take a spec and nothing else, and their modules; others have `main(arguments)` of their own."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 a user's mistake, 130 interrupted, 141 nobody reads on, 143 stopped."""
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if _stdout_open():
            raise
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(COMMANDS))
        return 0 if arguments else 2
    command = arguments[0]
    if command not in COMMANDS:
        hint = nearest(command, list(COMMANDS), 3) or f"choose one of {', '.join(COMMANDS)}"
        print(f"unbake: no command {command!r}; {hint}; see unbake --help.", file=sys.stderr)
        return 2
    _calm_libraries()
    if {"-h", "--help"} & set(arguments) and (line := example(command)):
        print(f"example: {line}\n")
    try:
        with stoppable():
            return _run(command, arguments[1:])
    except UserError as error:
        print(f"unbake {command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        sentence = _storage_failed(error)
        if sentence is None:
            raise
        print(f"unbake {command}: {sentence}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\n{stopped}; to go on from here: unbake {shlex.join(arguments)}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print(f"\ninterrupted; to go on from here: unbake {shlex.join(arguments)}", file=sys.stderr)
        return 130


def _storage_failed(error: Exception) -> str | None:
    """Storage that is full, closed to us, or no longer answers, as a sentence; None for any other error."""
    from engine.storage import LASTING, client_errors, reason  # not for the commands that only print

    if isinstance(error, OSError) and error.errno in LASTING:
        return f"cannot write{f' {error.filename}' if error.filename else ''}: {reason(error)}."
    if not isinstance(error, client_errors()):
        return None
    return f"the connection fails ({first_line(error)}): run the same command again, it goes on from there."


def _stdout_open() -> bool:
    """Whether standard output still has a reader; if not, what is left to write goes nowhere."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # captured, in a test or a notebook
        return True
    poll = select.poll()
    poll.register(number, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return False


def _run(command: str, arguments: list[str]) -> int:
    """Run a command: its module's `main(arguments)`, or for a stage, `stage(Job)` of the spec it is given."""
    if command not in STAGES:
        return importlib.import_module(f"jobs.{command}").main(arguments)
    from jobs.options import asked_spec

    options = vars(stage_parser(command).parse_args(arguments))
    if any(options.get(name) for name in ("features", "target", "out")):
        return _select_features(options)
    spec = asked_spec(options)
    if spec is None:
        return 0
    from jobs.job import Job

    module = importlib.import_module(f"jobs.{STAGES[command]}")  # only the one that runs is imported
    job = Job(spec, quiet=options["quiet"], verbose=options["verbose"])
    with job.locked():
        getattr(module, command)(job)
    return 0


def stage_parser(command: str) -> argparse.ArgumentParser:
    """The options of a command in STAGES."""
    from jobs.options import spec_parser

    parser = spec_parser(command, COMMANDS[command])
    if command == "select":
        _features_options(parser)
    return parser


def _features_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("your own gradients, without a run directory")
    group.add_argument("--features", help="(rows, dim) matrix, float16 or float32: .npy or .zarr")
    group.add_argument("--target", help="(dim,) vector: .npy")
    for name in ("size", "strategy", "verify"):
        same = f"select.{name}"
        group.add_argument(
            f"--{name}", dest=same, metavar="V", default=argparse.SUPPRESS, help=f"the same as --{same}"
        )
    group.add_argument("--out", help="where the selection is written (default: selection.parquet)")


def _select_features(options: dict[str, Any]) -> int:
    from jobs.select import select_from_options

    select_from_options(options)
    return 0


def _calm_libraries() -> None:
    """Keep libraries' banners and bars off the terminal, and their thread pools small, before they load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a call of Ray's starts it, for the network
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for a GPU


if __name__ == "__main__":
    sys.exit(main())
