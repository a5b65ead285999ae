"""A training's only worker: plain torch, with the checkpoints and weights that `DeepSpeedStepper` also gives.

One worker has nothing to partition: DeepSpeed would only cost its start and its bookkeeping.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.models import load_model
from engine.plain_stepper import PlainStepper
from engine.recipe import prepare, require_dtype
from engine.spec import Retrain

STATE = "state.safetensors"


class SingleStepper(PlainStepper):
    """`PlainStepper` on a base model's folder; see `DeepSpeedStepper` for what is the same."""

    stage = 0
    config: dict[str, Any] | None = None

    def __init__(
        self,
        base: str,
        retrain: Retrain,
        label_ids: list[int] | None,
        device: torch.device,
        seed: int,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the base model and make it ready to train."""
        dtype = require_dtype(retrain, device.type)
        model = prepare(load_model(base, dtype, device, trust_remote_code), retrain, seed)
        super().__init__(model, retrain, label_ids)
        self.trained_parameters = sum(p.numel() for p in self.trained)

    def save(self, folder: str) -> None:
        """Write trained weights, in float32, and the optimizer's state: `weight.<i>`, `<name>.<i>`."""
        tensors = {f"weight.{i}": master.detach() for i, master in enumerate(self.masters)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{i}": value for name, value in state.items() if value is not None}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, os.path.join(folder, STATE)
        )

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Continue from `save`; frozen weights are those of the base model."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(os.path.join(folder, STATE)).items():
            name, _, i = key.rpartition(".")
            if name == "weight":
                self.masters[int(i)].copy_(tensor)
            else:
                state.setdefault(int(i), {})[name] = tensor
        self.write_back()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def gathered(self, only: str = "") -> dict[str, torch.Tensor]:
        """The model's weights on the CPU whose name has `only` in it, tied ones sharing memory."""
        copies: dict[int, torch.Tensor] = {}
        return {
            name: copies.setdefault(id(tensor), tensor.detach().cpu())
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if only in name
        }

    def close(self) -> None:
        """Give back the memory, so that another can follow in this process."""
        super().close()
        del self.model, self.optimizer, self.trained, self.masters
