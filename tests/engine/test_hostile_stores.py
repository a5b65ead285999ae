"""Stores, plans and specs that are damaged in any way end in their contents or one sentence, never a stack trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.corpus import load_plan, make_plan
from engine.errors import UserError
from engine.gradients import PartitionGradients
from engine.integrity import Damage, verify
from engine.rundir import RunDir, fingerprint
from engine.spec import Corpus, RunSpec
from engine.store import GradientStore, StoreShape

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("sound"))


def make_run(folder: Path) -> Path:
    """A run with a plan, a store of three partitions and a stage's record."""
    (folder / "c.txt").write_text("".join(f"document {i}\n" for i in range(21)))
    run = RunDir(str(folder / "run"))
    plan = make_plan(Corpus(paths=[str(folder / "c.txt")], partition_rows=8), run)
    inputs = {"corpus": plan.fingerprint}
    run.begin("extract", inputs)
    store = GradientStore.create(
        run, StoreShape(2, 21, 16, 8), np.ones(16), {"fingerprint": fingerprint(inputs)}
    )
    for partition in range(3):
        n = len(plan.partition_range(partition))
        ones = np.ones((2, n), np.float32)
        features = np.full((2, n, 16), 0.25, np.float16)
        label, tokens = np.zeros(n, np.int32), np.ones(n, np.int32)
        columns = PartitionGradients(features, ones, ones, ones, ones, label, ones[0], tokens, {})
        store.write(partition, columns, fingerprint(inputs), {})
    run.finish("extract", inputs)
    assert verify(run).damage == []
    return folder / "run"


def damage(data: bytes, how: str, place: int, with_: bytes) -> bytes:
    """A changed copy: bytes replaced, removed or put in, the end cut off, or all of it something else."""
    at = place % (len(data) + 1)
    return {
        "replace": data[:at] + with_ + data[at + len(with_) :],
        "insert": data[:at] + with_ + data[at:],
        "delete": data[:at] + data[at + len(with_) :],
        "cut": data[:at],
        "all": with_,
    }[how]


@QUICK
@given(
    st.integers(0, 10**6),
    st.sampled_from(["replace", "insert", "delete", "cut", "all"]),
    st.integers(0, 10**6),
    st.one_of(
        st.binary(max_size=8),
        st.sampled_from([b"null", b"-1", b"{}", b"[]", b"1e999", b'"x"', b"99999999999999999999"]),
    ),
)
def test_a_damaged_run_is_read_or_one_sentence_and_verify_names_something(
    sound: Path, which: int, how: str, place: int, with_: bytes
) -> None:
    folder = sound
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[which % len(files)]
    before = file.read_bytes()
    after = damage(before, how, place, with_)
    file.write_bytes(after)
    try:
        found = read_all(RunDir(str(folder)))
    finally:
        file.write_bytes(before)
    if meaning(after) != meaning(before) and not file.name.endswith((".parquet", "extract.json")):
        assert found, file


def test_a_file_that_may_not_be_read_is_one_sentence(unprivileged: Path) -> None:
    folder = make_run(unprivileged)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0)
        assert read_all(RunDir(str(folder))), file
        file.chmod(0o600)
    assert not read_all(RunDir(str(folder)))


def meaning(data: bytes) -> object:
    """What JSON says, whatever its white space; bytes that are no JSON as they are."""
    try:
        return json.dumps(json.loads(data), sort_keys=True)
    except ValueError:
        return data


def read_all(run: RunDir) -> bool:
    """Read a run in every way; whether something was said of it. Anything but a sentence is raised."""
    said: list[str] = []
    for read in (
        lambda: GradientStore.open(run).read(0, 21),
        lambda: GradientStore.open(run).take(np.array([0, 9, 20])),
        lambda: GradientStore.open(run).done("f"),
        lambda: load_plan(run),
    ):
        said += sentence(read)
    findings: list[Damage] = []
    said += sentence(lambda: findings.extend(verify(run).damage))
    return bool(said or findings)


def sentence(work: Callable[[], object]) -> list[str]:
    """What a UserError of the work says, which is one line."""
    try:
        work()
    except UserError as error:
        text = str(error)
    else:
        return []
    assert "\n" not in text
    return [text]


@QUICK
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(
                    st.sampled_from(list(RunSpec.model_fields)),
                    st.sampled_from(["paths", "base", "labels", "kind"]),
                ),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
def test_any_yaml_is_a_spec_or_one_sentence(value: object) -> None:
    sentence(lambda: RunSpec.from_yaml(yaml.safe_dump(value)))


@QUICK
@given(
    st.one_of(
        st.text(max_size=60),
        st.sampled_from(["a: &a [*a]", "- " * 50, "{" * 50, "a: !!python/object:os.system x", "\t"]),
    )
)
def test_any_text_is_a_spec_or_one_sentence(text: str) -> None:
    sentence(lambda: RunSpec.from_yaml(text))
