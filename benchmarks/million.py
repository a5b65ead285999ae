"""A million documents on one machine, extracted, indexed and selected: ``python benchmarks/million.py [--quick]``.

    python benchmarks/million.py [--quick] [--json OUT] [--figure OUT.svg] [--folder DIR]

Short generated texts in Parquet files, a tiny classifier with random weights and the same one trained for some
seconds, exact gradients of the last layer (d = 256), greedy, k = 1000: everything through the product's own
stages (`jobs.extract`, `jobs.select`) on Ray with two CPUs. Each size is a process of its own, so that its
memory is its own; the corpus of a smaller size is the beginning of that of a larger one. With a model this
small all that is measured is what surrounds a model: reading, encoding, Ray Data, the store, the selection.

Memory is what a process holds alone (RssAnon: without libraries and shared memory), four samples a second; the
object store is reported by Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
LABELS = ["world", "sports", "business", "science"]
FILE_DOCS = 50_000
WORDS, TOPIC_WORDS = 2000, 150
DEFAULT, QUICK = (100_000, 300_000, 1_000_000), (20_000, 50_000)


# --- corpus and models --------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Invented words of one to three syllables, the likeliest first; the first ones belong to topics."""
    rng = np.random.default_rng(0)
    onsets, vowels = "b c d f g h j k l m n p r s t v w z br st tr pl".split(), "a e i o u ai ou".split()
    words: dict[str, None] = {}
    while len(words) < WORDS:
        parts = (rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.integers(1, 4)))
        words["".join(parts)] = None
    return list(words)


def texts(file: int, words: list[str]) -> tuple[list[str], np.ndarray]:
    """FILE_DOCS short documents of the corpus's file, and the topic that most of their words come from."""
    rng = np.random.default_rng([1, file])
    topic = rng.integers(0, len(LABELS), FILE_DOCS)
    lengths = rng.integers(4, 16, FILE_DOCS)
    total = int(lengths.sum())
    common = np.minimum(rng.zipf(1.3, total), WORDS) - 1
    own = rng.integers(0, TOPIC_WORDS, total) + TOPIC_WORDS * np.repeat(topic, lengths)
    chosen = np.where(rng.random(total) < 0.3, own, common).tolist()
    documents, start = [], 0
    for length in lengths.tolist():
        documents.append(" ".join([words[i] for i in chosen[start : start + length]]))
        start += length
    return documents, topic


def write_corpus(folder: Path, documents: int) -> list[str]:
    """Parquet files of the first so many documents (a multiple of FILE_DOCS, but for the last file)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    words, paths = vocabulary(), []
    for file in range(-(-documents // FILE_DOCS)):
        count = min(FILE_DOCS, documents - file * FILE_DOCS)
        path = folder / f"{file:04d}-{count}.parquet"
        if not path.exists():
            table = pa.table({"text": texts(file, words)[0][:count]})
            pq.write_table(table, path, row_group_size=10_000)
        paths.append(str(path))
    return paths


def write_models(folder: Path) -> tuple[str, str]:
    """Folders of the base model (random weights) and of the fine-tuned one (trained on other documents)."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base, finetuned = folder / "base", folder / "finetuned"
    if (finetuned / "config.json").exists():
        return str(base), str(finetuned)
    transformers.utils.logging.disable_progress_bar()
    words = vocabulary()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(["", *words, *LABELS * 50])], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    )
    for path in (base, finetuned):
        if path is finetuned:
            train(model, tokenizer, *texts(1 << 20, words))
        model.save_pretrained(path, safe_serialization=True)
        tokenizer.save_pretrained(path)
    return str(base), str(finetuned)


def train(model: Any, tokenizer: Any, documents: list[str], topic: np.ndarray, steps: int = 200) -> None:
    """Some steps of 64 documents: the state of the last token is to predict the label word."""
    import torch

    label_ids = torch.tensor([tokenizer.encode(" " + word)[0] for word in LABELS])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        rows = range(64 * step, 64 * step + 64)
        prompts = [f"{documents[i]}\nTopic:" for i in rows]
        batch = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1
        logits = model(input_ids=batch["input_ids"]).logits[torch.arange(64), last][:, label_ids]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(topic[rows.start : rows.stop]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- one size -----------------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """Samples this process and its descendants: peak private bytes by kind, and the object store's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[str, int] = defaultdict(int)
        self._over = threading.Event()

    def run(self) -> None:
        import psutil
        import ray

        me, samples = psutil.Process(), 0
        while not self._over.wait(0.25):
            now: dict[str, list[int]] = defaultdict(list)
            for process in [me, *me.children(recursive=True)]:
                kind = "driver" if process.pid == me.pid else _kind(process)
                if kind:
                    now[kind].append(_private(process.pid))
            for kind, sizes in now.items():
                self._up(f"{kind}, largest", max(sizes))
                self._up(f"{kind}, sum", sum(sizes))
            self._up("all", sum(map(sum, now.values())))
            samples += 1
            if samples % 4 == 0 and ray.is_initialized():
                whole, free = ray.cluster_resources(), ray.available_resources()
                used = whole.get("object_store_memory", 0) - free.get("object_store_memory", 0)
                self._up("object store", int(used))

    def _up(self, name: str, size: int) -> None:
        self.peak[name] = max(self.peak[name], size)

    def stop(self) -> dict[str, int]:
        """Peak bytes of each kind."""
        self._over.set()
        self.join()
        return dict(self.peak)


def _kind(process: Any) -> str | None:
    """A process of Ray by what it does; None for one that is gone."""
    import psutil

    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return None
    for part, kind in (
        ("WritePartition", "gradient actors"),
        ("EncodePartition", "encode actors"),
        ("ShardActor", "index actors"),
        ("ray::", "other workers"),
    ):
        if part in title:
            return kind
    return "Ray's own"


def _private(pid: int) -> int:
    """Bytes that a process holds alone: anonymous memory, neither files nor shared memory."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def write_spec(documents: int, folder: Path, picks: int, shards: int) -> Path:
    """The run of one size, as YAML."""
    from engine.spec import RunSpec

    base, finetuned = write_models(folder / "models")
    spec = RunSpec.from_dict(
        {
            "run_dir": str(folder / f"run-{documents}"),
            "models": {"base": base, "finetuned": finetuned},
            "corpus": {"paths": write_corpus(folder / "corpus", documents)},
            "task": {"labels": LABELS, "max_tokens": 64},
            "gradients": {"projector": "exact"},
            "extract": {
                "threads": 1,
                "workers_min": 2,
                "workers_max": 2,
            },  # so small a model gains nothing from threads
            "select": {"size": picks, "shards": shards},
            "ray": {"num_cpus": 2},
        }
    )
    path = folder / f"{documents}.yaml"
    path.write_text(spec.to_yaml())
    return path


def run_one(config: Path) -> dict[str, Any]:
    """Plan, extract and select one size; seconds of each stage, peak bytes, and the store's size."""
    from cluster.session import session
    from engine.spec import RunSpec
    from jobs.extract import extract, prepare
    from jobs.job import Job
    from jobs.select import select

    spec = RunSpec.from_yaml(config.read_text())
    run_dir = Path(spec.run_dir)
    shutil.rmtree(run_dir, ignore_errors=True)
    job = Job(spec, quiet=True)
    memory, seconds, clock = Memory(), {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = now - clock
        clock = now

    memory.start()
    ready = prepare(job)
    lap("plan")
    with session(spec.ray):
        lap("start Ray")
        extracted = extract(job, ready)
        lap("extract")
        selected = select(job)
        lap("index and select")
    seconds["all"] = sum(seconds.values())
    sizes = {str(path): path.stat().st_size for path in run_dir.rglob("*") if path.is_file()}
    store = sum(size for path, size in sizes.items() if "gradients.zarr" in path)
    documents, picks = extracted["documents"], spec.select.size
    if extracted["quarantined"]:
        raise SystemExit(f"{extracted['quarantined']} documents were quarantined")
    result = {
        "documents": documents,
        "tokens": extracted["tokens"],
        "seconds": seconds,
        "documents_per_second": documents / seconds["extract"],
        "ms_a_pick": 1e3 * seconds["index and select"] / picks,
        "memory": memory.stop(),
        "store_bytes": store,
        "run_bytes": sum(sizes.values()),
        "files": len(sizes),
        "objective": selected["objective"],
        "rows_compared_mean": selected["certificate"]["rows_compared_mean"],
    }
    shutil.rmtree(run_dir)
    return result


# --- all sizes ----------------------------------------------------------------------------------------------


def measure(
    sizes: tuple[int, ...], folder: Path, picks: int, shards: int, calibration: int
) -> list[dict[str, Any]]:
    """Two processes a size, one after the other: what `unbake plan` expects, and the run."""
    results = []
    for documents in sizes:
        config, out = write_spec(documents, folder, picks, shards), folder / f"{documents}.json"
        expected = folder / f"{documents}-plan.json"
        plan = [sys.executable, "-m", "jobs", "plan", "--config", str(config), "--json", str(expected), "-q"]
        plan += ["--seconds", str(calibration)]
        subprocess.run(plan, check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        shutil.rmtree(folder / f"run-{documents}")
        subprocess.run([sys.executable, __file__, "--one", str(config), "--json", str(out)], check=True)
        results.append(json.loads(out.read_text()))
        results[-1]["planned"] = planned(json.loads(expected.read_text()), results[-1])
        print(table(results[-1:]) if len(results) == 1 else table(results[-1:]).splitlines()[-1], flush=True)
    return results


def planned(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """What `unbake plan` expected over what was found: seconds of stages, bytes of the store and of an actor."""
    seconds = {stage["name"]: 3600 * stage["hours"] for stage in expected["stages"]}
    took = dict(found["seconds"])
    took["extract"] += took["start Ray"]
    ratios = {name: seconds[name] / took[name] for name in ("extract", "index and select")}
    both = sum(seconds[name] for name in ratios) / sum(took[name] for name in ratios)
    disk = expected["disk"]["gradients.zarr"] / found["store_bytes"]
    return {**ratios, "both": both, "store": disk, "tokens": expected["tokens"] / found["tokens"]}


MEMORY = (
    "driver, largest",
    "encode actors, sum",
    "gradient actors, sum",
    "Ray's own, sum",
    "object store",
    "all",
)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each stage, megabytes of each kind of process and of the store."""
    stages = list(results[0]["seconds"])
    head = ["documents", *stages, "documents/s", *(f"MB {name}" for name in MEMORY), "store MB", "files"]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for r in results:
        cells = [f"{r['documents']:,}", *(f"{r['seconds'][s]:.1f}" for s in stages)]
        cells += [f"{r['documents_per_second']:,.0f}"]
        cells += [f"{r['memory'].get(name, 0) / 1e6:,.0f}" for name in MEMORY]
        cells += [f"{r['store_bytes'] / 1e6:,.0f}", f"{r['files']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def planned_table(results: list[dict[str, Any]]) -> str:
    """Markdown: what was expected over what was found."""
    names = list(results[0]["planned"])
    lines = ["| documents | " + " | ".join(names) + " |", "|" + " ---: |" * (len(names) + 1)]
    for r in results:
        lines.append(f"| {r['documents']:,} | " + " | ".join(f"{r['planned'][n]:.2f}" for n in names) + " |")
    return "\n".join(lines)


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against documents, both axes logarithmic, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "unbake"
    from matplotlib import pyplot

    shape, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    n = [r["documents"] for r in results]
    for stage in ("extract", "index and select", "all"):
        left.plot(n, [r["seconds"][stage] for r in results], marker="o", label=stage)
    for name in MEMORY:
        right.plot(n, [r["memory"].get(name, 0) / 1e6 for r in results], marker="o", label=name)
    for axes, what in ((left, "seconds"), (right, "peak MB")):
        axes.set(xscale="log", yscale="log", xlabel="documents", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    shape.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the options, measure, and write JSON and the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 and 50,000 documents: under 3 minutes")
    parser.add_argument("--documents", type=int, nargs="+", help="sizes of your own")
    parser.add_argument("--picks", type=int, default=1000)
    parser.add_argument(
        "--shards", type=int, default=1, help="index shards; more than one live in Ray actors"
    )
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--figure", type=Path, metavar="SVG")
    parser.add_argument(
        "--folder", type=Path, help="corpus, models and runs; default: a temporary one, removed"
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for a GPU
    if options.one:
        options.json.write_text(json.dumps(run_one(options.one)))
        return
    sizes = tuple(options.documents or (QUICK if options.quick else DEFAULT))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="unbake-million-"))
    try:
        results = measure(sizes, folder, options.picks, options.shards, 10 if options.quick else 30)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print("\n" + table(results))
    print("\nexpected by `unbake plan`, over what was found\n\n" + planned_table(results))
    if options.json:
        options.json.write_text(json.dumps({"results": results}, indent=2) + "\n")
    if options.figure:
        figure(results, options.figure)


if __name__ == "__main__":
    main()
