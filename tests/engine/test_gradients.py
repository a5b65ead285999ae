"""Last-layer and hooked gradients are the true per-example gradients, for every batch plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.errors import UserError
from engine.gradients import GradientEngine, PartitionGradients
from engine.head import hidden_states
from engine.models import load_model, load_tokenizer
from engine.projection import Projector, make_projector
from engine.spec import RunSpec
from engine.target import choose_target

TEXTS = [text for text, _ in tiny.sentences(24, seed=3)]
CLASSIFY = {"kind": "classification", "labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24}
MODEL = {"kind": "language_modelling", "max_tokens": 24}


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("gpt2", True)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    family, tied = request.param
    folder = tmp_path_factory.mktemp("pair")
    return (
        tiny.save_model(folder / "base", family, tied),
        tiny.save_model(folder / "finetuned", family, tied, perturb=0.05),
    )


def make_spec(pair: tuple[str, str], task: dict[str, Any], **gradients: Any) -> RunSpec:
    return RunSpec.from_dict(
        {
            "models": {"base": pair[0], "finetuned": pair[1]},
            "corpus": {"paths": ["unused"]},
            "task": task,
            "gradients": {"dtype": "float32", "projector": "exact", **gradients},
        }
    )


def make_engine(spec: RunSpec) -> GradientEngine:
    endpoints = Endpoints(spec.models.base, spec.models.finetuned)
    encoder = Encoder(load_tokenizer(spec.models.base), spec.task, spec.loss_scope)
    target = choose_target(spec, endpoints, encoder.label_ids)
    return GradientEngine(endpoints, encoder, target, spec, tiny.DEVICE)


def run(spec: RunSpec, texts: list[str] = TEXTS) -> PartitionGradients:
    engine = make_engine(spec)
    return engine.run(engine.encoder.encode(texts))


def rows(result: PartitionGradients, checkpoint: int = -1) -> np.ndarray:
    return result.features[checkpoint].astype(np.float64) * result.scale[checkpoint][:, None]


def oracle(spec: RunSpec, texts: list[str], layers: list[str], labels: np.ndarray) -> np.ndarray:
    """Gradients by autograd, one document at a time, through the model's own logits; tied heads untied."""
    model = load_model(spec.models.finetuned, torch.float32)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    encoder = Encoder(load_tokenizer(spec.models.base), spec.task, spec.loss_scope)
    ids = torch.tensor(encoder.label_ids)
    result = []
    for text, label in zip(texts, labels, strict=True):
        ragged = encoder.encode([text])
        model.zero_grad()
        logits = model(input_ids=torch.from_numpy(ragged.tokens[None].astype(np.int64))).logits[0]
        if spec.task.kind == "classification":
            last = logits[-1][ids] if spec.task.label_softmax == "restricted" else logits[-1]
            wanted = label if spec.task.label_softmax == "restricted" else ids[label]
            loss = -torch.log_softmax(last, 0)[wanted]
        else:
            targets = torch.from_numpy(ragged.targets.astype(np.int64))
            loss = torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
        loss.backward()
        parts = []
        for name, module in model.named_modules():
            if name in layers:
                grad = module.weight.grad
                restricted = module is head and encoder.label_ids and spec.task.label_softmax == "restricted"
                parts.append((grad[ids] if restricted else grad).flatten())
        result.append(torch.cat(parts).numpy())
    return np.stack(result).astype(np.float64)


@pytest.mark.parametrize("softmax", ["restricted", "full"])
def test_classification_gradients_are_those_of_autograd(pair: tuple[str, str], softmax: str) -> None:
    spec = make_spec(pair, {**CLASSIFY, "label_softmax": softmax})
    result = run(spec)
    assert not result.problems
    assert len(set(result.label.tolist())) > 1
    expected = oracle(spec, TEXTS, ["lm_head"], result.label)
    np.testing.assert_allclose(rows(result), expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(result.norm[0], np.linalg.norm(expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("scope", ["last_token", "all_tokens"])
def test_language_model_gradients_are_those_of_autograd(pair: tuple[str, str], scope: str) -> None:
    spec = make_spec(pair, {**MODEL, "loss_scope": scope})
    result = run(spec)
    expected = oracle(spec, TEXTS, ["lm_head"], result.label)
    np.testing.assert_allclose(rows(result), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("task", [CLASSIFY, MODEL], ids=["classification", "language_modelling"])
def test_hooked_gradients_of_any_linear_layers_are_those_of_autograd(
    pair: tuple[str, str], task: dict[str, Any]
) -> None:
    family = load_model(pair[1], torch.float32).config.model_type
    pattern = r"h\.1\.mlp\.c_fc$|lm_head" if family == "gpt2" else r"layers\.1\.mlp\.up_proj$|lm_head"
    spec = make_spec(pair, task, layers=pattern)
    engine = make_engine(spec)
    names = [layer.name.removesuffix(".weight") for layer in engine.target.layers]
    assert len(names) == 2
    result = engine.run(engine.encoder.encode(TEXTS))
    expected = oracle(spec, TEXTS, names, result.label)
    np.testing.assert_allclose(rows(result), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("projector", ["exact", "tensorsketch", "rademacher"])
@pytest.mark.parametrize("task", [CLASSIFY, MODEL], ids=["classification", "language_modelling"])
def test_batch_size_and_order_do_not_change_gradients(
    pair: tuple[str, str], task: dict[str, Any], projector: str
) -> None:
    spec = make_spec(pair, task, projector=projector, dim=64, checkpoints=2)
    alone = run(
        spec.model_copy(update={"gradients": spec.gradients.model_copy(update={"tokens_per_batch": 1})})
    )
    together = run(spec)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = run(spec, [TEXTS[i] for i in order])
    for other, index in ((together, np.arange(len(TEXTS))), (shuffled, order)):
        for j in range(2):
            gap = np.abs(rows(other, j) - rows(alone, j)[index]).max()
            assert gap <= 2e-3 * np.abs(rows(alone, j)).max()
        np.testing.assert_array_equal(other.label, alone.label[index])
        np.testing.assert_allclose(other.loss, alone.loss[:, index], rtol=1e-4)


def test_alignment_is_the_inner_product_with_delta(pair: tuple[str, str]) -> None:
    spec = make_spec(pair, CLASSIFY)
    engine = make_engine(spec)
    result = engine.run(engine.encoder.encode(TEXTS))
    target, norm = engine.target.project(engine.endpoints)
    np.testing.assert_allclose(norm, np.linalg.norm(target), rtol=1e-6)
    np.testing.assert_allclose(result.alignment[0], rows(result) @ target, rtol=5e-3, atol=1e-6)


def test_checkpoints_interpolate_between_the_endpoints(pair: tuple[str, str]) -> None:
    endpoints = Endpoints(*pair)
    base, finetuned = (dict(load_model(path, torch.float32).named_parameters()) for path in pair)
    model = load_model(pair[1], torch.float32)
    for fraction in (0.5, 0.25, 0.0, 1.0):
        endpoints.interpolate(model, fraction)
        for name, value in model.named_parameters():
            expected = base[name] + fraction * (finetuned[name] - base[name])
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_checkpoints_label_at_the_finetuned_model_alone(pair: tuple[str, str]) -> None:
    one = run(make_spec(pair, CLASSIFY))
    four = run(make_spec(pair, CLASSIFY, checkpoints=4))
    base = run(make_spec(pair, CLASSIFY, checkpoints=[0.0]))
    np.testing.assert_array_equal(four.label, one.label)
    np.testing.assert_array_equal(base.label, one.label)
    np.testing.assert_array_equal(four.features[-1], one.features[0])
    assert four.features.shape[0] == 4
    assert base.features.shape[0] == 1


def test_equal_models_are_refused(pair: tuple[str, str]) -> None:
    engine = make_engine(make_spec((pair[0], pair[0]), CLASSIFY))
    with pytest.raises(UserError, match="equal weights"):
        engine.target.project(engine.endpoints)


def test_unmoved_layers_are_refused_by_the_name_of_those_that_moved(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    model = load_model(pair[0], torch.float32)
    weights = dict(model.named_parameters())
    name = next(n for n, p in weights.items() if p.ndim == 2 and ".1." in n)
    with torch.no_grad():
        weights[name].add_(0.1)
    model.save_pretrained(tmp_path / "moved")
    load_tokenizer(pair[0]).save_pretrained(tmp_path / "moved")
    engine = make_engine(make_spec((pair[0], str(tmp_path / "moved")), CLASSIFY))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        engine.target.project(engine.endpoints)


def test_documents_without_a_loss_token_are_quarantined(pair: tuple[str, str]) -> None:
    result = run(make_spec(pair, MODEL), ["", *TEXTS[:3]])
    assert result.problems == {0: "no token that carries loss"}
    assert result.scale[0, 0] == 0


def test_non_finite_gradients_quarantine_their_document_alone(pair: tuple[str, str]) -> None:
    engine = make_engine(make_spec(pair, CLASSIFY))
    good = engine.run(engine.encoder.encode(TEXTS))
    token = engine.encoder.encode([TEXTS[0]]).tokens[0]
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[int(token)] = float("nan")
        if engine.head.tied:
            engine.head = replace(engine.head, weight=torch.nan_to_num(engine.head.weight))
    bad = engine.run(engine.encoder.encode(TEXTS))
    assert 0 in bad.problems
    assert len(bad.problems) < len(TEXTS)
    clean = [i for i in range(len(TEXTS)) if i not in bad.problems]
    np.testing.assert_array_equal(bad.features[:, clean], good.features[:, clean])


def test_projected_delta_agrees_with_the_exact_alignment_within_the_predicted_error(
    pair: tuple[str, str],
) -> None:
    """Over seeds, <P G, P Delta> - <G, Delta> has mean 0 and no more variance than TensorSketch promises."""
    seeds, dim, n = 120, 128, 6
    task = {**MODEL, "loss_scope": "last_token"}
    exact = make_engine(make_spec(pair, task))
    encoded = exact.encoder.encode(TEXTS[:n])
    found = exact.run(encoded)
    shape = exact.target.layers[0]
    gradients = torch.from_numpy(rows(found)).reshape(n, shape.rows, shape.cols)
    delta = torch.from_numpy(exact.target.project(exact.endpoints)[0]).reshape(shape.rows, shape.cols)
    maps = [make_projector("tensorsketch", dim, seed, [shape]) for seed in range(seeds)]

    def projected(projector: Projector, matrix: torch.Tensor) -> torch.Tensor:
        return projector.project_matrix(0, [(0, matrix.float())])

    # What a run stores under seed 0 is this very map; the map is then tried under many seeds.
    engine = make_engine(make_spec(pair, task, projector="tensorsketch", dim=dim))
    own = torch.stack([projected(maps[0], g) for g in gradients])
    assert np.abs(rows(engine.run(encoded)) - own.numpy()).max() <= 2e-3 * own.abs().max()
    stored = engine.target.project(engine.endpoints)[0]
    np.testing.assert_allclose(stored, projected(maps[0], delta), rtol=1e-5, atol=1e-5)
    inner = [torch.stack([projected(m, g) for g in gradients]) @ projected(m, delta) for m in maps]
    errors = torch.stack(inner) - torch.from_numpy(found.alignment[0].astype(np.float64))
    bound = torch.stack([_variance_bound(g, delta, dim) for g in gradients])
    share = errors.square().mean(0) / bound
    # Standard error of a mean of squares: sqrt((kurtosis - 1) / seeds), with a kurtosis of at most about 6.
    assert (share <= 1 + 5 * np.sqrt(5 / seeds)).all()
    assert share.max() >= 0.3  # the promise says something
    assert (errors.mean(0).abs() <= 5 * (bound / seeds).sqrt()).all()


def _variance_bound(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """The bound of TensorSketch's docstring for one layer."""
    norms = x.square().sum() * y.square().sum()
    bound = norms + (x * y).sum() ** 2
    for product in (x @ y.T, x.T @ y):
        bound += (product * product).sum() + (product * product.T).sum()
    return bound / dim + 4 * norms / dim**2


@pytest.mark.parametrize("layers", ["last", "all_linear"])
def test_memory_that_runs_out_halves_batches_and_keeps_gradients(
    pair: tuple[str, str], layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(pair, CLASSIFY, checkpoints=2, layers=layers, projector="tensorsketch", dim=64)
    undisturbed, limit = run(spec), 90
    sizes = []

    def small(model: Any, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(ids.numel())
        if ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden_states(model, ids)

    disturbed = make_engine(spec)
    monkeypatch.setattr("engine.gradients.hidden_states", small)
    result = disturbed.run(disturbed.encoder.encode(TEXTS))
    assert max(sizes) > limit
    assert disturbed.tokens_per_batch == disturbed.batches.lowered <= limit
    assert max(sizes[len(sizes) // 2 :]) <= limit  # nothing is tried again that failed before
    np.testing.assert_array_equal(result.label, undisturbed.label)
    for j in range(2):
        expected = rows(undisturbed, j)
        np.testing.assert_allclose(rows(result, j), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_gradients_at_every_checkpoint(pair: tuple[str, str]) -> None:
    plain = run(make_spec(pair, CLASSIFY, checkpoints=2))
    compiled = run(make_spec(pair, CLASSIFY, checkpoints=2, compile=True))
    np.testing.assert_array_equal(compiled.label, plain.label)
    for j in range(2):
        expected = rows(plain, j)
        np.testing.assert_allclose(rows(compiled, j), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_compiling_is_for_the_last_layer(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"compile is for layers last"):
        make_spec(pair, CLASSIFY, compile=True, layers="all_linear")
