"""Soft labels: the loss is torch's own where nothing is cut off, and hard = soft where the target is one-hot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from engine.encode import Encoder
from engine.examples import load_examples
from engine.losses import document_scores
from engine.models import load_model, load_tokenizer
from engine.padding import pad
from engine.plain_stepper import train_plain
from engine.ragged import IGNORE, Ragged, Soft
from engine.soft import soft_cross_entropy, soft_labels
from engine.spec import Retrain, Task

TEXTS = Task(kind="language_modelling", max_tokens=32)


def documents(base: str, classify: bool, n: int = 12) -> tuple[Ragged, list[int] | None]:
    texts, labels = zip(*tiny.sentences(n), strict=True)
    task = Task(labels=tiny.LABELS, max_tokens=32) if classify else TEXTS
    encoder = Encoder(load_tokenizer(base), task, "last_token" if classify else "all_tokens")
    table = pa.table({"text": list(texts), "label": list(labels)})
    return load_examples(table, encoder), encoder.label_ids or None


def distributions(n: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, rows, generator=generator)
    return logits, (3 * torch.randn(n, rows, generator=generator)).softmax(1)


TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


@given(n=st.integers(1, 6), rows=st.integers(2, 40), seed=st.integers(0, 99), t=TEMPERATURES)
@settings(deadline=None)
def test_whole_distributions_give_torchs_cross_entropy_and_its_gradient(
    n: int, rows: int, seed: int, t: float
) -> None:
    logits, probs = distributions(n, rows, seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    order = probs.argsort(1, descending=True)
    got = soft_cross_entropy(ours, order, probs.gather(1, order), t)
    want = t**2 * cross_entropy(theirs / t, probs, reduction="none")
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@given(rows=st.integers(3, 40), k=st.integers(1, 5), seed=st.integers(0, 99), t=TEMPERATURES)
@settings(deadline=None)
def test_truncated_targets_give_torchs_cross_entropy_with_the_rest_as_one_class(
    rows: int, k: int, seed: int, t: float
) -> None:
    k = min(k, rows - 1)
    logits, probs = distributions(4, rows, seed)
    top, columns = probs.topk(k, 1)
    q = (logits.double() / t).softmax(1)
    merged = torch.cat([q.gather(1, columns), 1 - q.gather(1, columns).sum(1, keepdim=True)], 1)
    target = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1).double()
    want = t**2 * cross_entropy(merged.log(), target, reduction="none")
    got = soft_cross_entropy(logits, columns, top, t).double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * t**2)


def test_at_high_temperatures_the_gradient_is_that_of_matching_centred_logits() -> None:
    """Hinton, Vinyals, Dean, equation 4: (z - mean z - v + mean v) / rows, at any t large beside the logits."""
    z, _ = distributions(5, 6, 2)
    v, t = z.flip(0), 1e3
    logits = z.double().requires_grad_()
    columns = torch.arange(6).expand(5, -1)
    soft_cross_entropy(logits, columns, (v.double() / t).softmax(1), t).sum().backward()
    gap = z - v
    want = (gap - gap.mean(1, keepdim=True)) / 6
    torch.testing.assert_close(logits.grad, want.double(), rtol=1e-2, atol=1e-2)


def test_a_temperature_without_soft_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is for labels soft"):
        Retrain(temperature=2.0)


def test_the_loss_less_the_targets_entropy_is_torchs_divergence_and_least_at_the_target() -> None:
    logits, probs = distributions(5, 16, 0)
    columns = torch.arange(16).expand(5, -1)
    entropy = -(probs * probs.log()).sum(1)
    divergence = kl_div(logits.log_softmax(1), probs, reduction="none").sum(1)
    torch.testing.assert_close(soft_cross_entropy(logits, columns, probs) - entropy, divergence)
    torch.testing.assert_close(soft_cross_entropy(probs.log(), columns, probs), entropy)
    top, columns = probs.topk(3, 1)
    at_target = probs.log().requires_grad_()
    soft_cross_entropy(at_target, columns, top).sum().backward()
    torch.testing.assert_close(at_target.grad, torch.zeros(5, 16), atol=1e-6, rtol=0)


def test_a_one_hot_target_is_a_hard_label_even_where_the_model_is_sure() -> None:
    logits, _ = distributions(6, 20, 1)
    wanted = torch.arange(6)
    logits[0] += 200 * torch.eye(20)[0]  # sure, and right
    logits[1] -= 200 * torch.eye(20)[1]  # sure, and wrong
    for width in (1, 4, 20):
        columns = (wanted[:, None] + torch.arange(width)) % 20
        probs = torch.zeros(6, width)
        probs[:, 0] = 1
        given = logits.clone().requires_grad_()
        got = soft_cross_entropy(given, columns, probs)
        torch.testing.assert_close(got, cross_entropy(logits, wanted, reduction="none"))
        got.sum().backward()
        assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classify", [True, False])
def test_soft_labels_are_the_models_own_distribution(
    tiny_finetuned: str, classify: bool, temperature: float
) -> None:
    examples, label_ids = documents(tiny_finetuned, classify)
    model = load_model(tiny_finetuned, torch.float32)
    soft = soft_labels(model, examples, label_ids, 5, 470, temperature, tokens_per_batch=64)
    row = 0
    for i in range(len(examples)):
        span = slice(examples.offsets[i], examples.offsets[i + 1])
        logits = model(torch.tensor(examples.tokens[span], dtype=torch.int64)[None]).logits[0]
        logits = logits.detach() / temperature
        for t in np.flatnonzero(examples.targets[span] != IGNORE):
            if label_ids is None:
                want = logits[t, :470].softmax(0)  # the rows that both vocabularies have
                best = want.topk(5)
                np.testing.assert_allclose(soft.probs[row], best.values, rtol=1e-4)
                assert set(soft.tokens[row]) == set(best.indices.tolist())
            else:
                assert soft.tokens[row].tolist() == label_ids
                np.testing.assert_allclose(soft.probs[row], logits[t, label_ids].softmax(0), rtol=1e-4)
            row += 1
    assert row == len(soft.probs)


@pytest.mark.parametrize("classify", [True, False])
def test_training_on_one_hot_distributions_is_training_on_labels(tiny_base: str, classify: bool) -> None:
    hard, label_ids = documents(tiny_base, classify)
    wanted = hard.targets[hard.targets != IGNORE]
    if label_ids is None:
        tokens = np.stack([wanted, (wanted + 1) % 470, (wanted + 2) % 470], 1).astype(np.int32)
        probs = np.tile(np.array([[1, 0, 0]], np.float32), (len(wanted), 1))
    else:
        tokens = np.tile(np.array(label_ids, np.int32), (len(wanted), 1))
        probs = (tokens == wanted[:, None]).astype(np.float32)
    soft = dataclasses.replace(hard, soft=Soft(tokens, probs))
    recipe = Retrain(epochs=2, batch_size=5, learning_rate=1e-2, dtype="float32")
    results, weights = [], []
    for examples in (hard, soft):
        model = load_model(tiny_base, torch.float32)
        results.append(train_plain(model, examples, recipe, 0, label_ids)["curve"])
        weights.append(model.state_dict())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("classify", [True, False])
def test_distilling_brings_the_base_nearer_to_the_fine_tuned_models_distribution(
    tiny_base: str, tiny_finetuned: str, classify: bool, t: float
) -> None:
    """The soft loss of theta_f itself is the entropy: training comes nearer to it, and not below."""
    examples, label_ids = documents(tiny_base, classify)
    teacher, model = load_model(tiny_finetuned, torch.float32), load_model(tiny_base, torch.float32)
    examples = dataclasses.replace(examples, soft=soft_labels(teacher, examples, label_ids, 8, 470, t))
    batch = pad(examples, np.arange(len(examples)))

    @torch.no_grad()
    def loss(of: torch.nn.Module) -> torch.Tensor:
        return document_scores(of, batch, label_ids, temperature=t)[0].mean()

    least, before = loss(teacher), loss(model)
    recipe = Retrain(
        epochs=10, batch_size=6, learning_rate=3e-3, dtype="float32", labels="soft", temperature=t
    )
    train_plain(model, examples, recipe, 0, label_ids)
    after = loss(model)
    assert least <= after + 1e-5
    assert after - least < 0.5 * (before - least)
