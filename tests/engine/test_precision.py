"""`auto` types: bfloat16 where it is multiplied, float32 where it is imitated, and a run keeps what it began with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import precision
from engine.precision import multiplies_bfloat16, settled
from engine.spec import RunSpec


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def make_spec(gradients: str = "auto", retrain: str = "auto", **sections: Any) -> RunSpec:
    return RunSpec.from_dict(
        {
            "models": {"base": "a", "finetuned": "b"},
            "corpus": {"paths": ["c.jsonl"]},
            "task": {"labels": ["x", "y"], "template": "{text}"},
            "gradients": {"dtype": gradients},
            "retrain": {"dtype": retrain},
            **sections,
        }
    )


def types(spec: RunSpec) -> tuple[str, str]:
    return spec.gradients.dtype, spec.retrain.dtype


@pytest.mark.parametrize(
    ("imitates", "given", "found"),
    [
        (True, ("auto", "auto"), ("float32", "float32")),
        (True, ("bfloat16", "auto"), ("bfloat16", "float32")),
        (True, ("auto", "bfloat16"), ("float32", "bfloat16")),
        (False, ("auto", "auto"), ("auto", "auto")),
        (False, ("float32", "auto"), ("float32", "auto")),
    ],
)
def test_auto_is_float32_where_bfloat16_is_imitated_and_what_is_asked_for_stays(
    imitates: bool, given: tuple[str, str], found: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: not imitates)
    assert types(settled(make_spec(*given), None)) == found


@pytest.mark.parametrize("imitates", [True, False])
def test_a_run_that_has_begun_keeps_its_types_on_any_machine(
    imitates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: not imitates)
    for begun in ("auto", "float32", "bfloat16"):
        assert types(settled(make_spec(), make_spec(begun, begun))) == (begun, begun)
    assert types(settled(make_spec("float32", "float32"), make_spec())) == ("float32", "float32")


def test_a_clusters_types_do_not_depend_on_the_drivers_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert types(settled(make_spec(ray={"address": "ray-head:6379"}), None)) == ("auto", "auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert types(settled(make_spec(), None)) == ("auto", "auto")


def test_a_gpu_multiplies_bfloat16_and_a_torch_without_onednn_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert multiplies_bfloat16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not multiplies_bfloat16()
