"""Model folders: config.json and safetensors, checked before anything is read, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors import SafetensorError, safe_open

from engine.errors import UserError, first_line


def require_safetensors(path: str) -> None:
    """UserError unless `path` is a model folder with config.json and safetensors weights."""
    if not os.path.isdir(path):
        raise UserError(f"model folder {path} does not exist.")
    names = os.listdir(path)
    if "config.json" not in names:
        raise UserError(f"{path} is not a model folder: it has no config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        unsafe = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        hint = f" ({unsafe[0]} is a pickle, which is not read: convert it to safetensors)" if unsafe else ""
        raise UserError(f"{path} has no .safetensors file{hint}.")
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        _check_index(path, index)


def _check_index(path: str, index: str) -> None:
    """UserError when the list of a model's files is unreadable, or names one outside its folder."""
    try:
        with open(os.path.join(path, index), encoding="utf-8") as file:
            listed = set(json.load(file)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"cannot read {path}/{index}: it is not a list of weight files.") from None
    for name in listed:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{path}/{index} names the file {name!r}, which lies outside the folder.")


def shards(path: str) -> dict[str, str]:
    """Tensor name -> safetensors file of a model folder."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors") and not name.startswith("adapter_"):
            file = os.path.join(path, name)
            try:
                with safe_open(file, framework="pt") as tensors:
                    found.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {file}: {first_line(error)}.") from None
    return found


def save(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    target: str,
    state: dict[str, torch.Tensor] | None = None,
    notes: dict[str, str] | None = None,
) -> None:
    """Write a model folder whole or not at all: built beside its place, then renamed.

    Args:
        state: weights to write instead of the model's own (ZeRO-3 holds them in pieces).
        notes: further text files, name -> contents.

    Raises:
        UserError: no space or no permission.
    """
    with written_whole(target, notes) as part, _as_it_is():
        # transformers empties the mapping it is given, so it gets a copy
        model.save_pretrained(
            part, state_dict=None if state is None else dict(state), safe_serialization=True
        )
        tokenizer.save_pretrained(part)


def _as_it_is() -> AbstractContextManager[Any]:
    """Have `save_pretrained` take a model for what it is.

    To learn whether it is wrapped, accelerate imports what could have wrapped it: DeepSpeed, which imports MLflow,
    seconds at the end of every training. What is saved here is a `PreTrainedModel` and not wrapped.
    """
    return mock.patch.object(transformers.modeling_utils, "unwrap_model", lambda model, **_: model)


@contextlib.contextmanager
def written_whole(target: str, notes: dict[str, str] | None = None) -> Iterator[str]:
    """A folder to write a model into that takes its place when the block ends, and leaves nothing otherwise.

    Args:
        notes: text files to add at the end, name -> contents.

    Raises:
        UserError: no space or no permission.
    """
    part = f"{target}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.makedirs(part)
        yield part
        for name, text in (notes or {}).items():
            with open(os.path.join(part, name), "w", encoding="utf-8") as file:
                file.write(text)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except (OSError, SafetensorError) as error:  # safetensors has its own type for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write the model {target}: {first_line(error)}.") from None
