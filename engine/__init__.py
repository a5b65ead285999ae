"""What is computed: the parts of unbake, without Ray; they run on a laptop, in a notebook, under a debugger.

The names below are imported when they are first used, so that `import engine` costs nothing. Selection is
`engine.select.select`, the report `engine.report.render`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.checkpoints import Endpoints
    from engine.encode import Encoder, spec_encoder
    from engine.errors import UserError
    from engine.evaluate.task import TestSet, evaluate_model
    from engine.examples import load_examples
    from engine.gradients import GradientEngine
    from engine.models import load_model, load_tokenizer
    from engine.plain_stepper import train_plain
    from engine.projection import make_projector
    from engine.rows import ArrayRows
    from engine.rundir import RunDir
    from engine.sources import resolve
    from engine.spec import RunSpec
    from engine.store import GradientStore
    from engine.target import Target, choose_target

_WHERE = {
    "ArrayRows": "rows",
    "Encoder": "encode",
    "Endpoints": "checkpoints",
    "GradientEngine": "gradients",
    "GradientStore": "store",
    "RunDir": "rundir",
    "RunSpec": "spec",
    "Target": "target",
    "TestSet": "evaluate.task",
    "UserError": "errors",
    "choose_target": "target",
    "evaluate_model": "evaluate.task",
    "load_examples": "examples",
    "load_model": "models",
    "load_tokenizer": "models",
    "make_projector": "projection",
    "resolve": "sources",
    "spec_encoder": "encode",
    "train_plain": "plain_stepper",
}
"""Name -> the module of engine that has it."""

__all__ = [
    "ArrayRows",
    "Encoder",
    "Endpoints",
    "GradientEngine",
    "GradientStore",
    "RunDir",
    "RunSpec",
    "Target",
    "TestSet",
    "UserError",
    "choose_target",
    "evaluate_model",
    "load_examples",
    "load_model",
    "load_tokenizer",
    "make_projector",
    "resolve",
    "spec_encoder",
    "train_plain",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
