"""Synthetic checkpoints: theta_j = theta_0 + f_j (theta_f - theta_0), from two memory-mapped endpoints.

Every theta_j is computed per tensor in float32 from the endpoints and rounded once, never from another
theta_j (docs/method.md, step 2); the only model in memory is the working one that they are written into.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import safe_open

from engine.errors import UserError
from engine.model_files import require_safetensors, shards
from engine.models import load_config, load_tokenizer
from engine.placement import is_packed, pack, weights

CHUNK_BYTES = 64 << 20


class Endpoints:
    """The two models, tensor by tensor, without loading either.

    Args:
        base: theta_0's folder of safetensors.
        finetuned: theta_f's, of the same architecture. A vocabulary that one of them extends is compared on
            the shared rows.
        trust_remote_code: run Python code that the folders ship.

    Raises:
        UserError: the models do not match; the message says what differs.
    """

    def __init__(self, base: str, finetuned: str, trust_remote_code: bool = False) -> None:
        require_safetensors(base)
        require_safetensors(finetuned)
        self.base, self.finetuned = base, finetuned
        self._files = (shards(base), shards(finetuned))
        self._open: dict[str, Any] = {}
        self.vocab = _check_match(base, finetuned, trust_remote_code)
        self._check_tensors()

    def _check_tensors(self) -> None:
        ours, theirs = self._files
        for name in sorted(ours.keys() & theirs.keys()):
            a, b = self._slice(0, name).get_shape(), self._slice(1, name).get_shape()
            if a[1:] != b[1:] or (a[0] != b[0] and min(a[0], b[0]) != self.vocab):
                raise UserError(
                    f"the models do not match: {name} has shape {a} in {self.base} and {b} in {self.finetuned}."
                )
        only = sorted(name for name in ours.keys() ^ theirs.keys() if not _may_be_tied(name))
        if only:
            where = self.base if only[0] in ours else self.finetuned
            raise UserError(f"the models do not match: only {where} has the tensor {only[0]}.")

    def _slice(self, side: int, name: str) -> Any:
        file = self._files[side][name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").__enter__()
        return self._open[file].get_slice(name)

    def rows(self, name: str, alias: str | None = None) -> tuple[Any, Any]:
        """Sliceable views of a tensor in both models; `alias` is the name it has where embeddings are tied."""
        views = []
        for side in (0, 1):
            known = name if name in self._files[side] else alias
            if known is None or known not in self._files[side]:
                raise UserError(f"{(self.base, self.finetuned)[side]} has no tensor {name}.")
            views.append(self._slice(side, known))
            if views[-1].get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(
                    f"{name} in {(self.base, self.finetuned)[side]} is stored as {views[-1].get_dtype()} "
                    "(quantised): dequantise the model first."
                )
        return views[0], views[1]

    def delta(
        self, name: str, alias: str | None = None, only: list[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Delta = theta_0 - theta_f of a 2-D tensor, (start, (rows, cols) float32); see `chunks`."""
        for start, base, finetuned in self.chunks(name, alias, only):
            yield start, base - finetuned

    def chunks(
        self, name: str, alias: str | None = None, only: list[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """A 2-D tensor of both models, (start, theta_0, theta_f), each (rows, cols) float32, chunk by chunk.

        `only` picks rows (the label words'), numbered 0.. in that order; else the shared rows come in order.
        """
        base, finetuned = self.rows(name, alias)
        if only is not None:
            picked = [torch.cat([view[i : i + 1].float() for i in only]) for view in (base, finetuned)]
            yield 0, picked[0], picked[1]
            return
        n, cols = min(base.get_shape()[0], finetuned.get_shape()[0]), base.get_shape()[1]
        step = max(1, CHUNK_BYTES // (4 * cols))
        for start in range(0, n, step):
            stop = min(n, start + step)
            yield start, base[start:stop].float(), finetuned[start:stop].float()

    def changed(self) -> dict[str, float]:
        """||theta_f - theta_0|| / ||theta_0|| of every 2-D tensor that changed, largest first."""
        found = {}
        for name in sorted(self._files[0].keys() & self._files[1].keys()):
            if len(self._slice(0, name).get_shape()) != 2:
                continue
            square = sum(float(chunk.square().sum()) for _, chunk in self.delta(name))
            if square > 0:
                base = self._slice(0, name)[:].float().norm().item()
                found[name] = square**0.5 / max(base, 1e-30)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @torch.no_grad()
    def interpolate(self, model: transformers.PreTrainedModel, fraction: float) -> None:
        """Write theta_0 + fraction (theta_f - theta_0) into `model`; rows only one model has stay as they are.

        A spread model's weights are computed on the device that holds each; packed ones are packed anew.
        """
        aliases = embedding_names(model)
        for name, weight in weights(model):
            views = self.rows(name, aliases.get(name))
            shape = views[0].get_shape()
            if is_packed(weight):
                pack(model, name, _between(*views, slice(0, shape[0]), fraction, weight.device))
                continue
            n = min(shape[0], views[1].get_shape()[0])
            step = max(1, CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))
            for start in range(0, n, step):
                rows = slice(start, min(n, start + step))
                weight[rows].copy_(_between(*views, rows, fraction, weight.device))

    def hashes(self) -> dict[str, str]:
        """sha256 over the weight files of each endpoint, in order of file name."""
        return {"base": _hash_files(self._files[0]), "finetuned": _hash_files(self._files[1])}


def _between(base: Any, finetuned: Any, rows: slice, fraction: float, device: torch.device) -> torch.Tensor:
    """theta_0 + fraction (theta_f - theta_0) of some rows; in float32 unless it is one of the two."""
    if fraction in (0.0, 1.0):
        return (finetuned if fraction else base)[rows]
    # on the model's device: a GPU reads the files' type, half the bytes, and is faster
    zero, final = (view[rows].to(device).float() for view in (base, finetuned))
    return torch.lerp(zero, final, fraction)


def embedding_names(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Each embedding's name -> the other's: where a file ties the two it holds only one of them."""
    modules = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"{modules[id(module)]}.weight" for module in ends if id(module) in modules]
    return {names[0]: names[1], names[1]: names[0]} if len(names) == 2 else {}


def _may_be_tied(name: str) -> bool:
    """Tensors that a tied model's file may or may not hold, and buffers older versions saved."""
    return name.endswith(
        ("lm_head.weight", "embed_out.weight", "rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
    )


def _check_match(base: str, finetuned: str, trust_remote_code: bool) -> int:
    """Refuse two models of different architecture or tokenizer; the number of shared vocabulary rows."""
    ours, theirs = (load_config(path, trust_remote_code).get_text_config() for path in (base, finetuned))
    for field in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ):
        a, b = getattr(ours, field, None), getattr(theirs, field, None)
        if a != b:
            raise UserError(f"the models do not match: {field} is {a} in {base} and {b} in {finetuned}.")
    own, tied = (getattr(config, "tie_word_embeddings", False) for config in (ours, theirs))
    if tied and not own:
        raise UserError(
            f"the models do not match: {base} has an output embedding of its own, {finetuned} ties it to the "
            "input embedding."
        )
    _check_tokenizers(base, finetuned, trust_remote_code)
    return min(int(ours.vocab_size), int(theirs.vocab_size))


def _check_tokenizers(base: str, finetuned: str, trust_remote_code: bool) -> None:
    if not os.path.isfile(os.path.join(finetuned, "tokenizer.json")):
        return  # weights alone were published: the base model's tokenizer is used in any case
    a, b = (load_tokenizer(path, trust_remote_code).get_vocab() for path in (base, finetuned))
    moved = [token for token, index in a.items() if b.get(token) != index]
    if moved:
        token = min(moved, key=lambda t: a[t])
        raise UserError(
            f"the models do not match: their tokenizers differ ({len(moved)} tokens, the first {token!r} is "
            f"{a[token]} in {base} and {b.get(token, 'absent')} in {finetuned})."
        )


def added_tokens(base: str, finetuned: str) -> list[str]:
    """Tokens that only the fine-tuned model's tokenizer has, in order of id."""
    if not os.path.isfile(os.path.join(finetuned, "tokenizer.json")):
        return []
    a, b = load_tokenizer(base).get_vocab(), load_tokenizer(finetuned).get_vocab()
    return sorted(b.keys() - a.keys(), key=lambda token: b[token])


def weights_hash(folder: str) -> str:
    """sha256 over the weight files of a model folder, in order of file name."""
    return _hash_files(shards(folder))


def _hash_files(files: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(set(files.values())):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    digest.update(json.dumps(sorted(files)).encode())
    return digest.hexdigest()
