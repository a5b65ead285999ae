"""Tiny but real models, tokenizer and text for the tests, made on the spot from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.encode import Encoder
from engine.examples import load_examples
from engine.model_files import save
from engine.ragged import Ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests of the engine compute: on this machine's GPU, if it has one."""

LABELS = ["world", "sports", "business", "science"]
WORDS = {
    "world": "treaty border minister embassy election protest capital summit army refugees".split(),
    "sports": "goal striker coach season league match trophy sprint referee stadium".split(),
    "business": "shares profit merger bank market investors quarter revenue trade price".split(),
    "science": "orbit genome laser protein telescope quantum software robot climate fossil".split(),
}
FILLER = "the a of in after with and to new says on for more than will has".split()


def sentences(n: int, seed: int = 0, mixed: float = 0.0) -> list[tuple[str, int]]:
    """n short documents with their label index; `mixed` is the share of words from other labels."""
    rng = random.Random(seed)
    documents = []
    for _ in range(n):
        label = rng.randrange(len(LABELS))
        words = []
        for _ in range(rng.randint(4, 14)):
            topic = LABELS[rng.randrange(4)] if rng.random() < mixed else LABELS[label]
            words.append(rng.choice(WORDS[topic]) if rng.random() < 0.5 else rng.choice(FILLER))
        documents.append((" ".join(words).capitalize() + ".", label))
    return documents


def examples(encoder: Encoder, n: int, seed: int) -> Ragged:
    """n labelled sentences, encoded."""
    texts, labels = zip(*sentences(n, seed), strict=True)
    return load_examples(pa.table({"text": list(texts), "label": list(labels)}), encoder)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every label word is one token after a space."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = [" ".join([*words, *FILLER, *LABELS]) for words in WORDS.values()] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def save_model(
    path: Path,
    family: str = "llama",
    tied: bool = True,
    seed: int = 0,
    perturb: float = 0.0,
    hidden: int = 32,
) -> str:
    """Write a tiny causal model of a family (llama, gpt2); `perturb` adds seeded noise to every weight."""
    tok = tokenizer()
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tok), n_positions=256, n_embd=hidden, n_layer=2, n_head=2, tie_word_embeddings=tied
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=len(tok),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(config)
    if perturb:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(perturb * torch.randn(parameter.shape, generator=generator))
    save(model, tok, str(path))
    return str(path)


def save_corpus(path: Path, n: int = 200, seed: int = 0, labelled: bool = False) -> str:
    """Write n documents as jsonl, with a label column when asked for."""
    rows = [
        {"text": text, "label": label} if labelled else {"text": text} for text, label in sentences(n, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
