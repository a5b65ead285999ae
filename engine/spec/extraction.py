"""Extraction: which gradients are taken, at which checkpoints, how projected, by how many workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from engine.extend import OneOf
from engine.sections import Section
from engine.spec.placement import Placement

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Gradients(Section):
    """Which gradients are taken, at which checkpoints, and how they are projected (docs/method.md, steps 2 to 4)."""

    layers: str = Field(
        "last", description="last, all_linear (all but the head), or a regular expression over module names"
    )
    checkpoints: int | list[float] = Field(
        1, description="P, or a list of fractions of the way base -> finetuned"
    )
    projector: Annotated[str, OneOf(("auto", "exact", "rademacher", "tensorsketch", "factored"))] = Field(
        "auto",
        description="auto: exact where the gradient fits in dim, factored for 8 layers or more, else tensorsketch",
    )
    dim: int = Field(4096, ge=8, description="projected size d (exact ignores it)")
    seed: int = Field(0, ge=0, description="seed of the projector")
    dtype: DType = Field(
        "auto",
        description="type of the forward pass; auto: bfloat16, or float32 on a CPU without instructions for it",
    )
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="padded tokens in one forward pass; default: as many as memory takes, 4096 on a CPU",
    )

    compile: bool = Field(
        False,
        description="torch.compile the model (layers=last): slow to begin with, needs a C++ compiler on a CPU",
    )

    @field_validator("checkpoints")
    @classmethod
    def _fractions(cls, value: int | list[float]) -> int | list[float]:
        if isinstance(value, int):
            if value < 1:
                raise ValueError("must be at least 1")
        elif not value or any(not 0.0 <= f <= 1.0 for f in value) or len(set(value)) != len(value):
            raise ValueError("fractions must be distinct numbers between 0 and 1")
        return value

    @model_validator(mode="after")
    def _coherent(self) -> Gradients:
        if self.compile and self.layers != "last":
            raise ValueError("compile is for layers last: hooks see nothing inside a compiled model")
        return self

    @property
    def fractions(self) -> list[float]:
        """Interpolation fractions j/P in ascending order, length P."""
        if isinstance(self.checkpoints, int):
            return [j / self.checkpoints for j in range(1, self.checkpoints + 1)]
        return sorted(self.checkpoints)


class Extract(Placement):
    """Resources of the extraction stage. Nothing here changes a byte of its output but `threads`."""

    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of one gradient actor; default: its threads, less room for reading"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="default: 1 if the cluster has GPUs, else 0"
    )
    workers_min: int = Field(1, ge=1, description="gradient actors to start with")
    workers_max: int | None = Field(None, ge=1, description="gradient actors at most; default: what fits")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of one gradient actor; default: all cores, or 1 beside a GPU"
    )
    max_attempts: int = Field(3, ge=1, description="times a partition is tried before the run stops")

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a whole number, or at most 1")
        return value
