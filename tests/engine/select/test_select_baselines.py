"""Every strategy of docs/method.md's table picks what its rule says, and says how good it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.rows import ArrayRows
from engine.select import Columns, select
from engine.select.baselines import quotas
from engine.select.objective import fold, scores, unit_target, vectors
from engine.spec import Select


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    n, d, p = 60, 12, 2
    target = rng.normal(size=d)
    features = (rng.normal(size=(p, n, d)) + 0.3 * target).astype(np.float16)
    scale = rng.lognormal(size=(p, n)).astype(np.float32)
    valid = rng.random(n) > 0.1
    label = rng.integers(0, 3, n).astype(np.int32)
    columns = Columns(label, *(rng.random(n).astype(np.float32) for _ in range(2)))
    return ArrayRows(features, target, scale, valid, block_rows=16), columns


def naive_f(rows, members, kind="raw"):
    """f(S) straight from its definition with numpy's own sums."""
    total = vectors(rows.take(np.array(sorted(members))), kind).sum(axis=0)
    u = rows.target / np.linalg.norm(rows.target)
    return float(np.mean([t @ u / np.linalg.norm(t) for t in total]))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**31))
def test_a_fold_is_the_sum_and_does_not_depend_on_the_batch(width, seed):
    x = np.random.default_rng(seed).normal(size=(5, width))
    folded = fold(x.copy())
    assert np.allclose(folded, [math.fsum(r) for r in x], rtol=1e-13, atol=1e-13)
    assert all(fold(x[i].copy()) == folded[i] for i in range(5))


@pytest.mark.parametrize("kind", ["raw", "unit"])
def test_the_score_of_a_candidate_is_f_of_the_larger_set(case, kind):
    rows, _ = case
    every = vectors(rows.read(0, rows.n_rows), kind)
    got = scores(every[[3, 7]].sum(axis=0), every, unit_target(rows.target))
    for i in (0, 20, 59):
        assert got[i] == pytest.approx(naive_f(rows, {3, 7, i}, kind), rel=1e-12)


def test_the_cosine_of_a_zero_sum_is_zero():
    assert scores(np.zeros((1, 4)), np.zeros((2, 1, 4)), np.full(4, 0.5)).tolist() == [0.0, 0.0]
    g = np.array([[[1.0, -2.0, 3.0, 0.5]]])
    assert scores(-g[0], g, np.full(4, 0.5)).tolist() == [0.0]


def test_a_unit_row_has_norm_one_whatever_its_stored_norm_and_a_zero_row_stays_zero():
    features = np.array([[3.0, 4.0], [0.0, 0.0], [1e-7, 0.0], [6e4, 6e4]], np.float16)
    scale = np.array([[1e-30, 1.0, 1e30, 0.0]], np.float32)
    unit = vectors(ArrayRows(features, np.ones(2), scale).read(0, 4), "unit")[:, 0]
    assert unit.tolist() == [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_huge_and_tiny_gradients_neither_overflow_nor_vanish(scale):
    features = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32) * np.float32(scale)
    rows = ArrayRows(features, np.array([1e300, 0.0]), np.full((1, 2), scale, np.float32))
    chosen = select(rows, Columns(), Select(strategy="topk", size=2))
    assert chosen.rows.tolist() == [0, 1]
    assert chosen.objective == pytest.approx([1.0, 1.6 / math.hypot(1.6, 0.8)])


@pytest.mark.parametrize("strategy", Select.model_fields["strategy"].metadata[0].words)
def test_every_strategy_returns_distinct_valid_rows_and_the_true_objective(case, strategy):
    rows, columns = case
    seen = []
    chosen = select(
        rows,
        columns,
        Select(strategy=strategy, size=20, batch_size=7),
        lambda done, total: seen.append((done, total)),
    )
    assert len(set(chosen.rows.tolist())) == 20
    assert rows.take(np.sort(chosen.rows)).valid.all()
    for t in (0, 6, 19):
        assert chosen.objective[t] == pytest.approx(naive_f(rows, chosen.rows[: t + 1].tolist()), rel=1e-12)
    assert np.cumsum(chosen.gain) == pytest.approx(chosen.objective)
    assert chosen.peak_value == chosen.path.max()
    assert chosen.random_path.sizes[-1] == 20
    if strategy.endswith("_balanced"):
        counts = np.bincount(columns.label[chosen.rows], minlength=3)
        assert counts.max() - counts.min() <= 1
    if strategy.startswith("greedy"):
        assert seen[-1] == (20, 20)


def test_topk_and_bottomk_rank_by_mean_cosine(case):
    rows, columns = case
    valid = np.flatnonzero(rows.read(0, 60).valid)
    alone = np.array([naive_f(rows, {i}) for i in valid])
    assert (
        select(rows, columns, Select(strategy="topk", size=9)).rows.tolist()
        == valid[np.argsort(-alone)[:9]].tolist()
    )
    assert (
        select(rows, columns, Select(strategy="bottomk", size=9)).rows.tolist()
        == valid[np.argsort(alone)[:9]].tolist()
    )


def test_loss_strategies_rank_by_loss_and_pass_over_losses_that_are_not_finite(case):
    rows, columns = case
    loss = columns.loss.copy()
    valid = np.flatnonzero(rows.read(0, 60).valid)
    loss[valid[0]] = np.nan
    order = valid[1:][np.argsort(loss[valid[1:]])]
    for strategy, want in (("loss_min", order[:5]), ("loss_max", order[::-1][:5])):
        got = select(rows, Columns(loss=loss), Select(strategy=strategy, size=5)).rows
        assert got.tolist() == want.tolist()


def test_random_confident_draws_among_the_documents_the_model_is_sure_of(case):
    rows, _ = case
    valid = np.flatnonzero(rows.read(0, 60).valid)
    confidence = np.full(60, 0.9, np.float32)
    sure = valid[::2]
    confidence[sure] = np.linspace(0.99, 1, sure.size, dtype=np.float32)
    drawn = {s: _confident_rows(rows, confidence, 10, seed=s) for s in (1, 2)}
    for order in drawn.values():
        assert set(order) <= set(sure.tolist())
        assert len(set(order)) == 10
    assert drawn[1] != drawn[2]
    assert drawn[1] == _confident_rows(rows, confidence, 10, seed=1)


def test_random_confident_takes_the_surest_documents_where_too_few_are_sure(case):
    rows, _ = case
    valid = np.flatnonzero(rows.read(0, 60).valid)
    confidence = np.random.default_rng(0).uniform(0.2, 0.98, 60).astype(np.float32)
    confidence[valid[3]] = 0.995
    confidence[np.setdiff1d(np.arange(60), valid)] = np.nan
    surest = valid[np.argsort(confidence[valid])[-10:]]
    assert set(_confident_rows(rows, confidence, 10, seed=0)) == set(surest.tolist())


def test_random_confident_without_confidences_is_refused(case):
    rows, _ = case
    with pytest.raises(UserError, match=r"strategy=random_confident needs the confidence"):
        select(rows, Columns(), Select(strategy="random_confident", size=3))


def _confident_rows(rows, confidence, size, seed):
    spec = Select(strategy="random_confident", size=size, seed=seed)
    return select(rows, Columns(confidence=confidence), spec).rows.tolist()


def test_ties_break_to_the_lowest_row():
    rows = ArrayRows(np.ones((9, 4), np.float32), np.ones(4), block_rows=2)
    columns = Columns(np.zeros(9, np.int32), np.ones(9, np.float32))
    for strategy in (
        "greedy",
        "greedy_batched",
        "greedy_balanced",
        "topk",
        "topk_balanced",
        "bottomk",
        "loss_min",
    ):
        assert select(rows, columns, Select(strategy=strategy, size=9)).rows.tolist() == list(range(9))


def test_greedy_adds_the_best_row_each_time(case):
    rows, columns = case
    valid = set(np.flatnonzero(rows.read(0, 60).valid).tolist())
    members: list[int] = []
    for _ in range(6):
        members.append(max(sorted(valid - set(members)), key=lambda i: naive_f(rows, [*members, i])))
    assert select(rows, columns, Select(strategy="greedy", size=6)).rows.tolist() == members


def test_greedy_batched_starts_anew_after_each_batch(case):
    rows, columns = case
    batched = select(rows, columns, Select(strategy="greedy_batched", size=8, batch_size=4)).rows
    first = select(rows, columns, Select(strategy="greedy", size=4)).rows
    assert batched[:4].tolist() == first.tolist()
    rest = ArrayRows(
        rows._features, rows.target, rows._scale, rows.valid & ~np.isin(np.arange(60), first), 16
    )
    assert batched[4:].tolist() == select(rest, columns, Select(strategy="greedy", size=4)).rows.tolist()


def test_at_peak_keeps_the_prefix_with_the_largest_objective(case):
    rows, columns = case
    whole = select(rows, columns, Select(strategy="greedy", size=50))
    cut = select(rows, columns, Select(strategy="greedy", size=50, stop="at_peak"))
    assert 1 < cut.size < 50
    assert cut.rows.tolist() == whole.rows[: whole.peak_size].tolist()
    assert cut.objective[-1] == cut.peak_value == whole.objective.max()
    assert cut.path.tolist() == whole.path.tolist()


def test_the_same_seed_gives_the_same_random_rows_and_another_seed_others(case):
    rows, columns = case
    a, b, c = (select(rows, columns, Select(strategy="random", size=20, seed=s)).rows for s in (1, 1, 2))
    assert a.tolist() == b.tolist() != c.tolist()
    assert select(rows, columns, Select(strategy="random", size=7, seed=1)).rows.tolist() == a[:7].tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_quotas_use_every_place_and_differ_by_at_most_one_where_rows_are_left(labels, data):
    label = np.array(labels, np.int32)
    size = data.draw(st.integers(1, label.size))
    quota = quotas(label, size)
    counts = {v: labels.count(v) for v in set(labels)}
    assert sum(quota.values()) == size
    assert all(quota[v] <= counts[v] for v in counts)
    unfilled = [quota[v] for v in counts if quota[v] < counts[v]]
    assert not unfilled or max(quota.values()) - min(unfilled) <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_random_path_ends_at_the_full_set(size, seed):
    rng = np.random.default_rng(seed)
    rows = ArrayRows(rng.normal(size=(40, 5)).astype(np.float32), np.ones(5), block_rows=7)
    path = select(rows, Columns(), Select(strategy="random", size=size, seed=seed)).random_path
    assert path.sizes[0] == 1
    assert path.sizes[-1] == size
    if size == 40:
        assert path.mean[-1] == pytest.approx(naive_f(rows, range(40)))
        assert path.std[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (Select(size=1000), Columns(), r"1000.*only 5\d valid"),
        (Select(strategy="topk_balanced", size=5), Columns(), "topk_balanced.*labels.*none"),
        (Select(strategy="loss_max", size=5), Columns(), "loss_max.*no losses"),
        (
            Select(strategy="greedy_balanced", size=5),
            Columns(label=np.full(60, -1, np.int32)),
            "only 0 valid documents with a label",
        ),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused_in_one_sentence(case, spec, columns, message):
    with pytest.raises(UserError, match=message):
        select(case[0], columns, spec)


def test_a_zero_target_is_refused(case):
    rows = ArrayRows(np.ones((3, 2), np.float32), np.zeros(2))
    with pytest.raises(UserError, match="zero"):
        select(rows, Columns(), Select(size=1, strategy="topk"))
