"""Certified greedy on gradients that a model gave: the picks and scores of the exact greedy, every strategy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.gradients import GradientEngine
from engine.models import load_tokenizer
from engine.rows import ArrayRows
from engine.select import Columns, select
from engine.select.exact import exact_greedy
from engine.spec import RunSpec, Select
from engine.target import choose_target

DOCUMENTS = [text for text, _ in tiny.sentences(280, seed=3, mixed=0.2)]
CLASSIFY = {"kind": "classification", "labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24}
MODEL = {"kind": "language_modelling", "max_tokens": 24}


@pytest.fixture(
    scope="module",
    params=[
        (CLASSIFY, {"projector": "exact"}),
        (CLASSIFY, {"projector": "tensorsketch", "dim": 64, "checkpoints": 2}),
        (MODEL, {"projector": "tensorsketch", "dim": 96}),
    ],
    ids=["classification-exact", "classification-sketched-P2", "language-modelling"],
)
def gradients(request, tiny_base, tiny_finetuned):
    """Rows and labels of 300 documents; every fifteenth is a copy of an earlier one, so that ties are real."""
    task, settings = request.param
    spec = RunSpec.from_dict(
        {
            "models": {"base": tiny_base, "finetuned": tiny_finetuned},
            "corpus": {"paths": ["unused"]},
            "task": task,
            "gradients": {"dtype": "float32", **settings},
        }
    )
    endpoints = Endpoints(tiny_base, tiny_finetuned)
    encoder = Encoder(load_tokenizer(tiny_base), spec.task, spec.loss_scope)
    target = choose_target(spec, endpoints, encoder.label_ids)
    engine = GradientEngine(endpoints, encoder, target, spec)
    texts = DOCUMENTS + DOCUMENTS[::14][:20]
    found = engine.run(encoder.encode(texts))
    assert not found.problems
    assert len(found.label) == 300
    delta, _ = target.project(endpoints)
    return ArrayRows(found.features, delta, found.scale, block_rows=128), found.label


STRATEGIES = ["greedy", "greedy_batched", "greedy_balanced"]


@pytest.mark.parametrize(("strategy", "kind"), itertools.product(STRATEGIES, ["raw", "unit"]))
def test_picks_and_scores_on_real_gradients_are_those_of_the_exact_greedy(gradients, strategy, kind):
    rows, label = gradients
    balanced = strategy == "greedy_balanced"
    if balanced and (label < 0).all():
        label = (np.arange(rows.n_rows) % 3).astype(np.int32)
    spec = Select(strategy=strategy, rows=kind, size=80, batch_size=16)
    got = select(rows, Columns(label=label), spec)
    restart = 16 if strategy == "greedy_batched" else 0
    want, score = exact_greedy(rows, rows.valid, 80, kind, restart, label if balanced else None)
    assert got.rows.tolist() == want.tolist()
    assert got.certificate.score.tolist() == score.tolist()
    assert (got.certificate.bound < got.certificate.score).all()


def test_all_documents_are_picked_in_the_order_of_the_exact_greedy(gradients):
    rows, _ = gradients
    got = select(rows, Columns(), Select(size=rows.n_rows))
    want, _ = exact_greedy(rows, rows.valid, rows.n_rows, "raw", 0, None)
    assert got.rows.tolist() == want.tolist()
