"""The Python API: names are where the documentation says, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import engine
import jobs
from engine.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", engine.__all__)
def test_every_name_of_engine_is_there_and_documented(name: str) -> None:
    found = getattr(engine, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(engine)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = engine.nothing


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, engine\nfrom jobs import recover\n"
        "sys.exit(str({'torch', 'ray', 'numpy', 'transformers'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" or done.stderr == "\n", done.stderr


def test_recover_takes_a_spec_a_mapping_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("jobs.pipeline.recover", lambda job: given.append(job) or {"report": "x"})
    fields = {
        "run_dir": str(tmp_path / "run"), "models": {"base": "a", "finetuned": "b"}, "corpus": {"paths": ["c"]},
        "task": {"kind": "language_modelling"},
    }  # fmt: skip
    spec = engine.RunSpec.from_dict(fields)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    engine.RunDir(spec.run_dir).save_spec(spec)
    for form in (spec, fields, str(tmp_path / "run.yaml"), spec.run_dir):
        assert jobs.recover(form, quiet=True) == {"report": "x"}
    assert [job.spec for job in given] == [spec] * 4
    assert all(job.quiet for job in given)
    with pytest.raises(UserError, match="corpus is missing"):
        jobs.recover({"models": {"base": "a", "finetuned": "b"}, "task": fields["task"]})
