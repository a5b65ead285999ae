"""Extraction against the forward pass it cannot do without: ``python benchmarks/extract.py [--quick]``.

    python benchmarks/extract.py [--quick] [--documents N] [--tokens N] [--only NAME ...] [--pipelines] [--json OUT]

All cases take hours on two cores; with --only each case named takes all N documents. On real text, documents
a second of

    bare      the model's forward pass over the same batches, sorted and padded alike, made up beforehand: the
              body, and lm_head on each document's last state (last_token, classification) or on every state
              (all_tokens; the Hugging Face model called as it is). Inference mode, no attention mask. For P
              checkpoints, P such passes.
    engine    `GradientEngine.run` in this process: batches, labels, gradients, projection, unit-norm rows.
    pipeline  `unbake extract` on a local Ray: Parquet in, committed Zarr shards out; start-up apart. Before it,
              `unbake plan` says what it expects (in the main case).
    vmap      the body, and each document's whole lm_head gradient by torch.func, not projected.
    authors   vmap, and a dense projection to 4096, measured at a few dimensions and SCALED by its own law.

Bare and engine take turns, partition by partition, changing who goes first, so that both meet the same machine;
the pipeline runs between two halves of them. The Hugging Face call with logits_to_keep=1 is not the yardstick:
in bfloat16 on a CPU it is several times slower than the bare pass (its ratio is printed).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from engine.batches import LossBatch, loss_batch
from engine.checkpoints import Endpoints
from engine.encode import Encoder
from engine.gradients import GradientEngine
from engine.models import load_tokenizer
from engine.padding import length_batches
from engine.ragged import Ragged
from engine.rundir import DONE
from engine.sources import resolve
from engine.spec import RunSpec
from engine.target import choose_target
from jobs.demo import gguf
from jobs.extract import extract
from jobs.job import Job
from jobs.plan import plan

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
CORPORA = ("brown", "abc_news", "ag_news", "wikitext", "rotten_tomatoes")
CLASSES = ["World", "Sports", "Business", "Technology"]
DIM = 4096
AUTHORS_BATCH = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One model, task and projector, at P checkpoints; `share` of the documents asked for."""

    model: str
    task: str
    projector: str
    checkpoints: int = 1
    share: float = 0.25

    @property
    def name(self) -> str:
        return f"{self.model}/{self.task}/{self.projector}/P{self.checkpoints}"


MAIN = Case("smol", "classification", "exact", share=1.0)
CASES = [
    MAIN,
    Case("smol", "classification", "tensorsketch"),
    Case("smol", "last_token", "tensorsketch", share=0.5),
    Case("smol", "all_tokens", "tensorsketch"),
    Case("smol", "classification", "exact", 2, 0.5),
    Case("smol", "last_token", "tensorsketch", 2, 0.5),
    Case("smol", "all_tokens", "tensorsketch", 2),
    Case("smol", "classification", "exact", 4, 0.5),
    Case("smol", "last_token", "tensorsketch", 4, 0.5),
    Case("smol", "all_tokens", "tensorsketch", 4),
    Case("tiny", "classification", "exact"),
    Case("tiny", "last_token", "tensorsketch"),
    Case("tiny", "all_tokens", "tensorsketch"),
    Case("tiny", "classification", "exact", 4),
]
QUICK = [MAIN, CASES[2], CASES[3], CASES[4]]


# --- models and text ------------------------------------------------------------------------------------------


def models(name: str, folder: Path) -> tuple[str, str]:
    """Folders of a base model and of the same with every weight moved a little, in bfloat16; made once."""
    base, moved = folder / name / "base", folder / name / "moved"
    if not (moved / "config.json").exists():
        source = resolve(gguf(), str(folder / "smol" / "float32"))
        tokenizer = load_tokenizer(source)
        torch.manual_seed(0)
        if name == "smol":
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        else:
            config = transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        for path in (base, moved):
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    return str(base), str(moved)


def texts(n: int) -> list[str]:
    """n real texts in a fixed random order; they begin again where there are too few."""
    every = [t for name in CORPORA for t in pq.read_table(SHARED / f"{name}.parquet")["text"].to_pylist()]
    order = np.random.default_rng(0).permutation(len(every))
    return [every[order[i % len(every)]] for i in range(n)]


def make_spec(case: Case, folder: Path, run: str, corpus: str, options: argparse.Namespace) -> RunSpec:
    base, moved = models(case.model, folder)
    task: dict[str, Any] = {"max_tokens": options.tokens}
    if case.task == "classification":
        task |= {"kind": "classification", "labels": CLASSES}
    else:
        task |= {"kind": "language_modelling", "loss_scope": case.task}
    return RunSpec.from_dict(
        {
            "run_dir": run,
            "models": {"base": base, "finetuned": moved},
            "corpus": {"paths": [corpus], "partition_rows": options.partition},
            "task": task,
            "gradients": {"projector": case.projector, "dim": DIM, "checkpoints": case.checkpoints},
            "extract": {"threads": options.threads},
            "select": {"size": 1},
        }
    )


# --- bare and engine ------------------------------------------------------------------------------------------


class Bare:
    """The forward pass alone, with the engine's own model."""

    def __init__(self, engine: GradientEngine, task: str, passes: int) -> None:
        self.model, self.task, self.passes = engine.model, task, passes

    @torch.inference_mode()
    def __call__(self, batches: list[LossBatch]) -> None:
        for _ in range(self.passes):
            for batch in batches:
                if self.task == "all_tokens":
                    self.model(input_ids=batch.input_ids, use_cache=False)
                else:
                    self.model.lm_head(body(self.model, batch))


def body(model: Any, batch: LossBatch) -> torch.Tensor:
    """States that predict a loss token, (tokens, hidden)."""
    states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[batch.index]


def batches_of(documents: Ragged, tokens: int) -> list[LossBatch]:
    """The engine's batches of documents that all carry loss."""
    groups = length_batches(documents.lengths, tokens)
    return [loss_batch(documents, group).map(lambda tensor: tensor.to(DEVICE)) for group in groups]


class Clock:
    """Seconds and CPU seconds by name; as a wrapper of a method, of what goes on inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work; on a GPU what it has set off is over when the clock stops."""
        started, cpu = time.perf_counter(), time.process_time()
        result = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - started
        self.cpu[name] += time.process_time() - cpu
        return result

    def wrap(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)
        setattr(owner, method, lambda *a, **k: self.time(name, lambda: inner(*a, **k)))

    def wrap_iterator(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any) -> Iterator[Any]:
            items = iter(inner(*arguments))
            end = object()
            while (item := self.time(name, lambda: next(items, end))) is not end:
                yield item

        setattr(owner, method, timed)


def watched(engine: GradientEngine) -> Clock:
    """The engine's parts, timed from inside: lm_head's product, its whole part, Fourier transforms, theta_j."""
    clock = Clock()
    layer = engine._last_layer
    clock.wrap_iterator(layer, "_logits", "lm_head product")
    clock.wrap(layer, "add", "last layer")
    clock.wrap(engine.projector, "add_errors", "count sketch")
    clock.wrap(engine.projector, "finish", "Fourier and sums")
    clock.wrap(engine.endpoints, "interpolate", "interpolation")
    return clock


class Contest:
    """Bare and engine on one case, in turns."""

    def __init__(self, case: Case, spec: RunSpec, documents: list[str]) -> None:
        self.case = case
        endpoints = Endpoints(spec.models.base, spec.models.finetuned)
        encoder = Encoder(load_tokenizer(spec.models.base), spec.task, spec.loss_scope)
        started = time.perf_counter()
        encoded = encoder.encode(documents)
        self.encode_seconds = time.perf_counter() - started
        target = choose_target(spec, endpoints, encoder.label_ids)
        self.engine = GradientEngine(endpoints, encoder, target, spec, DEVICE)
        size = spec.corpus.partition_rows_of(len(documents))
        starts = range(0, len(documents), size)
        self.parts = [encoded.take(np.arange(i, min(len(documents), i + size))) for i in starts]
        self.batches = [batches_of(part, self.engine.tokens_per_batch) for part in self.parts]
        self.bare = Bare(self.engine, case.task, case.checkpoints)
        # on a GPU a clock around each part would make the CPU wait for it
        self.clock, self.inside = Clock(), watched(self.engine) if DEVICE == "cpu" else Clock()
        self.bare(self.batches[0][:1])
        self.engine.run(self.parts[0].take(self.batches[0][0].members[:8]))
        self.inside.seconds.clear()

    def turns(self, parts: list[int]) -> None:
        """Both contestants on these partitions, the first to go changing each time."""
        for i in parts:
            contestants = {
                "bare": lambda i=i: self.bare(self.batches[i]),
                "engine": lambda i=i: self.engine.run(self.parts[i]),
            }
            for name in sorted(contestants, reverse=bool(i % 2)):
                self.clock.time(name, contestants[name])

    def result(self) -> dict[str, Any]:
        n = sum(len(part) for part in self.parts)
        seconds = self.clock.seconds
        tokens = int(sum(part.lengths.sum() for part in self.parts))
        padded = sum(batch.padded for batches in self.batches for batch in batches)
        return {
            "documents": n,
            "tokens_per_document": tokens / n,
            "padding": padded / tokens - 1,
            "documents_per_s": {name: n / spent for name, spent in seconds.items()},
            "engine_over_bare": seconds["bare"] / seconds["engine"],
            "engine_over_bare_by_cpu_time": self.clock.cpu["bare"] / self.clock.cpu["engine"],
            "cost_of_P_over_P_passes": seconds["engine"] / seconds["bare"],
            "share_of_engine": self._shares() if DEVICE == "cpu" else {},  # a GPU's parts are not timed
            "encode_us_per_document": self.encode_seconds / n * 1e6,
        }

    def _shares(self) -> dict[str, float]:
        """Shares of the engine's seconds, by its parts."""
        engine, inside = self.clock.seconds["engine"], self.inside.seconds
        last, interpolation = inside["last layer"], inside["interpolation"]
        sums = last - inside["lm_head product"] - inside["count sketch"] - inside["Fourier and sums"]
        return {
            "forward pass of the body, batches, rows": 1 - (last + interpolation) / engine,
            "lm_head product": inside["lm_head product"] / engine,
            "softmax and errors": sums / engine,
            "count sketch": inside["count sketch"] / engine,
            "Fourier and sums": inside["Fourier and sums"] / engine,
            "interpolation": interpolation / engine,
        }


# --- the pipeline ---------------------------------------------------------------------------------------------


def pipeline(case: Case, folder: Path, documents: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """`unbake extract` from Parquet to committed shards: its rate in all, and from the first committed shard on.

    In the main case `seconds_expected` is what `unbake plan` says beforehand.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        pq.write_table(pa.table({"text": documents}), place / "corpus.parquet")
        spec = make_spec(case, folder, str(place / "run"), str(place / "corpus.parquet"), options)
        expected = 0.0
        if case is MAIN:
            (stage,) = (
                s for s in plan(Job(spec, quiet=True), options.calibration).stages if s.name == "extract"
            )
            expected = 3600 * (stage.hours or 0.0)
        started = time.time()
        result = extract(Job(spec, quiet=True))
        total = time.time() - started
        records = [(file.stat().st_mtime, file) for file in (place / "run" / DONE).glob("*.json")]
        commits = [(at - started, json.loads(file.read_text())["rows"]) for at, file in sorted(records)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert result["documents"] == len(documents) == sum(rows for _, rows in commits)
    (first, rows), (last, _) = commits[0], commits[-1]
    return {
        "documents": len(documents),
        "partitions": len(commits),
        "seconds": total,
        "seconds_expected": expected,
        "seconds_to_first_shard": first,
        "seconds_after_last_shard": total - last,
        "documents_per_s_in_all": len(documents) / total,
        "documents_per_s_warm": (len(documents) - rows) / (last - first) if last > first else float("nan"),
    }


# --- what others do -------------------------------------------------------------------------------------------


@torch.no_grad()
def others(contest: Contest, n: int, dims: tuple[int, int]) -> dict[str, Any]:
    """Per-example lm_head gradients by vmap, and their dense projection at two small dims, scaled to DIM."""
    model, documents = contest.engine.model, contest.parts[0].take(np.arange(n))
    batch = loss_batch(documents, np.arange(n))
    weight = model.lm_head.weight.detach()

    def loss(w: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((w @ h)[None].float(), y[None])

    targets = batch.targets.clamp(min=0)  # in classification labels are pending: any row costs the same
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=4)

    def per_example() -> torch.Tensor:
        states = body(model, batch)
        return each(weight, states, targets).flatten(1)

    per_example()
    started = time.perf_counter()
    gradients = per_example()
    vmap = time.perf_counter() - started
    generator, size = torch.Generator().manual_seed(0), gradients.shape[1]
    parts, signs = {}, torch.ones(dims[1], size, dtype=torch.bfloat16)
    gradients @ signs.t()  # memory is touched before anything is timed
    for dim in dims:
        some = signs[:dim]
        started = time.perf_counter()
        some.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        made = time.perf_counter()
        gradients @ some.t()
        parts[dim] = {"draw_s": made - started, "multiply_s": time.perf_counter() - made}
    large = parts[dims[1]]
    batches = large["draw_s"] + large["multiply_s"] * AUTHORS_BATCH / n
    projection = batches * DIM / dims[1]
    return {
        "vmap_documents": n,
        "vmap_documents_per_s": n / vmap,
        "measured_projection": parts,
        "law": (
            f"(draw + multiply x {AUTHORS_BATCH}/{n}) x {DIM}/{dims[1]}: drawing is once a batch of "
            f"{AUTHORS_BATCH}, both grow with the dimension"
        ),
        "authors_seconds_per_batch_scaled": projection,
        "authors_documents_per_s_scaled": AUTHORS_BATCH / (AUTHORS_BATCH * vmap / n + projection),
    }


@torch.inference_mode()
def keep_one(contest: Contest, documents: int = 64) -> float:
    """Seconds of the Hugging Face call with logits_to_keep=1 over those of the bare pass, on one batch."""
    batch = loss_batch(contest.parts[0], np.arange(min(documents, len(contest.parts[0]))))
    batch = batch.map(lambda tensor: tensor.to(DEVICE))
    model, clock = contest.engine.model, Clock()
    for name in ("warm", "timed"):
        clock.time(f"bare {name}", lambda: contest.bare([batch]))
        clock.time(
            f"keep {name}", lambda: model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1)
        )
    return clock.seconds["keep timed"] / clock.seconds["bare timed"]


# --- running --------------------------------------------------------------------------------------------------


def measure(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant of one case, printed as it comes."""
    n = options.documents if options.only else max(options.partition, int(options.documents * case.share))
    documents = texts(n)
    spec = make_spec(case, folder, "unused", "unused", options)
    contest = Contest(case, spec, documents)
    half, parts = len(contest.parts) // 2, list(range(len(contest.parts)))
    contest.turns(parts[:half])
    found: dict[str, Any] = {}
    if case is MAIN or options.pipelines:
        found["pipeline"] = pipeline(case, folder, documents, options)
    contest.turns(parts[half:])
    found |= contest.result()
    show(case, found)
    if case.checkpoints == 1 and case.task != "all_tokens":
        found["logits_to_keep_over_bare"] = keep_one(contest)
        print(f"    the same with logits_to_keep=1: {found['logits_to_keep_over_bare']:.1f} x the bare pass")
        if case.task == "last_token" and DEVICE == "cpu":
            found["others"] = others(contest, 4 if options.quick else 8, (2, 4))
            show_others(found)
    return found


def show(case: Case, found: dict[str, Any]) -> None:
    rate = found["documents_per_s"]
    print(
        f"{case.name:38} {found['documents']:6,} docs of {found['tokens_per_document']:5.1f} tokens   "
        f"bare {rate['bare']:8.1f}/s   engine {rate['engine']:8.1f}/s   engine/bare {found['engine_over_bare']:.3f} "
        f"({found['engine_over_bare_by_cpu_time']:.3f} by CPU time)"
        + (f"   cost {found['cost_of_P_over_P_passes']:.3f} x P passes" if case.checkpoints > 1 else ""),
        flush=True,
    )
    if DEVICE == "cpu":
        print("    " + ", ".join(f"{name} {share:.1%}" for name, share in found["share_of_engine"].items()))
    if "pipeline" in found:
        ran = found["pipeline"]
        ratio = ran["documents_per_s_warm"] / rate["bare"]
        found["pipeline_over_bare"] = ratio
        print(
            f"    pipeline {ran['documents_per_s_warm']:.1f}/s once warm, pipeline/bare {ratio:.3f}; "
            f"{ran['seconds_to_first_shard']:.1f} s to the first shard, {ran['documents_per_s_in_all']:.1f}/s in all",
            flush=True,
        )
        if ran["seconds_expected"]:
            found["expected_over_found"] = ran["seconds_expected"] / ran["seconds"]
            print(
                f"    `unbake plan` expected {ran['seconds_expected']:.0f} s of extraction, it took "
                f"{ran['seconds']:.0f} s: expected/found {found['expected_over_found']:.2f}"
            )


def show_others(found: dict[str, Any]) -> None:
    other, engine = found["others"], found["documents_per_s"]["engine"]
    vmap, authors = other["vmap_documents_per_s"], other["authors_documents_per_s_scaled"]
    print(
        f"    vmap, no projection {vmap:.2f}/s (engine {engine / vmap:.0f} x); authors' dense projection to {DIM}, "
        f"SCALED, {authors:.4f}/s (engine {engine / authors:,.0f} x)",
        flush=True,
    )


def main() -> None:
    """Parse the options, measure, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under three minutes: few documents, four cases")
    parser.add_argument("--documents", type=int, help="of the main case (default 20000, quick 512)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of text kept (default 24)")
    parser.add_argument("--partition", type=int, help="documents in a partition (default 4096, quick 256)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", help="cases whose name contains one of these")
    parser.add_argument("--pipelines", action="store_true", help="the pipeline in every case")
    parser.add_argument("--calibration", type=float, help="seconds of `unbake plan` (default 30, quick 10)")
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / "runs/bench-extract", help="models, made once"
    )
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    if not SHARED.is_dir():
        print(
            f"this benchmark reads real text from {SHARED}, which this machine does not have: nothing was run."
        )
        return
    options.documents = options.documents or (512 if options.quick else 20_000)
    options.partition = options.partition or (256 if options.quick else 4096)
    options.calibration = options.calibration or (10.0 if options.quick else 30.0)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    processor = platform.processor() or platform.machine()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{options.threads} threads, {processor}"
    print(f"torch {torch.__version__}, {where}, bfloat16")
    cases = QUICK if options.quick else CASES
    chosen = [case for case in cases if not options.only or any(part in case.name for part in options.only)]
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": where,
        "threads": options.threads,
        "tokens": options.tokens,
        "partition": options.partition,
        "cases": {},
    }
    for case in chosen:
        report["cases"][case.name] = measure(case, options.folder, options)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
