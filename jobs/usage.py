"""What `unbake --help` says: the commands in groups, and an example of each."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "the whole job": ("recover", "demo"),
    "one stage": ("extract", "select", "retrain", "evaluate", "report"),
    "before": ("plan", "doctor"),
    "on a cluster": ("submit", "status", "stop"),
    "after": ("export", "fork", "verify", "diagnose", "experiment"),
    "shell": ("completion",),
}
"""Title -> commands, in the order of the help; a command that stands in none is listed last."""

EXAMPLES: dict[str, str] = {
    "recover": "unbake recover run.yaml --select.size 500",
    "demo": "unbake demo",
    "extract": "unbake extract run.yaml",
    "select": "unbake select run.yaml --size 500",
    "retrain": "unbake retrain run.yaml --retrain.seeds [0,1,2]",
    "evaluate": "unbake evaluate run.yaml",
    "report": "unbake report runs/mine --open",
    "export": "unbake export runs/mine --to datasets --out likely-data",
    "plan": "unbake plan run.yaml",
    "doctor": "unbake doctor",
    "submit": "unbake submit run.yaml --address http://127.0.0.1:8265",
    "status": "unbake status runs/mine",
    "stop": "unbake stop JOB --address http://127.0.0.1:8265",
    "verify": "unbake verify runs/mine --repair",
    "diagnose": "unbake diagnose run.yaml",
    "fork": "unbake fork runs/mine runs/mine-500",
    "experiment": "unbake experiment agnews_baseline --data_dir ../shared/data",
    "completion": "unbake completion bash > ~/.local/share/bash-completion/completions/unbake",
}
"""Command -> the line that its help leads with."""


def usage(commands: dict[str, str]) -> str:
    """The help of `unbake` itself.

    Args:
        commands: name -> a phrase.
    """
    width = max(map(len, commands))
    grouped = {title: [name for name in names if name in commands] for title, names in GROUPS.items()}
    rest = [name for name in commands if not any(name in names for names in GROUPS.values())]
    lines = ["usage: unbake COMMAND [run.yaml or run directory] [--section.field VALUE ...]", ""]
    for title, names in {**grouped, "more": rest}.items():
        if names:
            lines += [f"{title}:", *(f"  {name:<{width}}  {commands[name]}" for name in names)]
    lines += ["", "Every field of the spec is an option: unbake COMMAND --help lists what a command takes."]
    return "\n".join(lines)


def example(command: str) -> str | None:
    """The example that a command's help begins with."""
    return EXAMPLES.get(command)
