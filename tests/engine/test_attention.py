"""Either attention kernel trains alike; the plain one is for short rows of 16-bit weights on a CPU alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import engine.attention
from engine.attention import SHORT, training_attention
from engine.encode import Encoder
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.spec import Retrain, Task


def fused() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("dtype", "tokens", "device", "expected"),
    [
        (torch.bfloat16, SHORT, "cpu", False),
        (torch.float16, SHORT, "cpu", False),
        (torch.bfloat16, SHORT + 1, "cpu", True),
        (torch.float32, 8, "cpu", True),
        (torch.bfloat16, 8, "meta", True),
    ],
)
def test_short_16_bit_rows_on_a_cpu_leave_the_fused_kernel_and_come_back_to_it(
    dtype: torch.dtype, tokens: int, device: str, expected: bool
) -> None:
    assert fused()
    with training_attention(dtype, torch.empty((2, tokens), dtype=torch.int64, device=device)):
        assert fused() is expected
    assert fused()


@pytest.mark.parametrize("recompute", [False, True])
def test_both_kernels_give_one_curve_but_for_rounding(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """With activations recomputed, which torch refuses when their kernel is not that of the forward pass."""
    encoder = Encoder(load_tokenizer(tiny_base), Task(labels=tiny.LABELS, max_tokens=32), "last_token")
    examples = tiny.examples(encoder, 24, 0)
    recipe = Retrain(
        epochs=4, batch_size=8, learning_rate=1e-3, dtype="bfloat16", activation_checkpointing=recompute
    )
    curves = []
    for short in (0, SHORT):
        monkeypatch.setattr(engine.attention, "SHORT", short)
        model = load_model(tiny_base, torch.bfloat16)
        curves.append(
            [loss for _, loss in train_plain(model, examples, recipe, 1, encoder.label_ids)["curve"]]
        )
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)
    assert curves[0][-1] < curves[0][0]
