"""What a person types or submits: one thin module a stage, the command line, and `recover` for Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.spec import RunSpec

__all__ = ["recover"]


def recover(
    spec: RunSpec | Mapping[str, Any] | str, *, quiet: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """The whole job, as `unbake recover`: label, take gradients, select, retrain, judge, report.

    Everything is written below `run_dir`; what is complete there already is not done again.

    Args:
        spec: a RunSpec, its fields as a nested mapping, or a path: a YAML spec or a run directory.
        quiet: say nothing while it runs but the table of results.
        verbose: show Ray's own messages too.

    Returns:
        What each stage found, by its name: ``extract``, ``select`` and, where there is a test set,
        ``evaluate`` (metrics.json) as dicts, ``retrain`` a dict by strategy and seed, ``report`` a path.

    Raises:
        engine.errors.UserError: one sentence that says what is wrong with the input and how to mend it.
    """
    from engine.spec import RunSpec
    from jobs.job import Job
    from jobs.options import read_spec
    from jobs.pipeline import recover as run

    if isinstance(spec, str):
        spec = read_spec({"run": spec})
    elif not isinstance(spec, RunSpec):
        spec = RunSpec.from_dict(dict(spec))
    job = Job(spec, quiet=quiet, verbose=verbose)
    with job.locked():
        return run(job)
