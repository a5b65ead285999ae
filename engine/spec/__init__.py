"""RunSpec: the one typed, frozen, validated description of a run, YAML in and out.

Every field is reachable from the command line as a dotted override (``--select.size 500``). Fields are
grouped by the stage that reads them; a stage's fingerprint is made of the groups it reads and nothing else.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import Field, model_validator

from engine.extend import is_named
from engine.sections import Section, load_yaml_mapping, section_from_fields
from engine.spec.extraction import DType, Extract, Gradients
from engine.spec.inputs import Corpus, Evaluate, LoadIn, LossScope, Models, Task
from engine.spec.placement import Placement, Ray
from engine.spec.retraining import Lora, Retrain
from engine.spec.selection import SEEDED, Select, Strategy

__all__ = [
    "SEEDED",
    "Corpus",
    "DType",
    "Evaluate",
    "Extract",
    "Gradients",
    "LoadIn",
    "Lora",
    "LossScope",
    "Models",
    "Placement",
    "Ray",
    "Retrain",
    "RunSpec",
    "Select",
    "Strategy",
    "Task",
]


class RunSpec(Section):
    """One run: two models and a corpus in, the likely training data and a retrained model out."""

    run_dir: str = Field(
        "runs/run", min_length=1, description="where everything is written: a folder or an fsspec URI"
    )
    models: Models
    corpus: Corpus
    task: Task
    gradients: Gradients = Gradients()
    extract: Extract = Extract()
    select: Select = Select()
    retrain: Retrain = Retrain()
    evaluate: Evaluate = Evaluate()
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _across_sections(self) -> RunSpec:
        answers = self.corpus.response or self.corpus.messages
        if self.loss_scope == "response" and answers is None:
            raise ValueError(
                "task.loss_scope=response needs corpus.messages, or corpus.prompt and corpus.response"
            )
        if self.task.kind == "classification" and answers is not None:
            name = "messages" if self.corpus.messages else "prompt and corpus.response"
            raise ValueError(f"corpus.{name} are for language_modelling; use corpus.text")
        absent = set(self.select.checkpoints or ()).difference(self.gradients.fractions)
        if absent:
            raise ValueError(
                f"select.checkpoints asks for {min(absent):g}, which is not among gradients.checkpoints "
                f"({', '.join(f'{f:g}' for f in self.gradients.fractions)})"
            )
        if self.task.kind == "language_modelling":
            wanted = {self.select.strategy, *self.strategies}
            balanced = sorted(s for s in wanted if s.endswith("_balanced") and not is_named(s))
            if balanced:
                raise ValueError(f"{balanced[0]} balances labels, which language_modelling does not have")
            if "random_confident" in wanted:
                raise ValueError(
                    "random_confident draws by the confidence in labels: language_modelling has none"
                )
        return self

    @property
    def strategies(self) -> list[Strategy]:
        """The strategies to retrain and compare, with their default resolved."""
        if self.retrain.strategies is not None:
            return self.retrain.strategies
        return ["random", "random_confident" if self.task.kind == "classification" else "topk", "greedy"]

    @property
    def loss_scope(self) -> LossScope:
        """The loss scope with its default resolved."""
        if self.task.loss_scope is not None:
            return self.task.loss_scope
        if self.task.kind == "classification":
            return "last_token"
        return "response" if self.corpus.response or self.corpus.messages else "all_tokens"

    def to_yaml(self) -> str:
        """The resolved spec; `from_yaml` of it is equal to self."""
        fields = self.model_dump(mode="json")
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        # PyYAML writes some line separators in a way that it does not read back; escaped, it reads them all.
        return text if yaml.safe_load(text) == fields else yaml.safe_dump(fields, sort_keys=False)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str = "the spec") -> RunSpec:
        """Validate a nested dict; UserError names the first offending field in one sentence."""
        given = {name: value for name, value in fields.items() if value is not None}  # `evaluate:` is empty
        return section_from_fields(cls, given, where)

    @classmethod
    def from_yaml(cls, text: str, where: str = "the spec") -> RunSpec:
        """Parse and validate YAML; UserError for bad YAML or bad fields."""
        return cls.from_dict(load_yaml_mapping(text, where), where)
