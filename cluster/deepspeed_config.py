"""The DeepSpeed configuration that a spec means, with the user's own block merged in."""

from __future__ import annotations

from typing import Any

from engine.errors import UserError
from engine.spec import Retrain

OWNED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "activation_checkpointing",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_parameters",
    "zero_optimization.cpu_offload": "offload_optimizer",
    "zero_optimization.cpu_offload_param": "offload_parameters",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "fp16": "dtype",
    "amp": "dtype",
    "elasticity": "workers and workers_max",
    "tensor_parallel": "workers",
}
"""Fields that follow from the spec, and the field of `retrain` that says so."""

BUCKET_SHARE = 16
"""A bucket of gradients holds 1 / 16 of what trains: 2 / 16 of a byte a parameter, however small the model."""

BUCKET_MOST = 500_000_000
"""Numbers in a bucket at most, DeepSpeed's own default: 1 GB, which ZeRO-3 holds all the time."""


def deepspeed_config(retrain: Retrain, passes: tuple[int, int], dtype: str) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    Optimizer and schedule are ours (engine.recipe), so none of DeepSpeed's own optimizers is ever compiled.

    Args:
        passes: forward passes of a worker in one step, and documents in each.
        dtype: float32, bfloat16 or float16.

    Raises:
        UserError: retrain.deepspeed sets a field that another field of the spec decides.
    """
    if not isinstance(retrain.deepspeed.get("zero_optimization", {}), dict):
        raise UserError(
            "retrain.deepspeed.zero_optimization must be a block of fields: see retrain.zero_stage."
        )
    for name, ours in OWNED.items():
        if _has(retrain.deepspeed, name.split(".")):
            raise UserError(f"retrain.deepspeed sets {name}, which retrain.{ours} decides: remove it there.")
    zero: dict[str, Any] = {"stage": zero_stage(retrain, dtype)}
    if retrain.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if retrain.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": passes[1],
        "gradient_accumulation_steps": passes[0],
        "gradient_clipping": retrain.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype != "float32":
        config["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return _merged(config, retrain.deepspeed)


def fit_buckets(config: dict[str, Any], trained: int) -> None:
    """Make the buckets of gradients fit a model of so many trained parameters, where the user's block does not."""
    size = min(BUCKET_MOST, max(1, -(-trained // BUCKET_SHARE)))
    config["zero_optimization"].setdefault("reduce_bucket_size", size)


def zero_stage(retrain: Retrain, dtype: str) -> int:
    """The stage in use: for 16-bit types stage 1 stands in for 0, whose optimizer wrapper is another one."""
    return retrain.zero_stage if dtype == "float32" else max(1, retrain.zero_stage)


def _has(block: dict[str, Any], path: list[str]) -> bool:
    for name in path:
        if not isinstance(block, dict) or name not in block:
            return False
        block = block[name]
    return True


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`ours` with `theirs` laid over it, sections merged."""
    result = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result
