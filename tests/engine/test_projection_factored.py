"""Factored: one linear map for factors and matrices, unbiased, and no more scattered than its docstring says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.errors import UserError
from engine.projection import Factored, LayerShape, choose_kind, make_projector

SHAPES = [(70, 50), (3, 50), (70, 2), (3, 2)]  # both sides longer than p and q, one of them, none
LENGTHS = [3, 1, 0, 9]


def layers(n: int) -> list[LayerShape]:
    return [LayerShape(f"layer{i}", *SHAPES[i % len(SHAPES)]) for i in range(n)]


def factors(layer: LayerShape, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Errors, and inputs that lean one way as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(tokens, layer.rows, generator=generator)
    return errors, torch.randn(tokens, layer.cols, generator=generator) + 1


@pytest.mark.parametrize("n_layers", [8, 40, 256], ids=["hashed", "hashed_less", "in_place"])
@pytest.mark.parametrize("dim", [64, 37])
@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_factors_held_factors_and_the_matrix_project_alike(n_layers: int, dim: int, layer: int) -> None:
    projector = make_projector("factored", dim, 3, layers(n_layers))
    errors, hidden = factors(projector.layers[layer], sum(LENGTHS))
    docs = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    state = projector.begin(layer, len(docs), "cpu")
    for start in range(0, errors.shape[1], 33):
        projector.add_errors(state, errors[:, start : start + 33], start)
    rows = projector.finish(state, hidden, docs, len(LENGTHS))
    held = projector.hold(layer, "row", errors), projector.hold(layer, "col", hidden)
    torch.testing.assert_close(projector.join(layer, *held, docs, len(LENGTHS)), rows, rtol=1e-4, atol=1e-3)
    assert rows.shape == (len(LENGTHS), dim)
    for doc in range(len(LENGTHS)):
        gradient = errors[docs == doc].double().T @ hidden[docs == doc].double()
        chunks = [(start, gradient[start : start + 20].float()) for start in range(0, len(gradient), 20)]
        whole = projector.project_matrix(layer, chunks)
        assert whole.dtype == torch.float64
        assert (rows[doc] - whole).norm() <= 2e-6 * max(1.0, gradient.norm().item() * 3)


def test_no_tokens_give_rows_of_zeros() -> None:
    projector = make_projector("factored", 64, 0, layers(8))
    nothing = projector.hold(0, "row", torch.zeros(0, 70)), projector.hold(0, "col", torch.zeros(0, 50))
    rows = projector.join(0, *nothing, torch.zeros(0, dtype=torch.int64), 3)
    assert torch.equal(rows, torch.zeros(3, 64))


def test_entries_added_one_by_one_are_errors() -> None:
    for layer in range(len(SHAPES)):
        projector = make_projector("factored", 64, 3, layers(8))
        rows = torch.tensor([0, 2, 1])
        values = torch.tensor([0.5, -1.0, 2.0])
        errors = torch.zeros(3, SHAPES[layer][0])
        errors[torch.arange(3), rows] = values
        one, other = projector.begin(layer, 3, "cpu"), projector.begin(layer, 3, "cpu")
        projector.add_entries(one, rows, values)
        projector.add_errors(other, errors, 0)
        torch.testing.assert_close(one.values, other.values)


def test_company_changes_a_row_by_rounding_alone() -> None:
    projector = make_projector("factored", 256, 3, layers(8))
    errors, hidden = factors(projector.layers[0], 40)
    docs = torch.arange(40) // 4
    held = projector.hold(0, "row", errors), projector.hold(0, "col", hidden)
    together = projector.join(0, *held, docs, 10)
    for doc in range(10):
        own = docs == doc
        held = projector.hold(0, "row", errors[own]), projector.hold(0, "col", hidden[own])
        alone = projector.join(0, *held, torch.zeros(4, dtype=torch.int64), 1)[0]
        assert (alone - together[doc]).norm() <= 1e-6 * together[doc].norm()


def test_bfloat16_factors_round_once() -> None:
    projector = make_projector("factored", 256, 3, layers(8))
    errors, hidden = (x.bfloat16() for x in factors(projector.layers[0], 40))
    docs = torch.zeros(40, dtype=torch.int64)
    rows = [
        projector.join(0, projector.hold(0, "row", e), projector.hold(0, "col", h), docs, 1)
        for e, h in ((errors, hidden), (errors.float(), hidden.float()))
    ]
    assert 0 < (rows[0] - rows[1]).norm() < 2**-8 * rows[1].norm()


def variance(projector: Factored, x: list[Tensor], y: list[Tensor]) -> float:
    """The docstring's, for gradients given layer by layer; a side that is kept has none of its terms."""
    norm_x, norm_y, inner = (
        sum((a * b).sum().item() for a, b in zip(first, second, strict=True))
        for first, second in ((x, x), (y, y), (x, y))
    )
    total = (norm_x * norm_y + inner**2) / projector.dim
    for layer, (a, b) in enumerate(zip(x, y, strict=True)):
        p = projector.p if projector.layers[layer].rows > projector.p else math.inf
        q = projector.q if projector.layers[layer].cols > projector.q else math.inf
        left, right = a @ b.T, a.T @ b
        total += ((left * left).sum() + (left * left.T).sum()).item() / p
        total += ((right * right).sum() + (right * right.T).sum()).item() / q
        own = (a * a).sum() * (b * b).sum() + (a * b).sum() ** 2
        total += ((left * left).sum() + (right * right).sum() + own).item() / (p * q)
    return total


@pytest.mark.parametrize("n_layers", [8, 160], ids=["hashed", "in_place"])
def test_inner_products_are_unbiased_with_the_variance_of_theory(n_layers: int) -> None:
    """Means within 5 standard errors of the truth, variances no more than that above the formula (seeds fixed)."""
    seeds, dim, used = 1500, 64, 6
    shapes = [LayerShape(f"layer{i}", 40, 20) for i in range(n_layers)]
    factors_ = [
        [factors(shapes[i], 3, seed=10 * i + doc) for doc in range(3)] for i in range(used)
    ]  # three tokens; the other layers have no gradient
    gradients = [
        [(e.double().T @ h.double()) for e, h in (layer[doc] for layer in factors_)] for doc in range(3)
    ]
    docs = torch.arange(3).repeat_interleave(3)
    products = torch.empty(seeds, 3, 3, dtype=torch.float64)
    for seed in range(seeds):
        projector = Factored(dim, seed, shapes)
        rows = torch.zeros(3, dim)
        for i, layer in enumerate(factors_):
            held = [
                projector.hold(i, side, torch.cat([f[k] for f in layer]))
                for k, side in enumerate(("row", "col"))
            ]
            rows += projector.join(i, *held, docs, 3)
        products[seed] = rows.double() @ rows.double().T
    assert (projector.p * projector.q <= dim) == (n_layers == 160)
    tightest = math.inf
    for i in range(3):
        for j in range(i, 3):
            sample = products[:, i, j]
            truth = sum((a * b).sum().item() for a, b in zip(gradients[i], gradients[j], strict=True))
            spread = sample.var().item()
            assert abs(sample.mean().item() - truth) <= 5 * math.sqrt(spread / seeds)
            kurtosis = ((sample - sample.mean()) ** 4).mean().item() / spread**2
            slack = 5 * math.sqrt((kurtosis - 1) / seeds)
            bound = variance(projector, gradients[i], gradients[j])
            assert spread <= bound * (1 + slack)
            tightest = min(tightest, bound / spread)
    assert tightest < 1.6  # the formula is no generous one


def test_layers_have_maps_of_their_own() -> None:
    same = [LayerShape(f"layer{i}", 64, 64) for i in range(256)]
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    maps = [
        make_projector("factored", 1024, seed, same).project_matrix(layer, [(0, matrix)])
        for seed in (0, 1)
        for layer in (0, 1, 255)
    ]
    cosines = torch.corrcoef(torch.stack(maps)) - torch.eye(len(maps))
    assert cosines.abs().max() < 6 / math.sqrt(1024)


def test_auto_takes_it_for_many_layers_and_it_is_refused_for_few() -> None:
    big = [LayerShape(f"layer{i}", 640, 640) for i in range(8)]
    assert choose_kind("auto", 4096, big) == "factored"
    assert choose_kind("auto", 4096, big[:7]) == "tensorsketch"
    with pytest.raises(UserError, match=r"factored is for 8 layers or more.*chose 7: use tensorsketch"):
        make_projector("factored", 4096, 0, big[:7])
