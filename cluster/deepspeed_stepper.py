"""DeepSpeed behind `engine.training.Stepper`: one of many workers, with checkpoints and gathered weights.

Imported by training workers alone; deepspeed itself only inside functions, because importing it claims
devices and reads the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from cluster.deepspeed_config import deepspeed_config, fit_buckets
from engine.losses import document_scores
from engine.models import load_model
from engine.padding import Batch
from engine.recipe import make_optimizer, prepare, require_dtype
from engine.spec import Retrain

TAG = "state"


class DocumentScores(torch.nn.Module):
    """`document_scores` as a module, so that DeepSpeed's hooks see every use of a weight."""

    def __init__(
        self, model: transformers.PreTrainedModel, label_ids: list[int] | None, temperature: float
    ) -> None:
        super().__init__()
        self.model, self.label_ids, self.temperature = model, label_ids, temperature

    def forward(self, batch: Batch, hits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses and hits of the batch's documents."""
        return document_scores(self.model, batch, self.label_ids, hits, self.temperature)


class DeepSpeedStepper:
    """A worker's share of a DeepSpeed training; see `engine.training.Stepper`."""

    def __init__(
        self,
        base: str,
        retrain: Retrain,
        label_ids: list[int] | None,
        passes: tuple[int, int],
        device: torch.device,
        seed: int,
        trust_remote_code: bool = False,
        universal: bool = False,
    ) -> None:
        """Load the base model and hand it to DeepSpeed. torch.distributed must be initialised.

        Args:
            passes: forward passes of this worker in one step, and documents in each.
            universal: `load` gets what `to_universal` made of a checkpoint of another number of workers.
        """
        deepspeed = import_deepspeed()
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.passes, self._done = passes[0], 0
        dtype = require_dtype(retrain, device.type)
        config = deepspeed_config(retrain, passes, str(dtype).removeprefix("torch."))
        if universal:
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        self.stage, self.config = config["zero_optimization"]["stage"], config
        partitioned = _partition_on_load(config) if self.stage == 3 else None
        self.model = prepare(load_model(base, dtype, device, trust_remote_code), retrain, seed)
        del partitioned
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        fit_buckets(config, self.trained_parameters)
        self.engine, *_ = deepspeed.initialize(
            model=DocumentScores(self.model, label_ids, retrain.temperature),
            model_parameters=trained,
            optimizer=make_optimizer(trained, retrain),
            config=config,
            dist_init_required=False,
        )

    def scores(self, batch: Batch, hits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Stepper`."""
        return self.engine(batch, hits)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Stepper`. DeepSpeed counts the passes of a step, so all but the last are stepped here."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self._done += 1
        if self._done < self.passes:
            self.engine.step()

    def step(self, rate: float) -> torch.Tensor | float:
        """See `Stepper`."""
        assert self._done == self.passes, "every worker makes the same number of passes in a step"
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        whole = self._whole_norm() if self.stage == 0 else None
        self.engine.step()
        self._done = 0
        norm = self.engine.get_global_grad_norm() if whole is None else whole
        return math.nan if norm is None else norm  # the user's block may switch it off

    def _whole_norm(self) -> torch.Tensor:
        """Norm of the averaged gradient where every worker has the whole of it; DeepSpeed keeps none then."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def save(self, folder: str) -> None:
        """Write this worker's part of a checkpoint: trained weights and optimizer state."""
        self.engine.save_checkpoint(folder, tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint; frozen weights are those of the base model."""
        path, _ = self.engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        assert path is not None, f"no checkpoint in {folder}"

    def gathered(self, only: str = "") -> dict[str, torch.Tensor]:
        """The model's weights on the CPU of rank 0, tied ones sharing memory; empty on other ranks.

        Every rank has to call it: ZeRO-3 gathers one weight at a time.

        Args:
            only: part of the names of those that are wanted.
        """
        import deepspeed

        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if only not in name:
                continue
            pieces = [tensor] if hasattr(tensor, "ds_id") else []
            with deepspeed.zero.GatheredParameters(pieces, enabled=bool(pieces)):
                if self.rank == 0:
                    copy = copies.setdefault(id(tensor), tensor.detach().to("cpu", copy=True))
                    state[name] = copy
        return state

    def close(self) -> None:
        """Give back what the engine holds, so that another can follow in this process."""
        self.engine.destroy()
        del self.engine, self.model


def to_universal(source: str, target: str) -> None:
    """Rewrite a checkpoint of ZeRO 1 to 3 parameter by parameter, so that any number of workers can load it.

    Args:
        source: folder that `DeepSpeedStepper.save` wrote, with the parts of all workers; target: a new one.
    """
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=os.path.join(source, TAG),
                output_folder=os.path.join(target, TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def import_deepspeed() -> Any:
    """deepspeed, without what costs time at every start and is not used here.

    Its shared-memory operation serves inference on CPUs alone, yet the first `initialize` would compile it: 50 s, a
    C++ compiler, and a lock file that makes the next run wait for ever when the build is killed. Its autotuner
    imports MLflow, and its Muon asks torch.compile for three functions: together over two seconds of CPU time.

    Its checkpoints are read with `weights_only`, which it does not ask for: of the classes in them those below are
    known to be harmless, any other ends the training.
    """
    with _without("mlflow"):
        import deepspeed
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    return deepspeed


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Imports find no such module, unless it is there already."""
    hidden = sys.modules.setdefault(module, None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


def _partition_on_load(config: dict[str, Any]) -> object:
    """While the returned object lives, transformers loads each weight straight into ZeRO-3's pieces."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
