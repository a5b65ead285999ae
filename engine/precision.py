"""What a spec's `auto` types stand for: bfloat16, or float32 on a machine that can only imitate bfloat16."""

from __future__ import annotations

import os

import torch

from engine.spec import RunSpec


def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices as fast as float32 ones at least.

    GPUs do. Of CPUs those do for which oneDNN has kernels: x86 with AVX-512, and ARM with the bf16 extension. Elsewhere
    torch falls back on loops, whose backward takes 31 times as long as float32's (docs/decisions.md).
    """
    if torch.cuda.is_available():
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # built without oneDNN
        return False


def settled(spec: RunSpec, recorded: RunSpec | None) -> RunSpec:
    """The spec with its `auto` types decided where they are not bfloat16: a run keeps the type that it began with.

    A run that begins on a Ray of this machine, which imitates bfloat16, takes float32. On a cluster `auto` is bfloat16,
    whatever the driver's machine is.

    Args:
        recorded: the spec that the run directory holds; None when the run has not begun.
    """
    imitates = not (spec.ray.address or os.environ.get("RAY_ADDRESS") or multiplies_bfloat16())
    changes = {}
    for name in ("gradients", "retrain"):
        section = getattr(spec, name)
        if recorded is not None:
            dtype = getattr(recorded, name).dtype
        else:
            dtype = "float32" if imitates else "auto"
        if section.dtype == "auto" and dtype != "auto":
            changes[name] = section.model_copy(update={"dtype": dtype})
    return spec.model_copy(update=changes) if changes else spec
