"""Retraining: how the base model is trained on a selection, and by how many workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.sections import Section
from engine.spec.extraction import DType
from engine.spec.placement import Placement
from engine.spec.selection import Strategy


class Lora(Section):
    """Low-rank adapters trained in place of the weights (Hu et al., arXiv 2106.09685); needs unbake[adapters]."""

    rank: int = Field(0, ge=0, description="rank r of the adapters; 0: the weights themselves are trained")
    alpha: float = Field(16.0, gt=0, description="an adapter counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of an adapter's input")
    target_modules: list[str] | None = Field(
        None, description="names of the adapted layers, as in PEFT; default: every linear layer but the head"
    )
    export: Literal["merged", "adapter"] = Field(
        "merged", description="merged: a whole model; adapter: a PEFT folder to load on the base model"
    )


class Retrain(Placement):
    """How theta_0 is trained on a selection (docs/method.md, step 6)."""

    strategies: list[Strategy] | None = Field(
        None,
        description="strategies to retrain and compare; default: random, random_confident and greedy, in "
        "language_modelling random, topk and greedy",
    )
    seeds: list[int] = Field(default_factory=lambda: [0], description="paired training seeds")
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = Field(0.05, ge=0, le=1, description="share of steps with rising learning rate")
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd alone")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases and norms never decay")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    batch_size: int = Field(16, ge=1, description="documents a step, over all workers")
    micro_batch_size: int | None = Field(
        None, ge=1, description="documents in one forward pass of a worker; default: its share of the step"
    )
    dtype: DType = Field(
        "auto",
        description="auto: bfloat16 with float32 master weights, or float32 on a CPU without instructions for it",
    )
    freeze_below: int = Field(
        0, ge=0, description="train only the blocks from this one up, the norm and the head"
    )
    cache_frozen: bool = Field(
        False,
        description="with freeze_below: compute once what the frozen blocks give for the documents, and keep it in "
        "memory; needs untied embeddings",
    )
    freeze_head: bool = Field(False, description="leave the output embedding as it is (and a tied input one)")
    freeze_body: bool = Field(False, description="train the output embedding alone, the paper's ablation")
    lora: Lora = Lora()
    dropout: bool = Field(
        False, description="the model's own dropout; off, any number of workers trains alike"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    labels: Literal["hard", "soft"] = Field(
        "hard",
        description="targets: the selection's tokens, or the fine-tuned model's distribution over them",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="soft: both distributions are softmax(logits / temperature), the loss times its square; "
        "above 1 unlikely labels count for more",
    )
    soft_top_k: int = Field(
        32,
        ge=1,
        description="soft: likeliest tokens kept of a distribution over the vocabulary; the rest is one",
    )
    packing: bool = Field(
        False, description="several documents in a row of a forward pass, apart; less padding, the same loss"
    )
    early_stopping: bool = Field(False, description="keep the weights with the best validation result")
    patience: int | None = Field(
        None, ge=1, description="early stopping: stop after so many judgements without a better"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="judge on the validation documents every so many steps; default: every epoch"
    )
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list, description="further logs beside logs/<training>.jsonl (extras of these names)"
    )
    workers: int = Field(1, ge=1, description="workers of one training; with workers_max, the fewest")
    workers_max: int | None = Field(
        None, ge=1, description="elastic: as many workers as there is room for, up to so many"
    )
    parallel: int | None = Field(
        None, ge=1, description="trainings at a time at most; default: as many as the free resources hold"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="default: 1 if the cluster has GPUs, else 0"
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of a worker; default: 1 beside a GPU, else one for each of its threads"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a worker; default: its share of the node"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage; a single worker that offloads nothing needs no DeepSpeed"
    )
    offload_optimizer: bool = Field(
        False, description="ZeRO 1 to 3: keep the optimizer's state in main memory"
    )
    offload_parameters: bool = Field(False, description="ZeRO 3: keep the weights in main memory")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="merged into the DeepSpeed configuration; may not contradict the spec",
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=0,
        description="steps between checkpoints; default: one an epoch; 0: none, a lost job starts over",
    )
    keep_checkpoints: int = Field(2, ge=1, description="the last so many checkpoints are kept")
    max_failures: int = Field(3, ge=0, description="times that lost workers are replaced")

    @field_validator("strategies", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError("must be a non-empty list without repetitions")
        return value

    @model_validator(mode="after")
    def _coherent(self) -> Retrain:
        if self.patience is not None and not self.early_stopping:
            raise ValueError("patience needs early_stopping")
        if self.temperature != 1 and self.labels != "soft":
            raise ValueError("temperature is for labels soft")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum is for optimizer sgd")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.workers_max is not None and self.workers_max < self.workers:
            raise ValueError("workers_max must be at least workers")
        if self.elastic and self.optimizer == "sgd":
            raise ValueError(
                "workers_max needs optimizer adamw or adam: another number of workers resumes those"
            )
        if self.elastic and self.zero_stage == 0:
            raise ValueError("workers_max needs zero_stage 1, 2 or 3")
        if self.cache_frozen:
            self._cacheable()
        if self.lora.rank and (self.freeze_head or self.freeze_body):
            raise ValueError("lora freezes all but its adapters: remove freeze_head and freeze_body")
        if self.lora.rank and self.lora.dropout and not self.dropout:
            raise ValueError("lora.dropout needs retrain.dropout, which switches every dropout on")
        return self

    def _cacheable(self) -> None:
        """Refuse cache_frozen where there is nothing constant to keep, or no one process to keep it in."""
        if not self.freeze_below:
            raise ValueError(
                "cache_frozen needs freeze_below: without frozen blocks there is nothing to keep"
            )
        clashes = {
            "packing": self.packing,
            "dropout": self.dropout,
            "lora": bool(self.lora.rank),
            "freeze_body": self.freeze_body,
            "workers, offloading, float16 or deepspeed": self.needs_deepspeed,
        }
        found = [name for name, clash in clashes.items() if clash]
        if found:
            raise ValueError(f"cache_frozen is for one plain worker: it does not go with {found[0]}")

    @property
    def judges(self) -> bool:
        """Whether validation documents are judged during a training."""
        return self.early_stopping or self.eval_steps is not None

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during a training."""
        return self.workers_max is not None and self.workers_max > self.workers

    @property
    def needs_deepspeed(self) -> bool:
        """Whether there is something to partition, offload or scale; else one worker of plain torch does."""
        return (
            self.workers > 1
            or self.elastic
            or self.offload_optimizer
            or self.offload_parameters
            or self.dtype == "float16"
            or bool(self.deepspeed)
        )
