"""The command line: every field is an option, --print_config replays, and select takes anybody's gradients."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
import zarr
from pydantic import BaseModel

from engine.rows import ArrayRows
from engine.select import Columns, select
from engine.spec import RunSpec, Select
from jobs.__main__ import COMMANDS, main
from jobs.completion import parser_of
from jobs.usage import EXAMPLES, GROUPS

ROOT = Path(__file__).parents[2]
SPEC: dict[str, Any] = {
    "models": {"base": "a", "finetuned": "b"},
    "corpus": {"paths": ["c"]},
    "task": {"labels": ["yes", "no"]},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> RunSpec:
    """The spec that --print_config prints."""
    capsys.readouterr()
    assert main(["recover", *arguments, "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return RunSpec.from_yaml(out)


def fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


VALUES: dict[str, tuple[str, Any]] = {
    "run_dir": ("s3://bucket/run", "s3://bucket/run"),
    "models.base": ("null", "null"),
    "models.base_revision": ("null", None),
    "models.trust_remote_code": ("true", True),
    "corpus.paths": ("[x.jsonl, 'y z.csv']", ["x.jsonl", "y z.csv"]),
    "corpus.text": ("[body]", "[body]"),
    "corpus.id": ("~", None),
    "corpus.max_documents": ("1000", 1000),
    "corpus.max_quarantined": ("1e-3", 0.001),
    "task.labels": ("['yes', \"no\", maybe]", ["yes", "no", "maybe"]),
    "task.template": ("{text}", "{text}"),
    "task.display_names": ("[Aye, 'No']", ["Aye", "No"]),
    "task.loss_scope": ("null", None),
    "gradients.layers": (r"layers\.(0|1)\.", r"layers\.(0|1)\."),
    "gradients.checkpoints": ("[0.5, 1]", [0.5, 1.0]),
    "gradients.dim": ("010", 10),
    "extract.gpus_per_worker": ("0.5", 0.5),
    "select.strategy": ("topk", "topk"),
    "retrain.learning_rate": ("1e-4", 1e-4),
    "retrain.zero_stage": ("2", 2),
    "retrain.seeds": ("[0, 1, 2]", [0, 1, 2]),
    "retrain.deepspeed": ("{wall_clock_breakdown: true}", {"wall_clock_breakdown": True}),
    "ray.address": ("null", None),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_written_as_in_a_spec(name: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = VALUES[name]
    more = ["--task.display_names", "null"] if name == "task.labels" else []
    found: Any = printed(capsys, "--config", config, f"--{name}", text, *more)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == expected


@pytest.mark.parametrize("text", ["[0, 2]", "0,2", "0, 2"])
def test_a_list_needs_no_brackets(text: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--config", config, "--retrain.seeds", text).retrain.seeds == [0, 2]


def test_a_template_may_hold_braces_and_newlines(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for template in ("{text}\nTopic:", "[new] {text}: {}", "'{text}' is", "null {text}"):
        assert printed(capsys, "--config", config, "--task.template", template).task.template == template


def test_every_field_is_an_option(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field, given the value that it has anyway, is accepted and changes nothing."""
    whole = RunSpec.from_dict(SPEC)
    arguments = ["--config", config]
    for name in fields(RunSpec):
        value: Any = whole
        for part in name.split("."):
            value = getattr(value, part)
        arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    assert printed(capsys, *arguments) == whole


def test_no_file_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--models.base",
        "a",
        "--models.finetuned",
        "b",
        "--corpus.paths",
        "[c]",
        "--task.labels",
        "['yes', 'no']",
    ]
    assert printed(capsys, *given) == RunSpec.from_dict(SPEC)


def test_what_print_config_prints_replays(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed(capsys, "--config", config, "--select.size", "7", "--gradients.checkpoints", "[0.25, 1]")
    again = tmp_path / "again.yaml"
    again.write_text(first.to_yaml())
    assert printed(capsys, "--config", str(again)) == first


def test_select_has_short_names(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "--config", config, "--size", "9", "--strategy", "topk", "--print_config"]) == 0
    spec = RunSpec.from_yaml(capsys.readouterr().out)
    assert (spec.select.size, spec.select.strategy) == (9, "topk")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    if command in ("recover", "extract", "select", "retrain", "evaluate", "report"):
        assert all(f"--{name} " in out for name in fields(RunSpec))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    given = {"export": ["x", "--out", "y"], "verify": ["x"], "completion": ["bash"], "experiment": ["x"]}
    assert main([command, *given.get(command, []), "--not-an-option"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert err.startswith(f"unbake {command}: ")


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


def test_the_usage_fits_a_screen_and_every_command_leads_with_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert COMMANDS.keys() <= {name for names in GROUPS.values() for name in names}
    for command in COMMANDS:
        line = EXAMPLES[command]
        assert line.startswith(f"unbake {command}")
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert capsys.readouterr().out.startswith(f"example: {line}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_is_a_command_that_can_be_given(command: str) -> None:
    arguments = shlex.split(EXAMPLES[command].partition(" > ")[0])[2:]
    options, left = parser_of(command).parse_known_args(arguments)
    assert not [word for word in left if command != "experiment"]  # whose other options are its grid's fields
    assert options


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    for arguments in ("--help", "recover --help"):
        command = f"set -o pipefail; {sys.executable} -m jobs {arguments} | head -c 10 >/dev/null"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stderr == ""
        assert done.returncode in (0, 141)


def test_a_pipe_that_breaks_elsewhere_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("jobs.__main__._run", broken)
    with pytest.raises(BrokenPipeError):
        main(["recover"])


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.__main__._run", interrupted)
    assert main(["recover", "my run.yaml"]) == 130
    assert "go on from here: unbake recover 'my run.yaml'" in capsys.readouterr().err


def test_a_spec_or_a_run_directory_may_stand_without_an_option(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = printed(capsys, config, "--select.size", "7")
    assert spec.select.size == 7
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/spec.yaml").write_text(spec.to_yaml())
    moved = printed(capsys, str(tmp_path / "moved"))
    assert moved == spec.model_copy(update={"run_dir": str(tmp_path / "moved")})
    assert main(["recover", config, "--config", config]) == 2
    assert "not both" in capsys.readouterr().err
    assert main(["recover", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_help_and_print_config_start_no_heavy_library(config: str) -> None:
    code = (
        "import sys\nfrom jobs.__main__ import main\n"
        f"main(['recover', '--config', {config!r}, '--print_config'])\n"
        "sys.exit(len({'torch', 'transformers', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gradients(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Somebody's (60, 24) features and target, as files x.npy, x.zarr and t.npy."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((60, 24)).astype(np.float32), rng.standard_normal(24)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", t)
    zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(7, 24))
    return x, t


@pytest.mark.parametrize("file", ["x.npy", "x.zarr"])
@pytest.mark.parametrize("strategy", ["greedy", "greedy_batched", "topk", "bottomk", "random"])
def test_select_takes_features_of_ones_own(
    file: str, strategy: str, gradients: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.parquet"
    arguments = ["--features", str(tmp_path / file), "--target", str(tmp_path / "t.npy"), "--out", str(out)]
    assert main(["select", *arguments, "--size", "12", "--strategy", strategy]) == 0
    text = capsys.readouterr()
    assert f"12 rows by {strategy}" in text.out
    assert text.err == ""
    expected = select(ArrayRows(*gradients), Columns(), Select(strategy=strategy, size=12))
    table = pq.read_table(out).to_pydict()
    assert table["row"] == expected.rows.tolist()
    assert table["rank"] == list(range(12))
    assert table["objective"] == expected.objective.tolist()
    before = out.read_bytes()
    main(["select", *arguments, "--select.size", "12", "--select.strategy", strategy])
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "61"], "select.size is 61"),
        (["--size", "5", "--strategy", "loss_min"], "loss"),
        (["--size", "5", "--strategy", "topk_balanced"], "labels"),
        (["--size", "5", "--strategy", "random_confident"], "confidence"),
        (["--size", "x"], "size"),
        (["--size", "5", "--models.base", "a"], "remove --models.base"),
        (["--size", "5", "--out", "{tmp}/t.npy/s.parquet"], "cannot write"),
    ],
)
def test_what_features_cannot_do_is_said(
    arguments: list[str], words: str, gradients: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "s.parquet")
    given = ["--features", str(tmp_path / "x.npy"), "--target", str(tmp_path / "t.npy"), "--out", out]
    assert main(["select", *given, *[a.replace("{tmp}", str(tmp_path)) for a in arguments]]) == 2
    text = capsys.readouterr()
    assert words in text.err
    assert text.err.count("\n") == 1
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mine.jsonl", '{"text": "a"}', "mine.jsonl holds documents: name it in corpus.paths"),
        ("mine.csv.gz", "text", "mine.csv.gz holds documents"),
        ("run.yaml", "models:\n\tbase: x\n", "indent with spaces, not with tabs"),
    ],
)
def test_a_file_that_is_no_spec_is_said_to_be_none(
    name: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["recover", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_help_is_not_suggested_for_an_option_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "3"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["recover", "run.yaml", "--select.sise", "3"]) == 2
    assert "did you mean --select.size?" in capsys.readouterr().err
