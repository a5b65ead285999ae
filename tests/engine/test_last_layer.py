"""One pass over the vocabulary gives the losses and gradients of the textbook, in memory that stays flat."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.head import Head
from engine.last_layer import LastLayer, Result, token_chunks
from engine.projection import LayerShape, Projector, make_projector


def make_head(
    vocab: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0, **extra: float
) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if extra.pop("bias", 0) else None
    return Head("head", weight, bias, extra.get("scale", 1.0), extra.get("softcap"), False)


def small(layer: LastLayer, tokens: int, rows: int) -> LastLayer:
    """The same layer with pieces so small that a test meets many of them."""
    layer.tokens, layer.rows = tokens, rows
    return layer


def textbook(
    head: Head, vocab: int, hidden: Tensor, targets: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (tokens,), errors dL/dz (tokens, vocab) and dL/dh (tokens, hidden) by autograd, in float64."""
    h = hidden.double().requires_grad_(True)
    z = h @ head.weight[:vocab].double().t()
    if head.bias is not None:
        z = z + head.bias[:vocab].double()
    z.retain_grad()
    logits = z * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (loss * weight.double()).sum().backward()
    assert z.grad is not None
    assert h.grad is not None
    return loss.detach(), z.grad, h.grad


def run(
    layer: LastLayer, hidden: Tensor, targets: Tensor, counts: list[int], **options: Tensor
) -> tuple[Result, Tensor]:
    """The result and the weights 1 / T_i."""
    docs = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weight = 1.0 / torch.tensor(counts, dtype=torch.float32)[docs]
    dim = layer.projector.dim if layer.projector else 1
    result = Result.empty(len(counts), dim, torch.zeros(len(counts), dtype=torch.int64))
    with torch.no_grad():
        layer.add(result, hidden, targets, docs, weight, counts, **options)
    return result, weight


def gradients(errors: Tensor, hidden: Tensor, counts: list[int]) -> Tensor:
    """sum_t e_t h_t^T of every document, flattened, float64."""
    bounds = [0, *itertools.accumulate(counts)]
    pairs = itertools.pairwise(bounds)
    return torch.stack([(errors[a:b].t() @ hidden[a:b].double()).flatten() for a, b in pairs])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_losses_and_gradients_are_those_of_autograd_however_tokens_and_rows_are_cut(
    data: st.DataObject,
) -> None:
    vocab, hidden_size = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 8))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    softcap = data.draw(st.sampled_from([None, 3.0]))
    extra = {"bias": data.draw(st.sampled_from([0, 1])), "scale": data.draw(st.sampled_from([1.0, 0.5]))}
    head = make_head(vocab + 3, hidden_size, seed=data.draw(st.integers(0, 99)), softcap=softcap, **extra)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    spread = data.draw(st.sampled_from([0.1, 1.0, 30.0]))  # logits from nearly equal to hundreds apart
    hidden = spread * torch.randn(sum(counts), hidden_size, generator=generator)
    targets = torch.randint(vocab, (sum(counts),), generator=generator)
    projector = make_projector("exact", 8, 0, [LayerShape("head", vocab, hidden_size)])
    layer = LastLayer(head, vocab, None, projector)
    small(layer, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 70)))
    backward = torch.empty_like(hidden)
    result, weight = run(layer, hidden, targets, counts, backward=backward)
    loss, errors, inputs = textbook(head, vocab, hidden, targets, weight)
    bounds = [0, *itertools.accumulate(counts)]
    mean = torch.stack([loss[a:b].mean() for a, b in itertools.pairwise(bounds)])
    torch.testing.assert_close(result.loss.double(), mean, rtol=1e-4, atol=1e-5 * spread)
    scale = errors.norm().item() + 1e-6
    torch.testing.assert_close(
        result.rows.double(),
        gradients(errors, hidden, counts),
        rtol=0,
        atol=3e-5 * scale * hidden.norm().item(),
    )
    torch.testing.assert_close(
        backward.double(), inputs, rtol=0, atol=3e-5 * scale * head.weight.norm().item()
    )


@pytest.mark.parametrize("kind", ["exact", "rademacher", "tensorsketch"])
def test_every_projector_gets_the_same_errors(kind: str) -> None:
    head, counts = make_head(90, 6), [3, 1, 7, 2]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(counts), 6, generator=generator)
    targets = torch.randint(90, (sum(counts),), generator=generator)
    projector: Projector = make_projector(kind, 64, 3, [LayerShape("head", 90, 6)])
    result, weight = run(small(LastLayer(head, 90, None, projector), 5, 16), hidden, targets, counts)
    _, errors, _ = textbook(head, 90, hidden, targets, weight)
    for row, gradient in zip(result.rows, gradients(errors, hidden, counts), strict=True):
        close(row, projector.project_matrix(0, [(0, gradient.view(90, 6).float())]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_alignment_are_exact_in_every_type(dtype: torch.dtype) -> None:
    head, docs = make_head(500, 16, dtype), 20
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(docs, 16, generator=generator).to(dtype)
    targets = torch.randint(500, (docs,), generator=generator)
    delta = torch.randn(500, 16, generator=generator)
    layer = small(LastLayer(head, 500, None, None, delta=delta), 7, 64)
    result, _ = run(layer, hidden, targets, [1] * docs)
    # The model's own type rounds logits before anything else sees them: the textbook gets the rounded ones.
    logits = torch.nn.functional.linear(hidden, head.weight).double()
    errors = torch.softmax(logits, 1)
    errors[torch.arange(docs), targets] -= 1
    each = gradients(errors, hidden, [1] * docs)
    close(result.norm, each.norm(dim=1))
    close(result.alignment, each @ delta.double().flatten())
    close(result.loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_a_certain_prediction_keeps_its_small_gradient() -> None:
    """1 - p_y would be 0 in float32 for p_y = 1 - 1e-9; the sum over the other rows is not."""
    head = Head("head", torch.eye(3), None, 1.0, None, False)
    projector = make_projector("exact", 8, 0, [LayerShape("head", 3, 3)])
    hidden = torch.tensor([[21.0, 0.0, 0.0]])
    result, _ = run(LastLayer(head, 3, None, projector), hidden, torch.tensor([0]), [1])
    rest = 2 * math.exp(-21) / (1 + 2 * math.exp(-21))
    torch.testing.assert_close(result.rows[0, 0].item(), -21 * rest, rtol=1e-5, atol=0)


def test_a_state_that_is_not_finite_spoils_its_own_document_alone() -> None:
    head = make_head(40, 6)
    hidden = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    hidden[2, 1] = float("nan")
    hidden[4, 0] = float("inf")
    projector = make_projector("tensorsketch", 32, 0, [LayerShape("head", 40, 6)])
    layer = LastLayer(head, 40, None, projector)
    result, _ = run(small(layer, 6, 16), hidden, torch.arange(6), [1] * 6)
    bad = ~torch.isfinite(result.loss) | ~torch.isfinite(result.rows).all(1)
    assert bad.nonzero()[:, 0].tolist() == [2, 4]


def test_tokens_are_cut_at_documents_or_from_their_start() -> None:
    assert list(token_chunks([3, 4, 2], 7)) == [(0, 7), (7, 9)]
    assert list(token_chunks([3, 17, 2], 7)) == [(0, 3), (3, 10), (10, 17), (17, 22)]
    assert list(token_chunks([1] * 5, 2)) == [(0, 2), (2, 4), (4, 5)]


PEAK = """
import resource, sys, torch
from engine.last_layer import LastLayer, Result
from engine.head import Head
from engine.projection import LayerShape, make_projector
torch.set_num_threads(1)
vocab, tokens, size = int(sys.argv[1]), int(sys.argv[2]), 64
head = Head("head", torch.randn(vocab, size).bfloat16(), None, 1.0, None, False)
layer = LastLayer(head, vocab, None, make_projector("tensorsketch", 4096, 0, [LayerShape("head", vocab, size)]))
hidden, targets = torch.randn(tokens, size).bfloat16(), torch.randint(vocab, (tokens,))
def run(n):
    docs = torch.zeros(n, dtype=torch.int64)
    result = Result.empty(1, 4096, torch.zeros(1, dtype=torch.int64))
    with torch.inference_mode():
        layer.add(result, hidden[:n], targets[:n], docs, torch.full((n,), 1 / n), [n])
    assert result.rows.isfinite().all()
run(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_flat_at_a_vocabulary_of_128k_and_2048_tokens() -> None:
    """Logits would be 1,050 MB in float32; the pass takes the same few chunks whatever V and T are."""

    def peak_mb(vocab: int, tokens: int) -> float:
        found = subprocess.run(
            [sys.executable, "-c", PEAK, str(vocab), str(tokens)], capture_output=True, text=True, check=True
        )
        return int(found.stdout) / 1024

    assert peak_mb(128_256, 2048) < 128
