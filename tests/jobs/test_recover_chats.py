"""recover on chats, end to end: quarantine, soft labels, packing, judging between epochs, logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from engine.chat import load_chat
from engine.models import load_tokenizer
from jobs.__main__ import main

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def chats(n: int, seed: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {tiny.LABELS[label]}."}]
        for text, label in tiny.sentences(n, seed)
    ]


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def run(
    ray_session: None, tiny_base: str, tiny_finetuned: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    shutil.copytree(tiny_finetuned, folder / "tuned")
    (folder / "tuned" / "chat_template.jinja").write_text(TEMPLATE)
    bad = [[{"role": "assistant", "content": "It is I."}], "no chat"]
    fields = {
        "run_dir": str(folder / "run"),
        "models": {"base": tiny_base, "finetuned": str(folder / "tuned")},
        "corpus": {"paths": [write(folder / "c.jsonl", [*chats(60, 0), *bad])], "messages": "messages"},
        "task": {"kind": "language_modelling", "max_tokens": 96},
        "gradients": {"dtype": "float32", "dim": 64},
        "extract": {"threads": 1, "workers_max": 1},
        "select": {"size": 12},
        "retrain": {
            "strategies": ["greedy"], "epochs": 2, "batch_size": 4, "dtype": "float32", "threads": 1,
            "labels": "soft", "soft_top_k": 8, "packing": True, "eval_steps": 4, "checkpoint_steps": 0,
        },
        "evaluate": {"test": [write(folder / "t.jsonl", chats(20, 5))]},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    assert main(["recover", "--config", str(folder / "run.yaml"), "--quiet"]) == 0
    return folder / "run"


def test_chats_the_corpus_or_the_template_cannot_take_are_quarantined_with_their_reasons(run: Path) -> None:
    rows = pq.read_table(run / "quarantine.parquet").to_pydict()
    assert rows["row"] == [60, 61]
    assert rows["reason"][0] == "the chat template refuses the chat (the user speaks first)"
    assert "text that is not JSON" in rows["reason"][1]


def test_the_selected_chats_are_chats_of_the_corpus(run: Path) -> None:
    texts = pq.read_table(run / "selection.parquet")["text"].to_pylist()
    known = chats(60, 0)
    assert len(texts) == 12
    assert all(load_chat(text) in known for text in texts)


def test_the_retrained_model_was_judged_and_logged_and_can_chat(run: Path) -> None:
    training = json.loads((run / "models" / "greedy-0" / "training.json").read_text())
    assert [judged["step"] for judged in training["validation"]] == [4, 6]
    lines = [json.loads(line) for line in (run / "logs" / "greedy-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
    assert load_tokenizer(str(run / "models" / "greedy-0")).chat_template == TEMPLATE
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["metric"] == "perplexity"
