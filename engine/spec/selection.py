"""Selection: the strategies, what they aim at and leave out, and what the index may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.extend import OneOf, is_named
from engine.spec.placement import Placement

Strategy = Annotated[
    str,
    OneOf(
        (
            "greedy",
            "greedy_batched",
            "greedy_balanced",
            "topk",
            "topk_balanced",
            "bottomk",
            "random",
            "random_balanced",
            "random_confident",
            "loss_min",
            "loss_max",
        )
    ),
]

SEEDED: tuple[Strategy, ...] = ("random", "random_balanced", "random_confident")
"""Strategies whose selection depends on the seed."""


class Select(Placement):
    """How documents are chosen from the store (docs/method.md, step 5)."""

    strategy: Strategy = "greedy"
    size: int = Field(1000, ge=1, description="k, the number of documents to select")
    rows: Literal["raw", "unit"] = Field("raw", description="gradients as they are, or scaled to unit norm")
    batch_size: int = Field(64, ge=1, description="greedy_batched: picks between restarts of the running sum")
    seed: int = Field(0, ge=0, description="seed of the random strategies")
    stop: Literal["size", "at_peak"] = Field(
        "size", description="at_peak keeps the prefix with the largest f"
    )
    checkpoints: list[float] | None = Field(
        None, description="use only these of gradients.checkpoints (fractions); default: all"
    )
    target: Literal["delta", "negative", "random"] = Field(
        "delta", description="what to align with; negative (-Delta) and random are negative controls"
    )
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="leave out documents that the fine-tuned model is less sure of"
    )
    dedupe: Literal["none", "exact", "near"] = Field(
        "none", description="leave out documents that repeat an earlier one (near: extra dedupe)"
    )
    precondition: Literal["none", "second_moment"] = Field(
        "none", description="divide gradients by the root of their second moment, as Adam does (exact only)"
    )
    weights: Literal["equal", "nnls"] = Field(
        "equal", description="loss weights of the picks in retraining; nnls: fitted to Delta, none negative"
    )
    rounds: int = Field(
        1,
        ge=1,
        description="greedy and topk: select in so many rounds, each aimed at what training on the picks of those "
        "before has left of Delta",
    )
    index_memory_mb: int = Field(
        512, ge=1, description="greedy: most memory of the subspace index, all shards"
    )
    cache_memory_mb: int = Field(
        64, ge=1, description="greedy: most memory of the exact rows kept, per shard"
    )
    shards: int = Field(
        1, ge=1, description="greedy: shards of the index; more than one live in Ray actors, near their data"
    )
    cpus_per_shard: float = Field(1.0, gt=0, description="CPUs of one shard, where there are more than one")
    verify: int = Field(0, ge=0, description="greedy: random picks to re-check against a full scan")

    @model_validator(mode="after")
    def _coherent(self) -> Select:
        if self.checkpoints is not None and not 0 < len(set(self.checkpoints)) == len(self.checkpoints):
            raise ValueError("checkpoints must be one fraction or more, all different")
        if self.rounds > 1 and (self.stop != "size" or self.target != "delta"):
            raise ValueError("rounds needs stop=size and target=delta")
        if self.rounds > self.size:
            raise ValueError("rounds may not be more than size")
        return self

    @property
    def rule(self) -> str:
        """The strategy, or `own` for one that is named as module:name."""
        return "own" if is_named(self.strategy) else self.strategy

    @property
    def needs_confidence(self) -> bool:
        """Whether documents are told apart by how sure the fine-tuned model is of their labels."""
        return self.min_confidence > 0 or self.strategy == "random_confident"

    @property
    def certified(self) -> bool:
        """Whether each pick comes with a proof that no other row would have been better."""
        return self.rule.startswith("greedy") and not self.in_rounds

    @property
    def in_rounds(self) -> bool:
        """Whether the strategy looks at Delta, and so can be aimed anew."""
        return self.rounds > 1 and self.rule.startswith(("greedy", "topk"))
