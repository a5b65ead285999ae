"""Variants of selection: negative controls, preconditioning, filters and weights do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UserError
from engine.rows import ArrayRows
from engine.select import Columns, select, view_of
from engine.select.exact import exact_greedy
from engine.select.objective import unit_target, vectors
from engine.select.view import View
from engine.select.weights import nnls_weights
from engine.spec import Select


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    n, d, p = 80, 16, 2
    target = rng.normal(size=d)
    features = (rng.normal(size=(p, n, d)) * np.geomspace(1, 30, d) + 0.2 * target).astype(np.float16)
    return ArrayRows(features, target, rng.lognormal(size=(p, n)).astype(np.float32), block_rows=16)


def f(rows, order, target):
    """f of a set against any target, by numpy's own sums."""
    total = vectors(rows.take(np.sort(order)), "raw").sum(axis=0)
    return np.mean([t @ target / np.linalg.norm(t) / np.linalg.norm(target) for t in total])


def test_the_negative_control_climbs_towards_minus_delta(rows):
    chosen = select(rows, Columns(), Select(size=12, target="negative"))
    assert chosen.objective[-1] == pytest.approx(f(rows, chosen.rows, -rows.target), rel=1e-12)
    assert f(rows, chosen.rows, rows.target) < -0.3 < 0.3 < chosen.objective[-1]


def test_the_random_control_has_deltas_norm_and_another_direction_for_every_seed(rows):
    views = [view_of(rows, Select(target="random", seed=seed)) for seed in (0, 0, 1)]
    for view in views:
        assert np.linalg.norm(view.target) == pytest.approx(np.linalg.norm(rows.target), rel=1e-12)
    assert np.array_equal(views[0].target, views[1].target)
    cosine = unit_target(views[0].target) @ unit_target(views[2].target)
    assert abs(cosine) < 0.9


def test_preconditioned_greedy_is_exact_greedy_on_rows_divided_by_their_root_mean_square(rows):
    g = vectors(rows.read(0, rows.n_rows), "raw")
    scale = (1 / np.sqrt((g**2).mean(axis=(0, 1)))).astype(np.float32)
    features = (rows.read(0, rows.n_rows).features.astype(np.float32)) * scale
    by_hand = ArrayRows(features, rows.target, rows.read(0, rows.n_rows).scale, block_rows=16)
    expected, _ = exact_greedy(by_hand, rows.valid, 20)
    chosen = select(rows, Columns(), Select(size=20, precondition="second_moment", verify=5))
    assert chosen.rows.tolist() == expected.tolist()
    assert chosen.rows.tolist() != select(rows, Columns(), Select(size=20)).rows.tolist()


def test_a_selection_from_some_checkpoints_is_that_of_a_store_that_has_only_those(rows):
    block = rows.read(0, rows.n_rows)
    spec = Select(size=20, checkpoints=[1.0], precondition="second_moment", verify=3)
    for at, fraction in enumerate((0.5, 1.0)):
        spec = spec.model_copy(update={"checkpoints": [fraction]})
        alone = ArrayRows(block.features[at : at + 1], rows.target, block.scale[at : at + 1], block_rows=16)
        expected = select(alone, Columns(), spec.model_copy(update={"checkpoints": None}))
        seen = view_of(rows, spec, [0.5, 1.0])
        chosen = select(seen, Columns(), spec)
        assert chosen.rows.tolist() == expected.rows.tolist()
        assert chosen.objective.tolist() == expected.objective.tolist()
        assert seen.take(np.array([3, 7])).features.shape == (1, 2, rows.dim)
    both = view_of(rows, Select(size=20, checkpoints=[1.0, 0.5]), [0.5, 1.0])
    assert (
        select(both, Columns(), Select(size=20)).rows.tolist()
        == select(rows, Columns(), Select(size=20)).rows.tolist()
    )
    with pytest.raises(UserError, match=r"asks for 0\.25, and the store has 0\.5, 1: choose of those"):
        view_of(rows, Select(checkpoints=[0.25, 1.0]), [0.5, 1.0])
    with pytest.raises(UserError, match=r"asks for 0\.5, and the store has no fractions"):
        select(rows, Columns(), Select(size=2, checkpoints=[0.5]))


def test_a_coordinate_that_never_moves_does_no_harm_to_preconditioning(rows):
    block = rows.read(0, rows.n_rows)
    features = block.features.copy()
    features[:, :, 3] = 0
    view = view_of(ArrayRows(features, rows.target, block.scale), Select(precondition="second_moment"))
    assert isinstance(view, View)
    assert np.isfinite(vectors(view.read(0, 80), "raw")).all()


def test_documents_the_model_is_unsure_of_and_repeats_are_never_selected(rows):
    rng = np.random.default_rng(0)
    confidence, repeats = rng.random(80).astype(np.float32), rng.random(80) < 0.3
    columns = Columns(confidence=confidence, repeats=repeats)
    allowed = (confidence >= 0.4) & ~repeats
    for strategy in ("greedy", "topk", "random"):
        chosen = select(rows, columns, Select(strategy=strategy, size=20, min_confidence=0.4))
        assert allowed[chosen.rows].all()
    with pytest.raises(UserError, match=r"at least 0\.4 sure of that repeat none"):
        select(rows, columns, Select(size=int(allowed.sum()) + 1, min_confidence=0.4))
    with pytest.raises(UserError, match="needs the confidence"):
        select(rows, Columns(), Select(size=2, min_confidence=0.4))


def test_nnls_weights_are_the_nonnegative_least_squares_solution(rows):
    order = np.array([40, 3, 17, 61, 22])
    weights = nnls_weights(rows, order, "raw")
    a = np.stack([vectors(rows.take(np.array([row])), "raw").ravel() for row in order.tolist()], axis=1)
    b = np.tile(rows.target, 2)
    scale = (a @ weights) @ b / np.sum((a @ weights) ** 2)  # weights are the solution up to a factor
    gradient = a.T @ (a @ (scale * weights) - b)
    size = np.abs(a.T @ b).max()
    assert (weights >= 0).all()
    assert weights.mean() == pytest.approx(1)
    assert (gradient > -1e-9 * size).all()  # KKT: no weight wants to grow ...
    assert (np.abs(gradient[weights > 0]) < 1e-9 * size).all()  # ... and those that are not 0 are at rest


def test_nnls_weights_point_nearer_to_delta_than_equal_ones(rows):
    chosen = select(rows, Columns(), Select(size=20, weights="nnls"))
    g = vectors(rows.take(np.sort(chosen.rows)), "raw")[np.argsort(np.argsort(chosen.rows))]
    b = np.tile(rows.target, 2)

    def cosine(weights):
        total = np.tensordot(weights, g, 1).ravel()
        return total @ b / np.linalg.norm(total) / np.linalg.norm(b)

    assert cosine(chosen.weight) > cosine(np.ones(20))
    assert (select(rows, Columns(), Select(size=20)).weight == 1).all()


def test_weights_that_would_all_be_zero_are_refused(rows):
    against = select(rows, Columns(), Select(strategy="bottomk", size=1)).rows
    with pytest.raises(UserError, match="every weight would be 0"):
        nnls_weights(rows, against, "raw")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 2, "stop": "at_peak"}, "rounds needs stop=size"),
        ({"rounds": 2, "target": "random"}, "rounds needs stop=size and target=delta"),
        ({"rounds": 5, "size": 4}, "rounds may not be more than size"),
    ],
)
def test_rounds_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Select(**fields)


def test_only_strategies_that_look_at_delta_select_in_rounds():
    inside = [
        s
        for s in ("greedy", "greedy_balanced", "topk", "random", "loss_min")
        if Select(strategy=s, rounds=2).in_rounds
    ]
    assert inside == ["greedy", "greedy_balanced", "topk"]
