"""The spec: YAML in and out is the identity, and a wrong field is refused in one sentence that names it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.spec import RunSpec

CLASSIFY: dict[str, Any] = {
    "models": {"base": "a", "finetuned": "b"},
    "corpus": {"paths": ["c"]},
    "task": {"labels": ["yes", "no"]},
}
MODEL: dict[str, Any] = {**CLASSIFY, "task": {"kind": "language_modelling"}}
PAIRS: dict[str, Any] = {**MODEL, "corpus": {"paths": ["c"], "prompt": "q", "response": "r"}}
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def changed(fields: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    fields = copy.deepcopy(fields)
    section = fields
    *path, last = name.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = value
    return fields


@settings(max_examples=30, deadline=None)
@example("\x85\u2028\ufeff", ["\x85 a", "no"], "{text}\u2028", 1, 1e-4, None)
@given(
    text,
    st.lists(text, min_size=2, unique=True),
    text.map(lambda t: t.replace("{text}", "").rstrip(" ") + "{text}\nTopic:"),
    st.one_of(st.integers(1, 9), st.lists(st.floats(0, 1), min_size=1, unique=True)),
    st.floats(1e-12, 1e3),
    st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_yaml_round_trip_is_the_identity(
    path: str, labels: list[str], template: str, checkpoints: Any, rate: float, most: int | None
) -> None:
    fields = changed(CLASSIFY, "task", {"labels": labels, "template": template})
    fields = changed(fields, "corpus", {"paths": [path], "max_documents": most})
    fields = changed(fields, "gradients.checkpoints", checkpoints)
    spec = RunSpec.from_dict(changed(fields, "retrain.learning_rate", rate))
    assert RunSpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    "fields", [CLASSIFY, MODEL, PAIRS], ids=["classification", "language_modelling", "pairs"]
)
def test_the_written_spec_holds_every_field(fields: dict[str, Any]) -> None:
    spec = RunSpec.from_dict(fields)
    assert RunSpec.from_yaml(spec.to_yaml()).to_yaml() == spec.to_yaml()
    for section in RunSpec.model_fields:
        assert f"{section}:" in spec.to_yaml()


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSpec.from_dict(CLASSIFY).select.size = 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("selection.size", 3, ["unknown field selection"]),
        ("select.sise", 3, ["unknown field select.sise", "did you mean select.size?"]),
        ("select.learning_rate", 1, ["did you mean retrain.learning_rate?"]),
        ("corpus.column", "x", ["corpus has paths, hub", "text, id"]),
        ("sellect", {"size": 3}, ["did you mean select?"]),
        ("select.size", 0, ["select.size", "greater than or equal to 1", "0"]),
        ("select.size", "many", ["select.size", "many"]),
        ("select.strategy", "best", ["select.strategy", "greedy_batched", "best"]),
        ("retrain.strategies", ["greedy", "best"], ["retrain.strategies.1", "best"]),
        ("retrain.strategies", ["greedy", "greedy"], ["retrain.strategies", "repetitions"]),
        ("retrain.seeds", [], ["retrain.seeds", "non-empty"]),
        ("retrain.patience", 2, ["retrain", "patience needs early_stopping"]),
        ("retrain.offload_parameters", True, ["offload_parameters needs zero_stage 3"]),
        ("gradients.checkpoints", 0, ["gradients.checkpoints", "at least 1"]),
        ("gradients.checkpoints", "x", ["gradients.checkpoints:", "x"]),
        ("gradients.checkpoints", [0.5, 1.5], ["gradients.checkpoints", "between 0 and 1"]),
        (
            "select.checkpoints",
            [0.5],
            ["select.checkpoints asks for 0.5", "not among gradients.checkpoints (1)"],
        ),
        ("select.checkpoints", [], ["select", "checkpoints must be one fraction or more"]),
        ("gradients.projector", "jl", ["gradients.projector", "tensorsketch"]),
        ("task.labels", ["one"], ["task.labels", "two label words"]),
        ("task.labels", [True, False], ["task.labels.0", "quotes"]),
        ("task.labels", "abc", ["task.labels", "two label words"]),
        ("task.labels", {"a": "b"}, ["task.labels", "list", "'a': 'b'"]),
        ("task.template", "no text", ["task.template", "{text}"]),
        ("task.template", "{text} or {text}", ["task.template", "once"]),
        ("task.template", r"{text}\nTopic:", ["task.template", "double quotes"]),
        ("task.template", "{text} is ", ["task.template", "space"]),
        ("task.loss_scope", "all_tokens", ["task.loss_scope", "last_token"]),
        ("task.display_names", ["x"], ["task.display_names", "task.labels"]),
        ("task.kind", "language_modelling", ["task.labels is for classification"]),
        ("corpus.hub", "x", ["corpus.paths or corpus.hub"]),
        ("corpus.paths", [], ["corpus.paths or corpus.hub"]),
        ("corpus.prompt", "p", ["corpus.prompt and corpus.response"]),
        ("corpus", {"paths": ["c"], "prompt": "q", "response": "r"}, ["corpus.prompt", "language_modelling"]),
        ("models", {"base": "a"}, ["models.finetuned is missing"]),
        ("run_dir", "", ["run_dir"]),
    ],
)
def test_a_wrong_field_is_one_sentence_that_names_it(name: str, value: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        RunSpec.from_dict(changed(CLASSIFY, name, value), "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


def test_a_misspelt_field_is_named_before_the_one_it_leaves_missing() -> None:
    fields = {**CLASSIFY, "models": {"base": "a", "fine_tuned": "b"}}
    with pytest.raises(UserError, match=r"unknown field models\.fine_tuned"):
        RunSpec.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "value"), [("corpus.paths", "c.jsonl"), ("retrain.strategies", "random"), ("retrain.seeds", 7)]
)
def test_a_value_by_itself_is_a_list_of_one(name: str, value: Any) -> None:
    assert RunSpec.from_dict(changed(CLASSIFY, name, value)) == RunSpec.from_dict(
        changed(CLASSIFY, name, [value])
    )


def test_a_response_scope_without_columns_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs corpus\.messages, or corpus\.prompt and corpus\.response"):
        RunSpec.from_dict(changed(MODEL, "task.loss_scope", "response"))


@pytest.mark.parametrize("name", ["select.strategy", "retrain.strategies"])
def test_balancing_labels_needs_labels(name: str) -> None:
    value = "topk_balanced" if name.startswith("select") else ["greedy", "random_balanced"]
    with pytest.raises(UserError, match="balanced"):
        RunSpec.from_dict(changed(MODEL, name, value))


@pytest.mark.parametrize(
    ("fields", "second"), [(CLASSIFY, "random_confident"), (MODEL, "topk"), (PAIRS, "topk")], ids=str
)
def test_what_is_compared_has_a_default_for_every_task(fields: dict[str, Any], second: str) -> None:
    spec = RunSpec.from_dict(fields)
    assert spec.strategies == ["random", second, "greedy"]
    assert RunSpec.from_yaml(spec.to_yaml()).strategies == spec.strategies
    assert RunSpec.from_dict(changed(fields, "retrain.strategies", ["greedy"])).strategies == ["greedy"]


def test_a_draw_by_confidence_in_labels_needs_labels() -> None:
    with pytest.raises(UserError, match="random_confident draws by the confidence in labels"):
        RunSpec.from_dict(changed(MODEL, "select.strategy", "random_confident"))


@pytest.mark.parametrize(
    ("fields", "scope"), [(CLASSIFY, "last_token"), (MODEL, "all_tokens"), (PAIRS, "response")], ids=str
)
def test_the_loss_scope_has_a_default_for_every_task(fields: dict[str, Any], scope: str) -> None:
    assert RunSpec.from_dict(fields).loss_scope == scope


@pytest.mark.parametrize(
    ("checkpoints", "fractions"), [(1, [1.0]), (4, [0.25, 0.5, 0.75, 1.0]), ([1.0, 0.0], [0.0, 1.0])], ids=str
)
def test_checkpoints_are_ascending_fractions(checkpoints: Any, fractions: list[float]) -> None:
    assert (
        RunSpec.from_dict(changed(CLASSIFY, "gradients.checkpoints", checkpoints)).gradients.fractions
        == fractions
    )


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("a: [1", "not valid YAML at line 1"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "is missing"),
        ("run_dir: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_is_no_spec_is_said_in_one_sentence(yaml: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        RunSpec.from_yaml(yaml, "run.yaml")
    assert "\n" not in str(caught.value)


def test_an_empty_section_has_its_defaults() -> None:
    assert RunSpec.from_dict({**CLASSIFY, "evaluate": None}) == RunSpec.from_dict(CLASSIFY)
