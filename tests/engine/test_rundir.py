"""Run directory: complete stages are known by their inputs, others are refused by the name of the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.rundir import RunDir, fingerprint
from engine.spec import RunSpec

SPEC = RunSpec.from_dict(
    {"models": {"base": "a", "finetuned": "b"}, "corpus": {"paths": ["c"]}, "task": {"labels": ["yes", "no"]}}
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


def test_a_stage_is_complete_only_once_finished_with_equal_inputs(run: RunDir) -> None:
    inputs = {"a": 1, "b": [1, 2]}
    assert not run.completed("s", inputs)
    run.begin("s", inputs)
    assert not run.completed("s", inputs)
    run.finish("s", inputs, {"n": 3})
    assert run.completed("s", {"b": [1, 2], "a": 1})
    assert run.stage_result("s") == {"n": 3}
    assert run.stage_fingerprint("s") == fingerprint(inputs)


@pytest.mark.parametrize("finished", [False, True])
def test_other_inputs_are_refused_by_the_name_of_the_field(run: RunDir, finished: bool) -> None:
    run.begin("s", {"models.base": "x", "gradients.dim": 8})
    if finished:
        run.finish("s", {"models.base": "x", "gradients.dim": 8})
    for other in ({"models.base": "x", "gradients.dim": 16}, {"models.base": "x"}):
        with pytest.raises(UserError, match=r"gradients\.dim = 8") as caught:
            run.completed("s", other)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"gradients\.dim"):
            run.begin("s", other)


def test_a_failed_beginning_can_be_taken_back_and_a_finished_stage_cannot(run: RunDir) -> None:
    run.begin("s", {"a": 1})
    run.forget("s")
    run.begin("s", {"a": 2})
    run.finish("s", {"a": 2})
    run.forget("s")
    with pytest.raises(UserError, match="a = 2"):
        run.completed("s", {"a": 1})


def test_a_missing_stage_is_named_with_the_command_that_makes_it(run: RunDir) -> None:
    with pytest.raises(UserError, match="run `unbake extract` first"):
        run.stage_fingerprint("extract")


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.floats(0, 1)))))
def test_fingerprints_depend_on_values_and_not_on_their_order(inputs: dict[str, object]) -> None:
    assert fingerprint(inputs) == fingerprint(dict(reversed(inputs.items())))
    assert fingerprint(inputs) != fingerprint({**inputs, "one more": 1})


def test_the_saved_spec_replays_the_run(run: RunDir) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        run.load_spec()
    run.save_spec(SPEC)
    assert run.load_spec() == SPEC


def test_a_mistake_leaves_the_folder_as_it_was(run: RunDir) -> None:
    def fail() -> None:
        with run.unchanged_on_mistake():
            run.write_bytes("plan.parquet", b"x")
            run.write_bytes("corpus/part", b"x")
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fail()
    assert not Path(run.root).exists()
    run.write_bytes("corpus/old", b"x")
    with pytest.raises(UserError, match="no"):
        fail()
    assert run.names() == ["corpus"]
    with run.unchanged_on_mistake():
        run.write_bytes("plan.parquet", b"x")
    assert run.names() == ["corpus", "plan.parquet"]
