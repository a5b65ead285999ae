"""Time and error of the projectors: ``python benchmarks/projection.py [--quick] [--threads 1] [--json OUT]``.

Three tables: a token's cost in each kind, the ways to sketch errors over a vocabulary, and how far projected
inner products are from the true ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.projection import LayerShape, make_projector
from engine.projection.hashing import buckets_and_signs
from engine.projection.tensorsketch import group, group_sums

SHAPES = [  # what, rows, cols, dim
    ("SmolLM2-135M head", 49_152, 576, 4096),
    ("Llama-3.2-1B head", 128_256, 2048, 4096),
    ("4 labels", 4, 576, 4096),
]
CHUNK = 8192  # rows of an error chunk


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Best wall time of `repeats` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def factors(tokens: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Errors softmax(logits) - onehot of random logits, and inputs that lean one way, as hidden states do."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(tokens, rows, generator=generator)
    labels = torch.randint(rows, (tokens,), generator=generator)
    errors = logits.softmax(1)
    errors[torch.arange(tokens), labels] -= 1
    return errors, torch.randn(tokens, cols, generator=generator) + 1


def cost(kind: str, rows: int, cols: int, dim: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Microseconds a token, tokens all of one document each.

    Rademacher at a vocabulary's size would take minutes: it is timed on its first rows, and scaled.
    """
    share = 1.0
    if kind == "rademacher" and rows > 64:
        share, rows = 16 / rows, 16
    errors, hidden = factors(tokens, rows, cols)
    chunks = [(start, errors[:, start : start + CHUNK].T.contiguous().T) for start in range(0, rows, CHUNK)]
    projector = make_projector(kind, dim, 0, [LayerShape("layer", rows, cols)])

    def run() -> None:
        state = projector.begin(0, tokens, "cpu")
        for start, chunk in chunks:
            projector.add_errors(state, chunk, start)
        projector.finish(state, hidden, torch.arange(tokens), tokens)

    return {"us_per_token": seconds(run, repeats) / share / tokens * 1e6, "extrapolated": share < 1}


def sketch_formulations(rows: int, dim: int, tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds a token of ways to add one (tokens, rows) float32 array of errors into `dim` buckets."""
    errors = torch.randn(tokens, rows)
    turned = errors.T.contiguous()
    buckets, signs = buckets_and_signs(0, 0, "row", rows, dim)
    groups = group(buckets, signs, dim)
    lengths = torch.bincount(buckets, minlength=dim)
    crow = torch.cat([groups.starts, torch.tensor([rows])])
    matrix = torch.sparse_csr_tensor(crow, groups.order, groups.signs, (dim, rows), check_invariants=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "index_add_ over columns": lambda: torch.zeros(tokens, dim).index_add_(1, buckets, errors * signs),
        "scatter_add_ over columns": lambda: torch.zeros(tokens, dim).scatter_add_(
            1, buckets.expand(tokens, rows), errors * signs
        ),
        "transpose, index_add_": lambda: torch.zeros(dim, tokens).index_add_(
            0, buckets, errors.T.contiguous() * signs[:, None]
        ),
        "transpose, sparse CSR": lambda: matrix @ errors.T.contiguous(),
        "transpose, embedding_bag": lambda: group_sums(errors.T.contiguous(), groups),
        "transposed, index_add_": lambda: torch.zeros(dim, tokens).index_add_(
            0, buckets, turned * signs[:, None]
        ),
        "transposed, sparse CSR": lambda: matrix @ turned,
        "transposed, segment_reduce": lambda: torch.segment_reduce(
            (turned * signs[:, None])[groups.order], "sum", lengths=lengths, axis=0
        ),
        "transposed, embedding_bag (chosen)": lambda: group_sums(turned, groups),
    }
    return {name: seconds(way, repeats) / tokens * 1e6 for name, way in ways.items()}


def product_error(kind: str, rows: int, cols: int, dim: int, documents: int) -> float:
    """Standard deviation of (<Px, Py> - <x, y>) / (|x| |y|) over pairs of one-token documents and 4 seeds."""
    errors, hidden = factors(documents, rows, cols)
    errors, hidden = (x / x.norm(dim=1, keepdim=True) for x in (errors, hidden))
    true = (errors.double() @ errors.double().T) * (hidden.double() @ hidden.double().T)
    pairs = torch.triu_indices(documents, documents, 1)
    squares = []
    for seed in range(4):
        projector = make_projector(kind, dim, seed, [LayerShape("layer", rows, cols)])
        state = projector.begin(0, documents, "cpu")
        projector.add_errors(state, errors, 0)
        projected = projector.finish(state, hidden, torch.arange(documents), documents).double()
        squares.append((projected @ projected.T - true)[pairs[0], pairs[1]].square().mean().item())
    return math.sqrt(sum(squares) / len(squares))


def rounding(kind: str, rows: int, cols: int, dim: int, tokens: int) -> float:
    """|finish - project_matrix| / |project_matrix| of one document: float32 factors against float64 sums."""
    errors, hidden = factors(tokens, rows, cols)
    projector = make_projector(kind, dim, 0, [LayerShape("layer", rows, cols)])
    state = projector.begin(0, tokens, "cpu")
    projector.add_errors(state, errors, 0)
    row = projector.finish(state, hidden, torch.zeros(tokens, dtype=torch.int64), 1)[0].double()
    blocks = (
        (start, errors[:, start : start + 1024].double().T @ hidden.double())
        for start in range(0, rows, 1024)
    )
    exact = projector.project_matrix(0, blocks)
    return ((row - exact).norm() / exact.norm()).item()


def measure(quick: bool) -> dict[str, Any]:
    """Run and print every table."""
    tokens, repeats = (32, 1) if quick else (128, 5)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "tokens": tokens, "cost": {}}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"\nmicroseconds a token, {tokens} at a time")
    for what, rows, cols, dim in SHAPES[:: 2 if quick else 1]:
        kinds = (
            ["exact", "rademacher", "tensorsketch"] if rows * cols <= dim else ["rademacher", "tensorsketch"]
        )
        costs = {kind: cost(kind, rows, cols, dim, tokens, repeats) for kind in kinds}
        result["cost"][what] = costs
        for kind, entry in costs.items():
            note = "  extrapolated from 16 rows" if entry["extrapolated"] else ""
            print(f"  {what:18} d={dim}  {kind:13} {entry['us_per_token']:14,.1f}{note}")
        ratio = costs["rademacher"]["us_per_token"] / costs["tensorsketch"]["us_per_token"]
        result["cost"][what]["rademacher_over_tensorsketch"] = ratio
        print(f"  {what:18} rademacher / tensorsketch = {ratio:,.0f}")

    result["formulations"] = sketch_formulations(49_152, 4096, tokens, repeats)
    chosen = result["formulations"]["transposed, embedding_bag (chosen)"]
    print(
        "\ncount sketch of (tokens, 49152) errors to 4096 buckets, microseconds a token (ratio to the chosen)"
    )
    for name, value in result["formulations"].items():
        print(f"  {name:36} {value:8.1f}  ({value / chosen:.1f})")

    rows = 8192 if quick else 49_152
    result["rounding"] = {str(n): rounding("tensorsketch", rows, 576, 4096, n) for n in (1, 256)}
    result["product_error"] = {}
    print("\nerror of inner products: standard deviation relative to the norms, times sqrt(d) (dense JL: 1)")
    for kind, size in (("rademacher", 4), ("tensorsketch", 4), ("tensorsketch", rows)):
        for dim in (512, 4096):
            error = product_error(kind, size, 576, dim, 64)
            result["product_error"][f"{kind} {size}x576 d={dim}"] = error
            print(f"  {kind:13} {size:6} x 576  d={dim:5}  {error:.4f}  {error * math.sqrt(dim):.2f}")
    print("\ntensorsketch, float32 against float64, relative error of a document's row")
    for n, value in result["rounding"].items():
        print(f"  {n:>4} tokens  {value:.1e}")
    return result


def main() -> None:
    """Parse the options, measure, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, one repeat: a few seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    result = measure(options.quick)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
