"""Gradients of layers other than the last, against what they cannot do without: ``python benchmarks/layers.py``.

    python benchmarks/layers.py [--quick] [--only PART ...] [--bergson PYTHON] [--threads N] [--json OUT]

On real text and SmolLM2-135M:

    blocks   documents of 64 tokens, all_tokens: `GradientEngine.run` on the layers of two blocks (14), against a
             plain forward and backward pass of the same model over the same batches, once with gradients of the
             two blocks' weights alone (the least that training them costs) and once of all weights. They take
             turns, changing who goes first.
    all      32 documents of 64 tokens, one batch, the 210 linear layers of the blocks (all_linear): the engine
             with the factored projector to 4096 numbers, and bergson's `collect_gradients` (its build without
             loading the model), projection_dim 16, in turns, each in a process of its own that waits meanwhile.
             PYTHON is an interpreter that has bergson: its dependencies are not ours.
    between  seconds to write the checkpoint half-way from base to fine-tuned into a model on one device, spread
             by accelerate, packed to 8 and to 4 bits.
    error    standard deviation, over pairs of documents and seeds, of projected inner products, relative to the
             norms and times sqrt(d) (an ideal dense projection: 1), on real gradients of the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.gradients import GradientEngine
from engine.layers import LayerHooks
from engine.model_files import save
from engine.models import load_model, load_tokenizer
from engine.padding import length_batches, pad
from engine.projection import LayerShape, Projector, make_projector
from engine.ragged import IGNORE, Ragged
from engine.sources import resolve
from engine.spec import RunSpec
from engine.target import choose_target
from jobs.demo import gguf

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CORPORA = ("brown", "wikitext", "abc_news", "ag_news")
TOKENS, DIM, BERGSON_DIM = 64, 4096, 16
PAIRS = {"two lowest blocks": r"layers\.[01]\.", "two highest blocks": r"layers\.(28|29)\."}
EVERY = "all_linear"
PARTS = ["blocks", "all", "between", "error"]


def pair(folder: Path, dtype: str) -> tuple[str, str]:
    """Folders of SmolLM2-135M and of the same with every weight moved a little; made once."""
    base, moved = folder / dtype / "base", folder / dtype / "moved"
    if not moved.exists():
        source = resolve(gguf(), str(folder / "source"))
        model, tokenizer = load_model(source, getattr(torch, dtype)), load_tokenizer(source)
        save(model, tokenizer, str(base))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
        save(model, tokenizer, str(moved))
    return str(base), str(moved)


def texts(n: int, tokenizer: Any) -> list[str]:
    """n real texts of at least TOKENS tokens."""
    found: list[str] = []
    for name in CORPORA:
        rows = pq.read_table(SHARED / f"{name}.parquet")["text"].to_pylist()
        found += [text for text in rows if len(text) > 5 * TOKENS][: 4 * n]
    order = np.random.default_rng(0).permutation(len(found))
    chosen = (found[i] for i in order)
    return [text for text in chosen if len(tokenizer(text)["input_ids"]) >= TOKENS][:n]


def make_engine(models: tuple[str, str], dtype: str, layers: str, projector: str = "auto") -> GradientEngine:
    spec = RunSpec.from_dict(
        {
            "models": {"base": models[0], "finetuned": models[1]},
            "corpus": {"paths": ["unused"]},
            "task": {"kind": "language_modelling", "loss_scope": "all_tokens", "max_tokens": TOKENS},
            "gradients": {
                "dtype": dtype, "layers": layers, "projector": projector, "dim": DIM, "tokens_per_batch": 32 * TOKENS,
            },
        }
    )  # fmt: skip
    endpoints = Endpoints(*models)
    encoder = Encoder(load_tokenizer(models[0]), spec.task, spec.loss_scope)
    return GradientEngine(endpoints, encoder, choose_target(spec, endpoints, []), spec)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each over `rounds`, after one to warm up; who goes first changes."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            spent = runs[name]()
            if turn:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


# --- two blocks -----------------------------------------------------------------------------------------------


def plain(
    models: tuple[str, str], dtype: str, documents: Ragged, wanted: set[str] | None
) -> Callable[[], None]:
    """A forward and a backward pass over the engine's batches, with gradients of `wanted` weights (None: all)."""
    model = load_model(models[1], getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted is None or name in wanted)
    batches = [pad(documents, group) for group in length_batches(documents.lengths, 32 * TOKENS)]

    def run() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE
            ).backward()

    return run


def blocks(models: tuple[str, str], dtype: str, n: int, rounds: int) -> dict[str, Any]:
    """Seconds of the engine and of plain passes, and their ratios, for the lowest and the highest two blocks."""
    result: dict[str, Any] = {}
    for what, pattern in PAIRS.items():
        engines = {
            "auto": make_engine(models, dtype, pattern),
            "tensorsketch": make_engine(models, dtype, pattern, "tensorsketch"),
        }
        documents = engines["auto"].encoder.encode(texts(n, engines["auto"].encoder.tokenizer))
        chosen = {layer.name for layer in engines["auto"].target.layers}
        runs: dict[str, Callable[[], Any]] = {
            "plain, these weights": plain(models, dtype, documents, chosen),
            "plain, all weights": plain(models, dtype, documents, None),
        }
        for name, engine in engines.items():
            runs[f"engine, {engine.target.kind}" if name == "auto" else f"engine, {name}"] = (
                lambda engine=engine, documents=documents: engine.run(documents)
            )
        found = in_turns({name: lambda run=run: seconds(run) for name, run in runs.items()}, rounds)
        least = found["plain, these weights"]
        result[what] = {"seconds": found, "ratio": {name: value / least for name, value in found.items()}}
        result[what]["projector"] = engines["auto"].target.kind
        print(f"\n{dtype}, {what} ({len(chosen)} layers), {n} documents of {TOKENS} tokens")
        for name, value in found.items():
            print(f"  {name:24} {value:7.2f} s   {value / least:5.2f} of plain, these weights")
    return result


# --- all layers, beside bergson -------------------------------------------------------------------------------

BERGSON = """
import json, shutil, sys, time
model_path, dtype, dim, threads, tokens, out = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
from datasets import Dataset
from bergson.collection import collect_gradients
from bergson.config.config import DistributedConfig, IndexConfig, PreprocessConfig
from bergson.data import allocate_batches
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
import bergson, importlib.metadata
ids = json.load(open(tokens))
data = Dataset.from_list([{"input_ids": x, "length": len(x)} for x in ids])
precision = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
cfg = IndexConfig(run_path=out, model=model_path, precision=precision, projection_dim=int(dim), loss_reduction="mean",
                  token_batch_size=sum(map(len, ids)), distributed=DistributedConfig(nproc_per_node=1))
cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
model, targets = setup_model_and_peft(cfg)
print(json.dumps({"version": importlib.metadata.version("bergson")}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    processor = create_processor(model, cfg, targets)
    batches = allocate_batches(data["length"][:], cfg.token_batch_size)
    collect_gradients(model=model, data=data, processor=processor, cfg=cfg, target_modules=targets, batches=batches,
                      attention_cfgs={}, preprocess_cfg=PreprocessConfig())
    print(json.dumps({"seconds": time.perf_counter() - start, "batches": len(batches)}), flush=True)
"""


class Bergson:
    """bergson in an interpreter of its own; each call is one build of the same documents, without loading."""

    def __init__(self, python: str, model: str, dtype: str, documents: Ragged, folder: Path) -> None:
        tokens = folder / "tokens.json"
        tokens.write_text(
            json.dumps([x.tolist() for x in np.split(documents.tokens, documents.offsets[1:-1])])
        )
        command = [
            python,
            "-c",
            BERGSON,
            model,
            dtype,
            str(BERGSON_DIM),
            str(torch.get_num_threads()),
            str(tokens),
        ]
        self._process = subprocess.Popen(
            [*command, str(folder / "index")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "bergson.log", "w"),  # noqa: SIM115
            text=True,
        )
        self._log = folder / "bergson.log"
        self.version = self._answer("version")["version"]

    def _answer(self, wanted: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and wanted in (found := json.loads(line)):
                return found
        raise RuntimeError(f"bergson ended: {self._log.read_text()[-2000:]}")

    def __call__(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer("seconds")["seconds"])

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def every_layer(
    models: tuple[str, str], dtype: str, python: str | None, rounds: int, folder: Path
) -> dict[str, Any]:
    """Seconds for 32 documents on all linear layers: the engine, a plain pass, and bergson where it is given."""
    engine = make_engine(models, dtype, EVERY)
    documents = engine.encoder.encode(texts(32, engine.encoder.tokenizer))
    passes = plain(models, dtype, documents, None)
    runs: dict[str, Callable[[], float]] = {
        f"engine, {engine.target.kind}": lambda: seconds(lambda: engine.run(documents)),
        "plain, all weights": lambda: seconds(passes),
    }
    rival = Bergson(python, models[1], dtype, documents, folder) if python else None
    if rival:
        runs[f"bergson {rival.version}"] = rival
    found = in_turns(runs, rounds)
    if rival:
        rival.close()
    ours = next(iter(found.values()))
    print(f"\n{dtype}, {len(engine.target.layers)} layers, 32 documents of {TOKENS} tokens")
    for name, value in found.items():
        print(f"  {name:24} {value:7.2f} s   {value / ours:5.2f} of ours")
    return {
        "layers": len(engine.target.layers),
        "seconds": found,
        "of_ours": {k: v / ours for k, v in found.items()},
    }


# --- checkpoints between the endpoints ------------------------------------------------------------------------


def between(models: tuple[str, str], rounds: int) -> dict[str, float]:
    """Seconds of one interpolation in bfloat16, into models placed in each way."""
    endpoints = Endpoints(*models)
    ways: dict[str, dict[str, Any]] = {
        "one device": {},
        "spread by accelerate": {"device": "auto"},
        "8bit": {"load_in": "8bit"},
        "4bit": {"load_in": "4bit"},
    }
    placed = {name: load_model(models[1], torch.bfloat16, **way) for name, way in ways.items()}
    found = in_turns(
        {name: lambda m=m: seconds(lambda: endpoints.interpolate(m, 0.5)) for name, m in placed.items()},
        rounds,
    )
    print("\nwriting the checkpoint half-way")
    for name, value in found.items():
        print(f"  {name:24} {value:7.2f} s   {value / found['one device']:5.2f} of one device")
    return found


# --- error of inner products ----------------------------------------------------------------------------------


class Recorder(Projector):
    """No projection: keeps both sides of every layer."""

    kind = "recorder"

    def __init__(self, layers: list[LayerShape]) -> None:
        super().__init__(1, 0, layers)
        self.sides: dict[int, tuple[Tensor, Tensor]] = {}

    def join(self, layer: int, rows: Tensor, cols: Tensor, docs: Tensor, n_docs: int) -> Tensor:
        self.sides[layer] = rows.float(), cols.float()
        return torch.zeros(n_docs, 1)

    def begin(self, *_: Any) -> Any: ...
    def add_errors(self, *_: Any) -> Any: ...
    def add_entries(self, *_: Any) -> Any: ...
    def finish(self, *_: Any) -> Any: ...
    def project_matrix(self, *_: Any) -> Any: ...


def factors(models: tuple[str, str], layers: list[LayerShape], n: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Errors and inputs of n documents in every layer, (n * TOKENS, rows) and (n * TOKENS, cols) float32."""
    engine = make_engine(models, "float32", r"layers\.0\.")
    documents = engine.encoder.encode(texts(n, engine.encoder.tokenizer))
    batch = pad(documents, np.arange(n))
    recorder = Recorder(layers)
    names = {i: layer.name for i, layer in enumerate(layers)}
    shape = (n, batch.input_ids.shape[1])
    with (
        LayerHooks(engine.model, names, lambda _: recorder, shape, torch.zeros(n, 1)) as hooks,
        torch.enable_grad(),
    ):
        states = engine.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        leaf = states.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            engine.head.logits(leaf.flatten(0, 1)),
            batch.targets.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        hooks.backward(states, torch.autograd.grad(loss, leaf)[0])
    return recorder.sides


def error(models: tuple[str, str], n: int, seeds: int) -> dict[str, Any]:
    """Error of pairwise inner products, times sqrt(d), for sets of layers and both projectors."""
    every = list(make_engine(models, "float32", EVERY).target.layers)
    sides = factors(models, every, n)
    docs = torch.arange(n).repeat_interleave(TOKENS)
    member = torch.nn.functional.one_hot(docs, n).float()
    products = {
        i: (member.T @ ((e @ e.T) * (h @ h.T)) @ member).double() for i, (e, h) in sides.items()
    }  # fmt: skip
    sets = {
        "all 210": range(len(every)),
        "q_proj, v_proj: 60": [i for i, x in enumerate(every) if "q_proj" in x.name or "v_proj" in x.name],
        "up_proj: 30": [i for i, x in enumerate(every) if "up_proj" in x.name],
        "blocks 14, 15: 14": [i for i, x in enumerate(every) if ".14." in x.name or ".15." in x.name],
        "blocks 28, 29: 14": [i for i, x in enumerate(every) if ".28." in x.name or ".29." in x.name],
    }
    print(f"\nerror of inner products times sqrt(d), {n} documents, d = {DIM}, {seeds} seeds")
    result: dict[str, Any] = {}
    for what, members in sets.items():
        truth = sum(products[i] for i in members)
        norms = truth.diagonal().sqrt()
        apart = ~torch.eye(n, dtype=torch.bool)
        share = torch.stack([products[i].diagonal() for i in members])
        result[what] = {"effective_layers": float((share.sum(0) ** 2 / share.square().sum(0)).mean())}
        for kind in ("factored", "tensorsketch"):
            squares = []
            for seed in range(seeds):
                projector = make_projector(kind, DIM, seed, [every[i] for i in members])
                rows = torch.zeros(n, DIM)
                for index, i in enumerate(members):
                    held = [
                        projector.hold(index, s, x) for s, x in zip(("row", "col"), sides[i], strict=True)
                    ]
                    rows += projector.join(index, *held, docs, n)
                wrong = (rows.double() @ rows.double().T - truth) / norms[:, None] / norms
                squares.append(wrong[apart].square().mean().item())
            result[what][kind] = math.sqrt(statistics.mean(squares) * DIM)
        print(f"  {what:20} " + "  ".join(f"{k} {v:.2f}" for k, v in result[what].items()))
    return result


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run and print every table."""
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, SmolLM2-135M")
    rounds = 2 if options.quick else 5
    result: dict[str, Any] = {"threads": options.threads, "tokens": TOKENS, "dim": DIM}
    for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        models = pair(options.models or folder, dtype)
        found: dict[str, Any] = {}
        if "blocks" in options.only:
            found["blocks"] = blocks(models, dtype, 32 if options.quick else 64, rounds)
        if "all" in options.only:
            found["all"] = every_layer(models, dtype, options.bergson, rounds, folder)
        if "between" in options.only and dtype == "bfloat16":
            found["between"] = between(models, rounds)
        result[dtype] = found
    if "error" in options.only:
        models = pair(options.models or folder, "bfloat16")
        result["error"] = error(models, 8 if options.quick else 24, 1 if options.quick else 3)
    return result


def main() -> None:
    """Parse the options, measure, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="bfloat16, fewer documents and rounds: under 3 minutes"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--bergson", metavar="PYTHON", help="an interpreter with bergson installed")
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="keep the models here for the next time"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no real text: {SHARED} is not there.")
    with tempfile.TemporaryDirectory(prefix="unbake-layers-") as folder:
        result = measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
