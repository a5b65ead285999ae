"""Extensions: a strategy, a projector or a corpus format of one's own, named in the spec as `module:name`.

The module is imported where it is used, on the driver and on the workers, because the spec names it; nothing
is looked for by itself. docs/decisions.md says why there is no registry.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from pydantic_core import CoreSchema, core_schema

from engine.errors import UserError, first_line, nearest

_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_named(word: str) -> bool:
    """Whether a field names something outside unbake: `module:name`."""
    return _NAMED.fullmatch(word) is not None


def load(word: str, field: str) -> Any:
    """What `module:name` names.

    Args:
        field: of the spec, for the message.

    Raises:
        UserError: the module cannot be imported here, or has no such name.
    """
    module, _, name = word.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"{field}: cannot import {module} ({type(error).__name__}: {first_line(error)}): put it where Python "
            "finds it (PYTHONPATH), on every machine."
        ) from None
    if not hasattr(found, name):
        raise UserError(f"{field}: the module {module} has no {name}.")
    return getattr(found, name)


@dataclass(frozen=True)
class OneOf:
    """A pydantic annotation of text fields: one of a few words, or the name of an extension."""

    words: tuple[str, ...]

    def check(self, word: str) -> str:
        """The word itself; ValueError when it is neither."""
        if word not in self.words and not is_named(word):
            hint = nearest(word, self.words)
            known = ", ".join(self.words) + (f" ({hint}?)" if hint else "")
            raise ValueError(f"{word!r} is none of {known}; one of your own is written module:name")
        return word

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))
