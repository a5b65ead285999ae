"""Which of torch's attention kernels trains short rows of 16-bit weights on a CPU.

Backward of torch's fused kernel in bfloat16 takes a CPU several times as long as plain matrix products on rows of up
to `SHORT` tokens, and less on longer ones (`benchmarks/attention.py`). GPUs, float32 and inference stay with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 128
"""Tokens of the longest rows that are trained with plain products."""


def training_attention(weights: torch.dtype, input_ids: torch.Tensor) -> AbstractContextManager[None]:
    """What the forward and the backward pass of a batch (rows, tokens) are to run within.

    Both, since activations that are recomputed in backward have to come from the same kernel.
    """
    if weights.itemsize > 2 or input_ids.device.type != "cpu" or input_ids.shape[1] > SHORT:
        return nullcontext()
    plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return plain
