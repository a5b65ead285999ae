"""Projection of per-example gradients to d numbers by one fixed linear map (docs/method.md, step 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import UserError
from engine.extend import is_named, load
from engine.projection.base import LayerShape, Projector, State
from engine.projection.exact import Exact
from engine.projection.factored import MANY, Factored
from engine.projection.rademacher import Rademacher
from engine.projection.tensorsketch import TensorSketch

__all__ = [
    "Exact",
    "Factored",
    "LayerShape",
    "Projector",
    "Rademacher",
    "State",
    "TensorSketch",
    "choose_kind",
    "make_projector",
]

KINDS: dict[str, type[Projector]] = {kind.kind: kind for kind in (Exact, Factored, Rademacher, TensorSketch)}


def choose_kind(kind: str, dim: int, layers: Sequence[LayerShape]) -> str:
    """The projector's kind with `auto` resolved.

    That is exact where the gradient has no more than `dim` entries, else factored for many layers, else
    tensorsketch.

    Raises:
        UserError: no such kind, or factored for so few layers that it would be far less true than tensorsketch.
    """
    if kind == "auto":
        if sum(layer.size for layer in layers) <= dim:
            return Exact.kind
        return Factored.kind if len(layers) >= MANY else TensorSketch.kind
    if kind == Factored.kind and len(layers) < MANY:
        raise UserError(
            f"gradients.projector=factored is for {MANY} layers or more, whose errors average out, and "
            f"gradients.layers chose {len(layers)}: use tensorsketch or auto."
        )
    if kind not in KINDS and not is_named(kind):
        raise UserError(f"gradients.projector: no projector {kind!r}; choose auto, {', '.join(KINDS)}.")
    return kind


def make_projector(
    kind: str,
    dim: int,
    seed: int,
    layers: Sequence[LayerShape],
    device: torch.device | str = "cpu",
) -> Projector:
    """The projector of that kind on `device`; the same arguments give the same map in every process.

    Args:
        kind: one of KINDS, `auto`, or a Projector of one's own as `module:name` (`engine.extend`).
        dim: d; `exact` ignores it, its dim is the number of entries of all layers.
        layers: order matters: a layer's hashes depend on its index.

    Raises:
        UserError: unknown kind, no layers, or sizes that the kind cannot handle.
    """
    if not layers:
        raise UserError("gradients.layers chose no layer to project: loosen the pattern.")
    chosen = choose_kind(kind, dim, layers)
    own: type[Projector] = load(chosen, "gradients.projector") if is_named(chosen) else KINDS[chosen]
    return own(dim, seed, layers).to(device)
