"""Gradients of any linear layers through hooks are those of torch.func, and cost what they need and no more."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.errors import UserError
from engine.gradients import GradientEngine
from engine.layers import matching_layers
from engine.models import load_model, load_tokenizer
from engine.ragged import IGNORE
from engine.spec import RunSpec
from engine.target import choose_target

TEXTS = [text for text, _ in tiny.sentences(10, seed=3)]
PROMPTS = [text for text, _ in tiny.sentences(10, seed=4)]
CLASSIFY = {"kind": "classification", "labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24}
MODEL = {"kind": "language_modelling", "max_tokens": 24}
FAMILIES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False), ("biased", True)]
HALF_BLOCKS = r"(layers|h)\.1\.|lm_head"


def biased_llama(path: Path, perturb: float) -> str:
    """A LLaMA whose linear layers have biases and whose norms and biases are nothing special."""
    config = transformers.LlamaConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.1 + perturb) * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def make_pair(folder: Path, family: str, tied: bool) -> tuple[str, str]:
    if family == "biased":
        return biased_llama(folder / "base", 0.0), biased_llama(folder / "finetuned", 0.05)
    return tiny.save_model(folder / "base", family, tied), tiny.save_model(
        folder / "finetuned", family, tied, perturb=0.05
    )


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_pair(tmp_path_factory.mktemp("pair"), *request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama", True)


def make_engine(pair: tuple[str, str], task: dict[str, Any], **gradients: Any) -> GradientEngine:
    corpus: dict[str, Any] = {"paths": ["unused"]}
    if task.get("loss_scope") == "response":
        corpus |= {"prompt": "prompt", "response": "response"}
    spec = RunSpec.from_dict(
        {
            "models": {"base": pair[0], "finetuned": pair[1]},
            "corpus": corpus,
            "task": task,
            "gradients": {"dtype": "float32", "projector": "exact", **gradients},
        }
    )
    endpoints = Endpoints(*pair)
    encoder = Encoder(load_tokenizer(pair[0]), spec.task, spec.loss_scope)
    target = choose_target(spec, endpoints, encoder.label_ids)
    return GradientEngine(endpoints, encoder, target, spec, tiny.DEVICE)


def per_example(engine: GradientEngine, documents: Any, labels: np.ndarray) -> np.ndarray:
    """torch.func gradients of the chosen layers, one document a time, tied heads untied; (docs, entries)."""
    model = load_model(engine.endpoints.finetuned, torch.float32)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.requires_grad_(False)
    chosen = {layer.name for layer in engine.target.layers}
    weights = {name: p.detach() for name, p in model.named_parameters() if name in chosen}
    assert weights.keys() == chosen
    ids = torch.tensor(engine.encoder.label_ids)
    restricted = engine.target.only is not None

    def loss(weights: dict[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, weights, kwargs={"input_ids": tokens[None]}).logits[0]
        if len(ids):
            last = logits[-1][ids] if restricted else logits[-1]
            return torch.nn.functional.cross_entropy(last, targets)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE)

    result = []
    for i, label in enumerate(labels):
        part = slice(documents.offsets[i], documents.offsets[i + 1])
        tokens = torch.from_numpy(documents.tokens[part].astype(np.int64))
        targets = torch.from_numpy(documents.targets[part].astype(np.int64))
        if len(ids):
            targets = torch.tensor(int(label)) if restricted else ids[int(label)]
        found = torch.func.grad(loss)(weights, tokens, targets)
        rows = [found[layer.name] for layer in engine.target.layers]
        rows = [
            g[ids] if restricted and layer.name == engine.target.head else g
            for g, layer in zip(rows, engine.target.layers, strict=True)
        ]
        result.append(torch.cat([row.flatten() for row in rows]).double().numpy())
    return np.stack(result)


def documents_of(engine: GradientEngine) -> Any:
    response = engine.encoder.scope == "response"
    return engine.encoder.encode(TEXTS, PROMPTS if response else None)


@pytest.mark.parametrize(
    "task",
    [
        CLASSIFY,
        {**CLASSIFY, "label_softmax": "full"},
        {**MODEL, "loss_scope": "all_tokens"},
        {**MODEL, "loss_scope": "response"},
        {**MODEL, "loss_scope": "last_token"},
    ],
    ids=["labels", "labels_full", "all_tokens", "response", "last_token"],
)
def test_gradients_of_any_layers_are_those_of_torch_func(pair: tuple[str, str], task: dict[str, Any]) -> None:
    engine = make_engine(pair, task, layers=HALF_BLOCKS)
    documents = documents_of(engine)
    result = engine.run(documents)
    assert not result.problems
    expected = per_example(engine, documents, result.label)
    found = result.features[0].astype(np.float64) * result.scale[0][:, None]
    # float16 features: each entry within 2^-11 of the row's norm
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def test_all_linear_is_every_linear_layer_but_the_head_as_in_peft(pair: tuple[str, str]) -> None:
    engine = make_engine(pair, CLASSIFY, layers="all_linear", projector="auto", dim=64)
    linear = [
        f"{name}.weight"
        for name, module in engine.model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    assert [layer.name for layer in engine.target.layers] == [n for n in linear if n != "lm_head.weight"]


def test_the_target_and_the_gradients_go_through_one_map(pair: tuple[str, str]) -> None:
    """Rows of the factored projector keep inner products with Delta, which the files alone gave."""
    task = {**MODEL, "loss_scope": "all_tokens"}
    exact = make_engine(pair, task, layers="all_linear", projector="exact", dim=2048)
    factored = make_engine(pair, task, layers="all_linear", projector="factored", dim=2048)
    documents = documents_of(exact)
    products = []
    for engine in (exact, factored):
        result = engine.run(documents)
        rows = result.features[0].astype(np.float64) * result.scale[0][:, None]
        target, norm = engine.target.project(engine.endpoints)
        products.append(rows @ target / norm / (result.scale[0] if engine is exact else 1))
        if engine is exact:
            norms = result.scale[0]
    products[1] /= norms
    error = np.sqrt(np.mean((products[1] - products[0]) ** 2))
    assert error < 4 / np.sqrt(2048)
    assert np.abs(products[0]).max() > 0  # Delta is met at all


@pytest.mark.parametrize("projector", ["tensorsketch", "factored"])
def test_hooked_rows_are_the_projection_of_the_exact_ones(llama: tuple[str, str], projector: str) -> None:
    task = {**MODEL, "loss_scope": "all_tokens"}
    exact = make_engine(llama, task, layers="all_linear", projector="exact")
    engine = make_engine(llama, task, layers="all_linear", projector=projector, dim=256)
    documents = documents_of(exact)
    whole = exact.run(documents)
    rows = whole.features[0].astype(np.float64) * whole.scale[0][:, None]
    result = engine.run(documents)
    found = result.features[0].astype(np.float64) * result.scale[0][:, None]
    map_ = engine.target.projector()
    for row, projected in zip(rows, found, strict=True):
        total, start = torch.zeros(256, dtype=torch.float64), 0
        for index, layer in enumerate(engine.target.layers):
            matrix = torch.from_numpy(row[start : start + layer.size]).float().view(layer.rows, layer.cols)
            total += map_.project_matrix(index, [(0, matrix)])
            start += layer.size
        np.testing.assert_allclose(projected, total.numpy(), atol=3e-3 * np.linalg.norm(row))


class Watch:
    """Counts backward steps of each block, and the gradients of outputs alive at once."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.reached: set[int] = set()
        for index, block in enumerate(model.model.layers):
            for parameter in block.parameters():
                assert not parameter.requires_grad
            block.register_forward_hook(lambda _, __, out, index=index: self._note(index, out))

    def _note(self, index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda _: self.reached.add(index))


@pytest.mark.parametrize(
    ("pattern", "reached"),
    [(r"layers\.1\.mlp\.down_proj", {1}), (r"layers\.0\.mlp\.down_proj", {0, 1}), (r"layers\.1\.", {1})],
)
def test_the_backward_pass_ends_at_the_lowest_chosen_layer(
    llama: tuple[str, str], pattern: str, reached: set[int]
) -> None:
    engine = make_engine(llama, CLASSIFY, layers=pattern)
    watch = Watch(engine.model)
    engine.run(engine.encoder.encode(TEXTS))
    assert watch.reached == reached


class Shapes(TorchDispatchMode):
    """Sizes of all tensors that are made, in the forward and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(result) if hasattr(x, "shape")}
        return result


def test_no_per_example_gradient_of_a_layer_is_made(llama: tuple[str, str]) -> None:
    for projector, made in (("factored", False), ("tensorsketch", False), ("exact", True)):
        engine = make_engine(llama, MODEL, layers="all_linear", projector=projector, dim=16)
        documents = engine.encoder.encode(TEXTS)
        with Shapes() as shapes:
            engine.run(documents)
        whole = {
            shape
            for shape in shapes.seen
            for layer in engine.target.layers
            if layer.rows != documents.lengths.max()  # else every activation looks like one
            and shape in ((len(TEXTS), layer.rows, layer.cols), (len(TEXTS), layer.size))
        }
        assert bool(whole) == made, (projector, whole)


def test_what_a_batch_needed_is_gone_after_it(llama: tuple[str, str]) -> None:
    engine = make_engine(llama, MODEL, layers="all_linear", projector="factored", dim=64)
    documents = engine.encoder.encode(TEXTS)
    engine.run(documents)
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    engine.run(documents)
    left = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    assert not [t.shape for t in left if t.requires_grad or t.ndim == 3]


@pytest.mark.parametrize("layers", ["last", "all_linear"])
def test_the_trial_for_memory_makes_the_passes_of_a_batch(llama: tuple[str, str], layers: str) -> None:
    engine = make_engine(llama, MODEL, layers=layers)
    watch = Watch(engine.model)
    engine._trial(torch.ones(2, 8, dtype=torch.int64, device=tiny.DEVICE))
    assert watch.reached == ({0, 1} if layers == "all_linear" else set())


def test_float16_gradients_too_small_for_it_survive(llama: tuple[str, str]) -> None:
    """dL/dz of a token among many may lie below float16's smallest number."""
    task = {**MODEL, "loss_scope": "all_tokens"}
    exact = make_engine(llama, task, layers=r"layers\.0\.", dtype="float32")
    half = make_engine(llama, task, layers=r"layers\.0\.", dtype="float16")
    documents = documents_of(exact)
    rows = [
        r.features[0].astype(np.float64) * r.scale[0][:, None]
        for r in (e.run(documents) for e in (exact, half))
    ]
    assert np.linalg.norm(rows[1] - rows[0]) < 0.02 * np.linalg.norm(rows[0])


def test_a_layer_that_does_not_see_every_token_is_refused_by_name(llama: tuple[str, str]) -> None:
    engine = make_engine(llama, MODEL, layers=r"layers\.1\.mlp\.up_proj")
    up = engine.model.model.layers[1].mlp.up_proj
    up.register_forward_hook(lambda module, inputs, output: None)
    forward = engine.model.model.layers[1].mlp.forward
    engine.model.model.layers[1].mlp.forward = lambda x: torch.cat([forward(x[:, :1]), x[:, 1:]], 1)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight does not see every token"):
        engine.run(engine.encoder.encode(TEXTS))


def test_a_pattern_that_means_nothing_is_one_sentence(llama: tuple[str, str]) -> None:
    model = load_model(llama[0], torch.float32)
    with pytest.raises(UserError, match="is not a regular expression"):
        matching_layers(model, "(", "lm_head.weight", 4)
    with pytest.raises(UserError, match="matches no linear layer of LlamaForCausalLM"):
        matching_layers(model, "layernorm", "lm_head.weight", 4)
