"""Encoding on Ray: parts beside the selection, shared by its trainings; soft labels; chats; logs of trainings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from cluster.examples import stored_examples
from cluster.train import TrainJob, train_many
from engine.chat import chat_text
from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import StoredExamples, load_examples
from engine.models import load_model, load_tokenizer
from engine.plain_stepper import train_plain
from engine.ragged import IGNORE
from engine.soft import soft_labels
from engine.spec import Retrain, Task

TASK = Task(labels=tiny.LABELS, max_tokens=32)
TEXTS = Task(kind="language_modelling", max_tokens=32)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def recipe(**changes: object) -> Retrain:
    defaults = {
        "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", "threads": 1, "parallel": 2,
    }  # fmt: skip
    return Retrain(**{**defaults, **changes})


def documents(path: Path, n: int = 37, group: int = 10) -> str:
    """n weighted documents in row groups of ten."""
    texts, labels = (list(column) for column in zip(*tiny.sentences(n, 0), strict=True))
    table = pa.table({"text": texts, "label": labels, "weight": np.linspace(0.5, 1.5, n)})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def job(base: str, selection: str, folder: Path, name: str, retrain: Retrain, **more: object) -> TrainJob:
    fields = {"task": TASK, "scope": "last_token", "seed": 3, **more}
    return TrainJob(
        name=name,
        base=base,
        selection=selection,
        target=str(folder / name),
        checkpoints=str(folder / "checkpoints"),
        retrain=retrain,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.timeout(300)
def test_parts_hold_what_encoding_at_once_gives_and_are_made_once(
    ray_session: None, tiny_base: str, tiny_finetuned: str, tmp_path: Path
) -> None:
    file = documents(tmp_path / "selection.parquet")
    retrain = recipe(labels="soft", soft_top_k=4, temperature=2.0)
    how = {"task": TEXTS, "scope": "all_tokens"}
    with pytest.raises(UserError, match="needs the fine-tuned model"):
        stored_examples(job(tiny_base, file, tmp_path, "a", retrain, **how), file, True)
    one = job(tiny_base, file, tmp_path, "a", retrain, finetuned=tiny_finetuned, **how)
    encoder = Encoder(load_tokenizer(tiny_base), TEXTS, "all_tokens")
    whole = load_examples(pq.read_table(file), encoder)
    hard = stored_examples(one, file, False)
    assert hard.startswith(str(tmp_path / "selection.examples"))
    assert len([name for name in os.listdir(hard) if name.endswith(".arrow")]) == 4
    stored = StoredExamples(hard).take(np.arange(len(whole)))
    for name in ("tokens", "targets", "offsets", "weights"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(whole, name))

    soft = stored_examples(one, file, True)
    assert soft != hard
    got = StoredExamples(soft).take(np.arange(len(whole))).soft
    want = soft_labels(load_model(tiny_finetuned, torch.float32), whole, None, 4, 476, 2.0)
    assert got is not None
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.probs, want.probs, rtol=1e-4)
    stamp = os.stat(f"{soft}/index.json").st_mtime_ns
    assert stored_examples(one, file, True) == soft
    assert os.stat(f"{soft}/index.json").st_mtime_ns == stamp


@pytest.mark.timeout(300)
def test_training_on_stored_soft_packed_weighted_documents_follows_the_plain_loop_and_is_logged(
    ray_session: None, tiny_base: str, tiny_finetuned: str, tmp_path: Path
) -> None:
    """Two workers, ZeRO 0 and 2, judged every three steps: the curve, the norms and the log."""
    file = documents(tmp_path / "selection.parquet")
    validation = documents(tmp_path / "validation.parquet", 11)
    common = {
        "task": TEXTS,
        "scope": "all_tokens",
        "finetuned": tiny_finetuned,
        "validation": validation,
        "logs": str(tmp_path / "logs"),
    }
    shared = {
        "workers": 2, "labels": "soft", "soft_top_k": 4, "temperature": 2.0, "packing": True, "eval_steps": 3
    }  # fmt: skip
    jobs = [
        job(tiny_base, file, tmp_path, f"zero{stage}", recipe(zero_stage=stage, **shared), **common)
        for stage in (0, 2)
    ]
    results = train_many(jobs)
    encoder = Encoder(load_tokenizer(tiny_base), TEXTS, "all_tokens")
    examples = StoredExamples(stored_examples(jobs[0], file, True))
    held_out = load_examples(pq.read_table(validation), encoder)
    lines: list[dict] = []
    plain = train_plain(
        load_model(tiny_base, torch.float32),
        examples,
        jobs[0].retrain,
        3,
        None,
        held_out,
        lambda event: lines.extend(event["log"]),
    )
    want = {line["step"]: line for line in lines if "loss" in line}
    for one, result in zip(jobs, results, strict=True):
        np.testing.assert_allclose(
            [loss for _, loss in result["curve"]], [loss for _, loss in plain["curve"]], rtol=1e-4
        )
        assert [v["step"] for v in result["validation"]] == [3, 6, 9, 10]
        for got, expected in zip(result["validation"], plain["validation"], strict=True):
            assert got == pytest.approx(expected, rel=1e-3)
        with open(tmp_path / "logs" / f"{one.name}.jsonl") as log:
            written = [json.loads(line) for line in log]
        steps = [line for line in written if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 11))
        for line in steps:
            for name in ("loss", "learning_rate", "grad_norm", "epoch"):
                assert line[name] == pytest.approx(want[line["step"]][name], rel=1e-3), (one.name, name)
        assert [line["step"] for line in written if "validation_loss" in line] == [3, 6, 9, 10]


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_base_without_a_chat_template_trains_on_chats_by_the_fine_tuned_models(
    ray_session: None, tiny_base: str, tiny_finetuned: str, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_finetuned, tuned)
    chats = [
        chat_text(
            [{"role": "user", "content": text}, {"role": "assistant", "content": f"a {tiny.LABELS[label]}"}]
        )
        for text, label in tiny.sentences(12)
    ]
    file = str(tmp_path / "chats.parquet")
    pq.write_table(pa.table({"text": chats, "label": [-1] * 12}), file)
    common = {"task": Task(kind="language_modelling", max_tokens=96), "scope": "response", "chat": True}
    one = job(tiny_base, file, tmp_path, "chat", recipe(), finetuned=str(tuned), **common)
    with pytest.raises(UserError, match=r"^chat: corpus\.messages needs a chat template"):
        train_many([one])
    (tuned / "chat_template.jinja").write_text(TEMPLATE)
    (result,) = train_many([one])
    assert result["documents"] == 12
    assert result["curve"][-1][1] < result["curve"][0][1]
    assert load_tokenizer(one.target).chat_template == TEMPLATE, "the export can chat"
    taken = StoredExamples(stored_examples(one, file, False)).take(np.arange(1))
    text = load_tokenizer(one.target).decode(taken.targets[taken.targets != IGNORE])
    assert text == json.loads(chats[0])[1]["content"] + "<|end|>"


@pytest.mark.timeout(300)
def test_documents_and_models_that_do_not_fit_are_one_sentence_and_keep_no_other_job_from_its_end(
    ray_session: None, tiny_base: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny.save_model(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = documents(tmp_path / "selection.parquet")
    wrong = str(tmp_path / "wrong.parquet")
    pq.write_table(pa.table({"text": ["a goal"], "label": [9]}), wrong)
    jobs = [
        job(tiny_base, wrong, tmp_path, "labels", recipe(epochs=1)),
        job(tiny_base, file, tmp_path, "soft", recipe(epochs=1, labels="soft"), finetuned=str(other)),
        job(tiny_base, file, tmp_path, "good", recipe(epochs=1)),
    ]
    with pytest.raises(UserError, match=r"^labels: .*labels outside 0\.\.3.*\(and 1 more failed\)"):
        train_many(jobs)
    assert os.path.exists(f"{jobs[2].target}/training.json")
    with pytest.raises(UserError, match=r"^soft: the models do not match: their tokenizers differ"):
        train_many([jobs[1]])
