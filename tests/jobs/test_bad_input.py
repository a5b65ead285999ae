"""A user's mistake is one sentence and exit code 2, found before Ray starts, and nothing is left half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from jobs.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, tiny_base: str, tiny_finetuned: str, tiny_corpus: str, tiny_test: Path) -> Path:
    """A sound spec whose run directory does not exist yet."""
    spec = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "gradients": {"dtype": "float32"},
        "select": {"size": 20},
        "retrain": {"strategies": ["random", "greedy"]},
        "evaluate": {"test": [str(tiny_test)]},
        "ray": {"num_cpus": 2, "object_store_mb": 100},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for Ray fails the test: the mistake could have been found without it."""

    def refuse(*_: Any) -> None:
        raise AssertionError("Ray was asked for")

    for module in ("extract", "pipeline", "retrain"):
        monkeypatch.setattr(f"jobs.{module}.session", refuse)


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("unbake")
    assert err.endswith(".\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing column": (["--corpus.text", "body", "--evaluate.text", "text"], ["body", "seed.jsonl"]),
    "missing id column": (["--corpus.id", "uid"], ["uid", "seed.jsonl"]),
    "no such corpus file": (["--corpus.paths", "[{tmp}/none.jsonl]"], ["none.jsonl"]),
    "empty corpus file": (["--corpus.paths", "[{tmp}/empty.jsonl]"], ["no documents"]),
    "no documents": (["--corpus.paths", "[{tmp}/blank.jsonl]"], ["no documents"]),
    "corpus file that is no parquet": (["--corpus.paths", "[{tmp}/broken.parquet]"], ["broken.parquet"]),
    "corpus file that is no gzip": (["--corpus.paths", "[{tmp}/broken.jsonl.gz]"], ["broken.jsonl.gz"]),
    "unknown extension": (["--corpus.paths", "[{tmp}/file.doc]"], ["file.doc", "unknown extension"]),
    "folder without documents": (["--corpus.paths", "[{tmp}/nothing]"], ["nothing"]),
    "k larger than the corpus": (["--select.size", "201"], ["select.size is 201", "200 documents"]),
    "no such model": (["--models.base", "{tmp}/none"], ["model folder", "none does not exist"]),
    "model without safetensors": (["--models.finetuned", "{tmp}/pickled"], ["no .safetensors file", "pickle"]),
    "model without a config": (["--models.base", "{tmp}/nothing"], ["no config.json"]),
    "corrupt weights": (["--models.finetuned", "{tmp}/corrupt"], ["cannot read", "model.safetensors"]),
    "another architecture": (["--models.finetuned", "{tmp}/gpt2"], ["do not match", "model_type"]),
    "longer than the model's positions": (
        ["--models.base", "{tmp}/gpt2", "--models.finetuned", "{tmp}/gpt2-moved", "--task.max_tokens", "256"],
        ["256 positions", "set it to"],
    ),
    "another width": (["--models.finetuned", "{tmp}/wide"], ["do not match", "hidden_size"]),
    "label of many tokens": (
        ["--task.labels", "[sports, quantitative]", "--evaluate.test", "[]"], ["'quantitative'", "tokens"],
    ),
    "equal labels": (
        ["--task.labels", "[sports, sports]", "--evaluate.test", "[]"], ["'sports' and 'sports' are the same token"],
    ),
    "equal models": (["--models.finetuned", "{base}"], ["equal weights"]),
    "unmoved head": (["--models.finetuned", "{tmp}/moved"], ["gradients.layers", "layers.1.mlp.up_proj"]),
    "no such layer": (["--gradients.layers", "nope"], ["gradients.layers='nope' matches no linear layer"]),
    "layers that are no expression": (["--gradients.layers", "("], ["not a regular expression"]),
    "unknown strategy": (["--select.strategy", "best"], ["select.strategy", "'best'"]),
    "unknown strategy to compare": (["--retrain.strategies", "[random, best]"], ["retrain.strategies.1", "'best'"]),
    "contradiction": (["--retrain.patience", "2"], ["patience needs early_stopping"]),
    "contradicting DeepSpeed block": (
        ["--retrain.deepspeed", "{optimizer: {type: Adam}}"], ["retrain.deepspeed sets optimizer"],
    ),
    "early stopping by nothing": (
        ["--retrain.early_stopping", "true", "--evaluate.test", "[]"], ["early_stopping needs evaluate.test"],
    ),
    "judging by nothing": (["--retrain.eval_steps", "5", "--evaluate.test", "[]"], ["eval_steps needs evaluate.test"]),
    "unknown logger": (["--retrain.loggers", "[weights]"], ["retrain.loggers.0", "'weights'"]),
    "chats to classify": (["--corpus.messages", "text"], ["corpus.messages", "language_modelling"]),
    "chats without a template": (
        [
            "--corpus.messages", "text", "--evaluate.test", "[]",
            "--task.kind", "language_modelling", "--task.labels", "[]",
        ],
        ["needs a chat template", "chat_template.jinja"],
    ),
    "test file that is not there": (["--evaluate.test", "[{tmp}/none.jsonl]"], ["none.jsonl", "evaluate.test"]),
    "test file without labels": (["--evaluate.label", "topic"], ["topic", "test.jsonl"]),
    "labels unlike the task's": (["--evaluate.label", "text"], ["evaluate.label", "is no label"]),
    "run directory below a file": (["--run_dir", "{tmp}/file.doc/run"], ["cannot create", "not a directory"]),
    "run directory that is a file": (["--run_dir", "{tmp}/file.doc"], ["cannot create", "file.doc"]),
    "unknown option": (["--select.sise", "3"], ["unrecognized arguments: --select.sise", "--help"]),
    "unknown storage": (["--run_dir", "nope://x/y"], ["nope://x/y"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, tiny_finetuned: str) -> Path:
    """Files and models with something wrong about each."""
    tmp_path = tmp_path_factory.mktemp("wrong")
    (tmp_path / "nothing").mkdir()
    for name, content in {
        "empty.jsonl": b"", "blank.jsonl": b"\n\n \n", "broken.parquet": b"PAR1 but not really", "file.doc": b"x",
        "broken.jsonl.gz": b"not gzip",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    for name in ("pickled", "corrupt", "moved"):
        shutil.copytree(tiny_finetuned if name != "moved" else tiny_base, tmp_path / name)
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    file = tmp_path / "corrupt/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    file = tmp_path / "moved/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    torch.manual_seed(0)
    tiny.save_model(tmp_path / "gpt2", "gpt2")
    tiny.save_model(tmp_path / "gpt2-moved", "gpt2", seed=1)
    tiny.save_model(tmp_path / "wide", hidden=48)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_sentence_and_leaves_nothing(
    case: str, wrong: Path, config: Path, tiny_base: str, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = CASES[case]
    before = digest(wrong)
    given = [a.replace("{tmp}", str(wrong)).replace("{base}", tiny_base) for a in arguments]
    message = refused(capsys, "recover", "--config", str(config), *given)
    for word in words:
        assert word in message
    assert not (config.parent / "run").exists()
    assert digest(wrong) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retreive"], ["no command 'retreive'", "unbake --help"]),
        (["recover", "--config", "none.yaml"], ["none.yaml does not exist", "give a YAML spec"]),
        (["recover", "--config", "."], ["is not a run directory", "it has no spec.yaml"]),
        (["recover"], ["say what to run", "unbake recover run.yaml"]),
        (["select"], ["say what to run"]),
        (["recover", "runs/none"], ["runs/none does not exist", "a run directory"]),
        (["recovr", "run.yaml"], ["did you mean", "recover"]),
        (["recover", "--select.siz", "3"], ["did you mean --select.size"]),
        (["demo", "--rundir", "x"], ["did you mean --run_dir"]),
        (["select", "--features", "x.npy"], ["--features, --target"]),
        (["select", "--features", "x.npy", "--target", "t.npy"], ["x.npy does not exist"]),
        (["recover", "--config"], ["expected one argument"]),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize("command", ["select", "retrain", "report"])
def test_a_stage_without_the_one_before_names_it(
    command: str, config: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run `unbake extract` first" in refused(capsys, command, "--config", str(config))
    assert not (config.parent / "run").exists()


def test_an_existing_run_is_left_as_it_was(
    config: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    before = digest(run)
    for arguments in (["--select.size", "201"], ["--corpus.text", "body"]):
        refused(capsys, "extract", "--config", str(config), *arguments)
        assert digest(run) == before


def test_a_mended_mistake_is_not_held_against_the_run(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each refusal the same run directory takes a spec with other fields."""
    reached: list[str] = []
    monkeypatch.setattr("jobs.extract.session", lambda *_: reached.append("Ray") or _stop())
    for arguments in (["--select.size", "201"], ["--gradients.layers", "nope"], ["--corpus.id", "uid"]):
        refused(capsys, "extract", "--config", str(config), *arguments)
    with pytest.raises(KeyError, match="Ray"):
        main(["extract", "--config", str(config), "--corpus.partition_rows", "32", "--quiet"])
    assert reached == ["Ray"]


def _stop() -> Any:
    raise KeyError("Ray")


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of a few hundred kilobytes."""
    return mounted("300k")


def test_a_full_disk_while_converting_the_corpus_is_one_sentence(
    config: Path, small_disk: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import random

    rng = random.Random(0)
    rows = [{"text": "".join(chr(rng.randrange(33, 1000)) for _ in range(500))} for _ in range(2000)]
    corpus = config.parent / "large.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = small_disk / "run"
    message = refused(
        capsys, "extract", "--config", str(config), "--run_dir", str(run), "--corpus.paths", f"[{corpus}]"
    )
    assert "no space left on device" in message
    assert not run.exists()


def test_a_full_disk_while_writing_the_store_is_one_sentence_and_the_run_goes_on(
    config: Path, small_disk: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = config.parent / "c.parquet"
    pq.write_table(pa.table({"text": [text for text, _ in tiny.sentences(256)]}), corpus)
    # 256 rows of 1024 numbers of two bytes are more than 300 kilobytes.
    rest = ["--config", str(config), "--corpus.paths", f"[{corpus}]", "--gradients.projector", "tensorsketch"]
    rest += ["--gradients.dim", "1024", "--extract.threads", "1", "--extract.workers_max", "1"]
    run = small_disk / "run"
    message = refused(capsys, "extract", "--quiet", *rest, "--run_dir", str(run))
    assert "no space left on device" in message
    assert "partition" in message
    assert len(list((run / "done").glob("*.json"))) < 4
    shutil.copytree(run, config.parent / "moved")
    assert main(["extract", "--quiet", *rest, "--run_dir", str(config.parent / "moved")]) == 0


def test_a_read_only_place_is_one_sentence(
    config: Path, small_disk: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "there").mkdir()
    subprocess.run(
        [shutil.which("mount") or "mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60
    )
    for run in ("there", "new"):
        message = refused(capsys, "recover", "--config", str(config), "--run_dir", str(small_disk / run))
        assert "read-only" in message or "permission denied" in message


@pytest.mark.parametrize("arguments", [["--corpus.text", "body"], ["--models.base", "/no/such"]], ids=str)
def test_a_true_process_prints_one_line_and_leaves_with_code_2(config: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "jobs", "recover", "--config", str(config), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("unbake recover: ")
    assert done.stderr.count("\n") == 1
    assert not (config.parent / "run").exists()
