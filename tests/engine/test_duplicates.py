"""Duplicates: exact and near repeats are found, different documents are kept, and the first copy stays."""

from __future__ import annotations

import numpy as np
import tiny

from engine.corpus.duplicates import first_copies


def test_exact_repeats_differ_in_case_and_white_space_alone():
    texts = ["One two three.", "one  TWO three.\n", "one two three", "four", "One two three."]
    assert first_copies(texts, "exact").tolist() == [0, 0, 2, 3, 0]


def test_near_repeats_are_found_and_all_point_at_the_first_copy():
    words = "the quick brown fox jumps over the lazy dog while seventeen patient herons watch the".split()
    text = " ".join(words * 1 + [f"word{i}" for i in range(60)])
    texts = [text, "another document altogether, about nothing much", text + " also", text.upper(), text[:60]]
    assert first_copies(texts, "near").tolist() == [0, 1, 0, 0, 4]


def test_no_different_documents_are_taken_for_repeats():
    texts = list(dict.fromkeys(text for text, _ in tiny.sentences(300)))
    assert first_copies(texts, "exact").tolist() == list(range(len(texts)))
    dropped = np.flatnonzero(first_copies(texts, "near") != np.arange(len(texts)))
    shingles = [{tuple(t.casefold().rstrip(".").split()[i : i + 5]) for i in range(3)} for t in texts]
    for i in dropped:  # MinHash estimates, so what it drops must truly be alike
        assert any(len(shingles[i] & shingles[j]) for j in range(i))


def test_what_is_a_repeat_does_not_depend_on_what_comes_after():
    texts = [text for text, _ in tiny.sentences(120, seed=3)] * 2
    found = first_copies(texts, "near")
    assert found[:120].tolist() == first_copies(texts[:120], "near").tolist()
    assert (found[120:] < 120).all()
