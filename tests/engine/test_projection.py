"""The contract every projector keeps, on every device of this machine."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import UserError
from engine.projection import LayerShape, Projector, choose_kind, make_projector

KINDS = ["exact", "rademacher", "tensorsketch"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYERS = [LayerShape("head", 301, 24), LayerShape("mlp", 40, 33)]
LENGTHS = [3, 1, 0, 70, 1, 2, 17, 1, 5]  # tokens of each document

every_kind = pytest.mark.parametrize("kind", KINDS)
every_device = pytest.mark.parametrize("device", DEVICES)


def draw(layer: LayerShape, lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Errors (tokens, rows), inputs (tokens, cols) and document indices of random documents."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(sum(lengths), layer.rows, generator=generator)
    hidden = torch.randn(sum(lengths), layer.cols, generator=generator)
    return errors, hidden, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def project(
    projector: Projector,
    layer: int,
    errors: Tensor,
    hidden: Tensor,
    docs: Tensor,
    n_docs: int,
    chunk: int = 10**9,
) -> Tensor:
    """Run begin, add_errors and finish on the projector's device; the result on the CPU."""
    device = projector.device
    state = projector.begin(layer, len(docs), device)
    for start in range(0, errors.shape[1], chunk):
        projector.add_errors(state, errors[:, start : start + chunk].to(device), start)
    return projector.finish(state, hidden.to(device), docs.to(device), n_docs).cpu()


def dense(errors: Tensor, hidden: Tensor, docs: Tensor, doc: int) -> Tensor:
    """The gradient of one document in float64."""
    return errors[docs == doc].double().T @ hidden[docs == doc].double()


def assert_close(actual: Tensor, expected: Tensor, scale: float, tolerance: float = 2e-6) -> None:
    """Euclidean distance at most `tolerance` of the gradient's own norm."""
    assert (actual.double() - expected.double()).norm() <= tolerance * scale


@every_kind
@every_device
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_factors_and_the_matrix_project_alike(kind: str, device: str, data: st.DataObject) -> None:
    layers = [
        LayerShape(f"layer{i}", data.draw(st.integers(1, 90)), data.draw(st.integers(1, 20)))
        for i in range(2)
    ]
    layer = data.draw(st.integers(0, 1))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    chunk = data.draw(st.integers(1, 90))
    projector = make_projector(
        kind, data.draw(st.integers(2, 140)), data.draw(st.integers(0, 99)), layers, device
    )
    errors, hidden, docs = draw(layers[layer], lengths)
    rows = project(projector, layer, errors, hidden, docs, len(lengths), chunk)
    assert rows.shape == (len(lengths), projector.dim)
    assert rows.dtype == torch.float32
    for doc in range(len(lengths)):
        gradient = dense(errors, hidden, docs, doc)
        chunks = [
            (start, gradient[start : start + chunk].float()) for start in range(0, len(gradient), chunk)
        ]
        whole = projector.project_matrix(layer, chunks).cpu()
        assert whole.dtype == torch.float64
        assert_close(rows[doc], whole, 1e-30 + gradient.norm().item() * max(1, math.sqrt(lengths[doc])))


@every_kind
@every_device
def test_the_map_is_linear(kind: str, device: str) -> None:
    projector = make_projector(kind, 128, 5, LAYERS, device)
    errors, hidden, _ = draw(LAYERS[0], [2])
    x, y = project(projector, 0, errors, hidden, torch.tensor([0, 1]), 2)
    weights = torch.tensor([[2.5], [-0.75]])
    both = project(projector, 0, weights * errors, hidden, torch.tensor([0, 0]), 1)[0]
    assert_close(both, 2.5 * x - 0.75 * y, 3 * (errors.norm() * hidden.norm()).item())


@every_kind
@every_device
@pytest.mark.parametrize("lengths", [LENGTHS, [1] * 70], ids=["many_tokens", "one_token"])
@pytest.mark.parametrize("dim", [512, 100, 37])
def test_a_document_projects_alike_in_any_company(
    kind: str, device: str, lengths: list[int], dim: int
) -> None:
    projector = make_projector(kind, dim, 1, LAYERS, device)
    errors, hidden, docs = draw(LAYERS[0], lengths)
    together = project(projector, 0, errors, hidden, docs, len(lengths))
    generator = torch.Generator().manual_seed(2)
    for size in [1, 2, 3, 5, len(lengths) - 1, len(lengths)]:
        company = torch.randperm(len(lengths), generator=generator)[:size]
        tokens = torch.cat([torch.nonzero(docs == doc)[:, 0] for doc in company])
        counts = torch.tensor(lengths)[company]
        order = torch.repeat_interleave(torch.arange(size), counts)
        rows = project(projector, 0, errors[tokens], hidden[tokens], order, size)
        if device == "cpu":
            assert torch.equal(rows, together[company])  # to the last bit
        else:
            assert_close(rows, together[company], together.norm().item(), 1e-6)


@every_kind
@every_device
def test_the_size_and_layout_of_error_chunks_do_not_matter(kind: str, device: str) -> None:
    projector = make_projector(kind, 256, 1, LAYERS, device)
    errors, hidden, docs = draw(LAYERS[0], LENGTHS)
    whole = project(projector, 0, errors, hidden, docs, len(LENGTHS))
    for chunk in [1, 50, 300]:
        rows = project(projector, 0, errors, hidden, docs, len(LENGTHS), chunk)
        assert_close(rows, whole, whole.norm().item(), 1e-6)
    transposed = project(projector, 0, errors.T.contiguous().T, hidden, docs, len(LENGTHS))
    assert torch.equal(transposed, whole)
    rounded = errors.bfloat16()
    from_bfloat16 = project(projector, 0, rounded, hidden, docs, len(LENGTHS))
    assert torch.equal(from_bfloat16, project(projector, 0, rounded.float(), hidden, docs, len(LENGTHS)))


@every_kind
@every_device
def test_every_device_computes_the_map_of_the_cpu(kind: str, device: str) -> None:
    projector = make_projector(kind, 256, 4, LAYERS, device)
    errors, hidden, docs = draw(LAYERS[1], LENGTHS)
    rows = project(projector, 1, errors, hidden, docs, len(LENGTHS))
    on_cpu = make_projector(kind, 256, 4, LAYERS)
    for doc, length in enumerate(LENGTHS):
        gradient = dense(errors, hidden, docs, doc).float()
        expected = on_cpu.project_matrix(1, [(0, gradient)])
        assert_close(rows[doc], expected, gradient.norm().item() * max(1, math.sqrt(length)))
        moved = projector.project_matrix(1, [(0, gradient)]).cpu()
        assert_close(moved, expected, gradient.norm().item(), 1e-12)


DIGESTS = """
import hashlib, json, torch
from engine.projection import LayerShape, make_projector
torch.set_num_threads(1)
matrix = torch.arange(60 * 7).reshape(60, 7).remainder(13).float()
layers = [LayerShape("a", 60, 7), LayerShape("b", 60, 7)]
projectors = [make_projector(kind, 96, 11, layers) for kind in ["exact", "rademacher", "tensorsketch"]]
projected = [projector.project_matrix(1, [(0, matrix)]) for projector in projectors]
print(json.dumps([hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in projected]))
"""


def test_every_process_makes_the_same_map_from_the_seed() -> None:
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGESTS],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(set(json.loads(digests[0]))) == 3
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", ["rademacher", "tensorsketch"])
def test_seeds_and_layers_have_maps_of_their_own(kind: str) -> None:
    layers = [LayerShape("a", 64, 16), LayerShape("b", 64, 16)]
    matrix = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    maps = [
        make_projector(kind, 4096, seed, layers).project_matrix(layer, [(0, matrix)])
        for seed in (0, 1, 2**40)
        for layer in (0, 1)
    ]
    cosines = torch.corrcoef(torch.stack(maps)) - torch.eye(len(maps))
    assert cosines.abs().max() < 6 / math.sqrt(4096)


def test_exact_is_the_flattened_gradient_layer_by_layer() -> None:
    projector = make_projector("exact", 8, 7, LAYERS)
    rows = torch.zeros(len(LENGTHS), projector.dim)
    expected: list[list[Tensor]] = [[] for _ in LENGTHS]
    for layer, shape in enumerate(LAYERS):
        errors, hidden, docs = draw(shape, LENGTHS, seed=layer)
        rows += project(projector, layer, errors, hidden, docs, len(LENGTHS))
        for doc, parts in enumerate(expected):
            parts.append(dense(errors, hidden, docs, doc).flatten())
    for row, parts in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.double(), torch.cat(parts), rtol=1e-5, atol=1e-5)


@every_kind
def test_no_tokens_give_rows_of_zeros(kind: str) -> None:
    projector = make_projector(kind, 64, 0, LAYERS)
    nothing = torch.zeros(0, 24)
    rows = project(projector, 0, torch.zeros(0, 301), nothing, torch.zeros(0, dtype=torch.int64), 3)
    assert torch.equal(rows, torch.zeros(3, projector.dim))


@every_kind
def test_a_description_is_json_and_tells_maps_apart(kind: str) -> None:
    def digest(projector: Projector) -> str:
        return hashlib.sha256(json.dumps(projector.describe(), sort_keys=True).encode()).hexdigest()

    same = {digest(make_projector(kind, 64, 1, LAYERS)) for _ in range(2)}
    assert len(same) == 1
    others = [make_projector(kind, 64, 1, LAYERS[:1]), make_projector(kind, 64, 1, LAYERS[::-1])]
    if kind != "exact":
        others += [make_projector(kind, 65, 1, LAYERS), make_projector(kind, 64, 2, LAYERS)]
    assert len(same | {digest(other) for other in others}) == 1 + len(others)


def test_auto_is_exact_where_the_gradient_fits_and_tensorsketch_where_not() -> None:
    labels = [LayerShape("head", 4, 1024)]
    assert choose_kind("auto", 4096, labels) == "exact"
    assert choose_kind("auto", 4095, labels) == "tensorsketch"
    assert choose_kind("rademacher", 4096, labels) == "rademacher"
    assert make_projector("auto", 4096, 0, labels).dim == 4096


def test_a_users_mistake_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="no projector 'jl'"):
        make_projector("jl", 64, 0, LAYERS)
    with pytest.raises(UserError, match="no layer"):
        make_projector("auto", 64, 0, [])
    with pytest.raises(UserError, match="28,311,552 numbers"):
        make_projector("exact", 64, 0, [LayerShape("head", 49152, 576)])
