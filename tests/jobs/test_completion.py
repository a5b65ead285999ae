"""unbake completion: what a shell offers is what the program takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, main

OFFER = """
source {script}
offer() {{
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  $(complete -p unbake | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
  echo "${{COMPREPLY[*]}}"
}}
cd {folder}
{lines}
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from contextlib import redirect_stdout

    path = tmp_path_factory.mktemp("shell") / "unbake.bash"
    with path.open("w") as file, redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_offers_commands_options_values_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "my-run.yaml").touch()
    asked = {
        "unbake ''": set(COMMANDS),
        "unbake rec": {"recover"},
        "unbake select --select.strat": {"--select.strategy"},
        "unbake select --select.strategy greedy_": {"greedy_batched", "greedy_balanced"},
        "unbake recover --models.trust_remote_code ''": {"true", "false"},
        "unbake report my": {"my-run.yaml"},
        "unbake report x --format ''": {"html", "md", "json"},
    }
    text = OFFER.format(script=script, folder=tmp_path, lines="\n".join(f"offer {words}" for words in asked))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    for words, line in zip(asked, done.stdout.split("\n"), strict=False):
        assert asked[words] <= set(line.split()), words


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_reads_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "_unbake").write_text(capsys.readouterr().out)
    done = subprocess.run(
        ["zsh", "-n", str(tmp_path / "_unbake")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
