"""A LoRA adapter whose last layer did not move: told so without `gradients.layers`, extracted and selected with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml

from engine.models import load_model
from engine.rundir import RunDir
from engine.store import VALID, GradientStore
from jobs.__main__ import main


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, tiny_corpus: str) -> Path:
    import peft

    folder = tmp_path_factory.mktemp("lora")
    model = peft.get_peft_model(
        load_model(tiny_base, torch.float32),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder / "adapter")
    fields = {
        "run_dir": str(folder / "run"),
        "models": {"base": tiny_base, "finetuned": str(folder / "adapter")},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32", "dim": 512, "checkpoints": 2},
        "extract": {"threads": 1, "workers_max": 1},
        "select": {"size": 16},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def told(spec: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["extract", "--config", str(spec), "--quiet"]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_last_layer_alone_is_refused_with_the_layers_that_moved_and_the_option_that_picks_them(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = told(spec, capsys)
    assert "equals the base on the chosen layers (lm_head.weight)" in message
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert name in message
    assert "set gradients.layers=all_linear or gradients.layers='(down_proj|q_proj)$'" in message
    assert not (spec.parent / "run" / "gradients.zarr").exists()


@pytest.mark.parametrize("which", ["all_linear", "suggested"])
def test_with_the_option_extraction_and_selection_run(
    spec: Path, which: str, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = which
    if which == "suggested":
        layers = re.search(r"gradients\.layers='([^']*)'", told(spec, capsys)).group(1)
    run = spec.parent / which
    options = ["--config", str(spec), "--run_dir", str(run), "--gradients.layers", layers, "--quiet"]
    assert main(["extract", *options]) == 0
    assert main(["select", *options]) == 0
    result = json.loads((run / "stages/extract.json").read_text())["result"]
    assert len(result["layers"]) == (14 if which == "all_linear" else 4)
    assert result["projector"] == ("factored" if which == "all_linear" else "tensorsketch")
    store = GradientStore.open(RunDir(str(run)))
    assert (store.column("state") == VALID).all()
    table = pq.read_table(run / "selection.parquet").to_pydict()
    assert len(set(table["row"])) == 16
    block = store.read(0, store.n_rows)
    cosines = [
        rows @ store.target / np.linalg.norm(rows, axis=1) / np.linalg.norm(store.target)
        for rows in (block.exact(j) for j in range(2))
    ]
    assert table["row"][0] == np.argmax(np.mean(cosines, axis=0))
    np.testing.assert_allclose(table["objective"][0], np.mean(cosines, axis=0).max(), atol=1e-9)
