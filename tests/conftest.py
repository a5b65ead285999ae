"""Fixtures of the whole suite: tiny models and corpora, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaMA folder with tied embeddings."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def tiny_finetuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with every weight moved a little."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "finetuned", perturb=0.02)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 unlabelled documents in a jsonl file."""
    return tiny.save_corpus(tmp_path_factory.mktemp("corpus") / "seed.jsonl")


@pytest.fixture(scope="session")
def tiny_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 labelled documents in a jsonl file."""
    return Path(tiny.save_corpus(tmp_path_factory.mktemp("corpus") / "test.jsonl", 80, seed=5, labelled=True))
