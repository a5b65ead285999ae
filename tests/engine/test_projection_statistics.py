"""Inner products survive projection: unbiased, and no more scattered than theory allows.

Over SEEDS independent maps, the mean of each projected inner product must lie within Z standard errors of
the truth, and its sample variance below the bound by no more than Z standard errors of a sample variance,
``var * sqrt((kurtosis - 1) / SEEDS)``. With Z = 5 and about 20 inner products a kind, a correct projector
fails with probability below 20 * 6e-7 (and, the seeds being fixed, passes for ever once it has passed).
"""

import math

import pytest
import torch
from torch import Tensor

from engine.projection import LayerShape, make_projector

SEEDS, Z = 4000, 5.0
DIM = 48
LAYERS = [LayerShape("head", 60, 10), LayerShape("mlp", 12, 7)]


def documents() -> tuple[list[list[tuple[Tensor, Tensor]]], list[int]]:
    """Factors (errors, hidden) of 5 documents for every layer, and their numbers of tokens.

    Two share one hidden state and two one error, the sketch's worst cases; one has three tokens.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 1, 1, 1, 3]
    factors = []
    for layer in LAYERS:
        errors = torch.randn(7, layer.rows, generator=generator)
        hidden = torch.randn(7, layer.cols, generator=generator) + 1  # hidden states of a model lean one way
        hidden[1] = hidden[0]
        errors[3] = errors[2]
        factors.append(list(zip(errors.split(lengths), hidden.split(lengths), strict=True)))
    return factors, lengths


def projected_products(kind: str) -> Tensor:
    """<P x_i, P x_j> of all documents under SEEDS maps: (SEEDS, 5, 5) float64."""
    factors, lengths = documents()
    docs = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    products = torch.empty(SEEDS, 5, 5, dtype=torch.float64)
    for seed in range(SEEDS):
        projector = make_projector(kind, DIM, seed, LAYERS)
        rows = torch.zeros(5, DIM)
        for layer, parts in enumerate(factors):
            state = projector.begin(layer, len(docs), "cpu")
            projector.add_errors(state, torch.cat([e for e, _ in parts]), 0)
            rows += projector.finish(state, torch.cat([h for _, h in parts]), docs, 5)
        products[seed] = rows.double() @ rows.double().T
    return products


def variance_bound(kind: str, x: list[Tensor], y: list[Tensor]) -> float:
    """The docstrings' bounds, for gradients given layer by layer.

    With independent hashes, layers add like blocks of one larger gradient: the dense terms hold for the
    whole, the terms of shared row or column space for each layer alone.
    """
    norm_x, norm_y, inner = (
        sum((a * b).sum().item() for a, b in zip(first, second, strict=True))
        for first, second in ((x, x), (y, y), (x, y))
    )
    bound = (norm_x * norm_y + inner**2) / DIM
    if kind == "tensorsketch":
        for a, b in zip(x, y, strict=True):
            for product in (a @ b.T, a.T @ b):
                bound += ((product * product).sum() + (product * product.T).sum()).item() / DIM
        bound += 4 * norm_x * norm_y / DIM**2
    return bound


@pytest.mark.parametrize("kind", ["rademacher", "tensorsketch"])
def test_inner_products_are_unbiased_with_the_variance_of_theory(kind: str) -> None:
    products = projected_products(kind)
    factors, lengths = documents()
    gradients = [[(e.double().T @ h.double()) for e, h in parts] for parts in factors]
    tightest = math.inf
    for i in range(len(lengths)):
        for j in range(i, len(lengths)):
            x, y = [layer[i] for layer in gradients], [layer[j] for layer in gradients]
            truth = sum((a * b).sum().item() for a, b in zip(x, y, strict=True))
            sample = products[:, i, j]
            variance = sample.var().item()
            assert abs(sample.mean().item() - truth) <= Z * math.sqrt(variance / SEEDS)
            kurtosis = ((sample - sample.mean()) ** 4).mean().item() / variance**2
            slack = Z * math.sqrt((kurtosis - 1) / SEEDS)
            assert slack < 0.25  # else the sample could not tell
            assert variance <= variance_bound(kind, x, y) * (1 + slack)
            tightest = min(tightest, variance_bound(kind, x, y) / variance)
    assert tightest < 1.25  # the bound is no generous one
