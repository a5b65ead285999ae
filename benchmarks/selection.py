"""Certified greedy against the authors' procedure and plain exact greedy: ``python benchmarks/select.py [--quick]``.

    python benchmarks/select.py [--quick] [--json OUT] [--figure OUT.svg] [--folder DIR]

Two data sets, both in the store that extraction writes (Zarr, float16): *real*, last-layer gradients of
SmolLM2-135M on ../shared/data, with mixed and perturbed copies to reach the sizes; and *spectrum*, Gaussian
rows with eigenvalues like those of the real ones (`TAIL`), or i^-p where p is given, and log-normal norms.
Each measurement is a process of its own, so that its peak resident memory is its own; totals include building
the index, reading and reporting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEED = 0
PARTITION = 4096
CORPORA = (("brown", 4000), ("abc_news", 3500), ("wikitext", 2500))
TRAINED = 2500  # AG News documents: 1,500 to fine-tune the head, 1,000 to test it
TOKENS = 40
WORDS = ("World", "Sports", "Business", "Technology")


TAIL = ((0, 1.0), (1, 0.621), (2, 0.388), (4, 0.103), (8, 0.0838), (16, 0.0622), (32, 0.0421), (64, 0.0285))
TAIL += ((128, 0.0189), (256, 0.0116), (512, 0.0063), (1024, 0.0031), (2048, 0.0011), (4096, 0.0))
"""(r, share of the squares that the r leading directions leave) of 8,000 of the real unit rows at d = 4096."""


# --- data ---------------------------------------------------------------------------------------------------


def states(folder: Path, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Last-token states (docs, 576) of SmolLM2, labels (-1 where unknown), its head (V, 576), label ids."""
    import pyarrow.parquet as pq
    import torch
    import transformers

    path = folder / f"states-{share}.npz"
    if not path.exists():
        from engine.models import load_model
        from engine.sources import resolve
        from jobs.demo import gguf

        source = resolve(gguf(), str(folder / "smollm2"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = load_model(source, torch.bfloat16)
        news = pq.read_table(SHARED / "ag_news.parquet").slice(0, int(TRAINED * share))
        texts, label = news["text"].to_pylist(), news["label"].to_pylist()
        rng = np.random.default_rng(SEED)
        for name, count in CORPORA:
            every = pq.read_table(SHARED / f"{name}.parquet")["text"].to_pylist()
            texts += [every[i] for i in rng.permutation(len(every))[: int(count * share)]]
        label += [-1] * (len(texts) - len(label))
        prompt = tokenizer.encode("\nTopic:")
        ids = [tokenizer.encode(text)[:TOKENS] + prompt for text in texts]
        order = np.argsort([len(i) for i in ids], kind="stable")
        hidden = np.zeros((len(ids), model.config.hidden_size), np.float32)
        with torch.no_grad():
            for start in range(0, len(order), 64):
                batch = order[start : start + 64]
                padded = torch.zeros(len(batch), max(len(ids[i]) for i in batch), dtype=torch.long)
                for row, i in enumerate(batch):
                    padded[row, : len(ids[i])] = torch.tensor(ids[i])
                out = model.model(input_ids=padded, use_cache=False).last_hidden_state
                for row, i in enumerate(batch):
                    hidden[i] = out[row, len(ids[i]) - 1].float().numpy()
        words = [tokenizer.encode(" " + word)[0] for word in WORDS]
        head = model.lm_head.weight.detach().float().numpy().astype(np.float16)
        np.savez(path, hidden=hidden, label=np.array(label), head=head, words=np.array(words))
    kept = np.load(path)
    return kept["hidden"], kept["label"], kept["head"].astype(np.float32), kept["words"].tolist()


def real_gradients(folder: Path, dim: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows (docs, dim) float32 and target (dim,): full-softmax last-layer gradients, TensorSketch to dim.

    The fine-tuned model is SmolLM2 with the four label rows of its head trained on AG News.
    """
    import torch

    from engine.projection import LayerShape, make_projector

    hidden, label, head, words = states(folder, share)
    h, w = torch.tensor(hidden), torch.tensor(head)
    trained = int(0.6 * (label >= 0).sum())
    rows = w[words].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], 1e-4)
    torch.manual_seed(SEED)
    for _ in range(4):
        for batch in torch.randperm(trained).split(16):
            loss = torch.nn.functional.cross_entropy(h[batch] @ rows.T, torch.tensor(label[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    delta = torch.zeros_like(w)
    delta[words] = w[words] - rows.detach()
    tuned = w - delta
    projector = make_projector("tensorsketch", dim, SEED, [LayerShape("lm_head", *w.shape)])
    out = []
    corpus = h[label < 0]
    for batch in corpus.split(256):
        logits = batch @ tuned.T
        errors = logits.softmax(1)
        errors[torch.arange(len(batch)), torch.tensor(words)[logits[:, words].argmax(1)]] -= 1
        state = projector.begin(0, len(batch), "cpu")
        projector.add_errors(state, errors, 0)
        out.append(projector.finish(state, batch, torch.arange(len(batch)), len(batch)).float().numpy())
    return np.concatenate(out), projector.project_matrix(0, [(0, delta)]).double().numpy()


def real_rows(base: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n rows: a gradient mixed with another one (up to half of it), 5% of noise, norms 10% apart."""
    length = np.linalg.norm(base, axis=1)
    i, j = rng.integers(0, len(base), (2, n))
    w = rng.uniform(0, 0.5, (n, 1)).astype(np.float32)
    x = (1 - w) * (base[i] / length[i, None]) + w * (base[j] / length[j, None])
    x += 0.05 / np.sqrt(x.shape[1]) * rng.standard_normal(x.shape, np.float32)
    return x, length[i] * np.exp(0.1 * rng.standard_normal(n))


def deviations(kind: str, dim: int) -> np.ndarray:
    """(dim,) float32, square roots of the eigenvalues of `spectrum` (tails as in TAIL) or `spectrum<p>` (i^-p)."""
    power = kind.removeprefix("spectrum")
    if power:
        return np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-float(power) / 2)
    left = np.interp(np.arange(dim + 1), *np.array(TAIL).T)
    return np.sqrt(np.maximum(-np.diff(left), 0)).astype(np.float32)


def spectrum_rows(deviation: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n Gaussian rows with these deviations along the axes, log-normal norms."""
    x = rng.standard_normal((n, deviation.size), np.float32) * deviation
    return x, np.exp(0.5 * rng.standard_normal(n))


def make_store(folder: Path, kind: str, n: int, dim: int, share: float) -> str:
    """Write a store of n rows; returns its run directory."""
    from engine.gradients import PartitionGradients
    from engine.rundir import RunDir
    from engine.store import GradientStore, StoreShape

    name = folder / f"{kind}-{n}-{dim}"
    if kind == "real":
        base, target = real_gradients(folder, dim, share)
    else:
        deviation = deviations(kind, dim)
        target = np.random.default_rng(SEED).normal(size=dim) * deviation
    store = GradientStore.create(RunDir(str(name)), StoreShape(1, n, dim, PARTITION), target, {})
    for partition, start in enumerate(range(0, n, PARTITION)):
        rng, m = np.random.default_rng([SEED, partition]), min(PARTITION, n - start)
        x, scale = real_rows(base, m, rng) if kind == "real" else spectrum_rows(deviation, m, rng)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        nothing, zeros = np.full((1, m), np.nan, np.float32), np.zeros(m, np.int32)
        features, scales = x.astype(np.float16)[None], scale.astype(np.float32)[None]
        gradients = PartitionGradients(
            features, scales, nothing, nothing, nothing, zeros, zeros.astype(np.float32), zeros, {}
        )
        store.write(partition, gradients, "benchmark", {})
    return str(name)


@dataclass
class Prefix:
    """The first n rows of a store."""

    rows: Any
    n_rows: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    @property
    def valid(self) -> np.ndarray:
        """All written rows are valid."""
        return np.ones(self.n_rows, np.bool_)


def open_prefix(run: str, n: int) -> Prefix:
    """The first n rows of a store written by `make_store`."""
    from engine.rundir import RunDir
    from engine.store import GradientStore

    return Prefix(GradientStore.open(RunDir(run)), n)


# --- contestants, each in a process of its own ------------------------------------------------------------------


def certified(run: str, n: int, k: int, checks: int) -> dict[str, Any]:
    """Certified greedy through `engine.select.select`, journal included; then `checks` picks by a full scan."""
    from engine.select import Columns, select
    from engine.select.greedy import verify
    from engine.spec import Select
    from engine.storage import Folder

    rows, spec = open_prefix(run, n), Select(size=k)
    shutil.rmtree(f"{run}/journal", ignore_errors=True)
    picked: list[float] = []
    start = time.perf_counter()
    chosen = select(
        rows, Columns(), spec, lambda *_: picked.append(time.perf_counter()), journal=Folder(f"{run}/journal")
    )
    total = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    work = chosen.certificate
    assert work is not None
    verified = verify(rows, rows.valid, "raw", 0, None, chosen.rows, checks)
    return {
        "rows": chosen.rows.tolist(),
        "seconds": total,
        "seconds_to_first_pick": picked[0] - start,
        "ms_per_pick": 1e3 * (picked[-1] - picked[0]) / (k - 1),
        "peak_mb": peak,
        "read_mb": int(work.bytes_read.sum()) / 2**20,
        "compared_per_pick": float(work.compared.mean()),
        "read_per_pick": float(work.rows_read.mean()),
        "compared": work.compared.tolist(),
        "read": work.rows_read.tolist(),
        "verified": len(verified),
        "peak_of_f": chosen.peak_size,
    }


def in_memory(run: str, n: int, dtype: str) -> np.ndarray:
    """All rows (n, d) of a store."""
    rows = open_prefix(run, n)
    out = np.empty((n, rows.dim), dtype)
    for start in range(0, n, PARTITION):
        out[start : start + PARTITION] = rows.read(start, min(start + PARTITION, n)).exact(0)
    return out


def plain(run: str, n: int, k: int, dtype: str) -> dict[str, Any]:
    """Plain exact greedy in memory: a, n and c of every row, c updated by one product per pick."""
    start = time.perf_counter()
    g, target = in_memory(run, n, dtype), open_prefix(run, n).target
    u = (target / np.linalg.norm(target)).astype(dtype)
    a, norm2, c = g @ u, np.einsum("nd,nd->n", g, g), np.zeros(n)
    taken, along, square, rows, times = np.zeros(n, bool), 0.0, 0.0, [], []
    setup = time.perf_counter() - start
    for _ in range(k):
        start = time.perf_counter()
        score = (along + a) / np.sqrt(square + 2 * c + norm2)
        score[taken] = -np.inf
        best = int(np.argmax(score))
        along, square = along + float(a[best]), square + 2 * float(c[best]) + float(norm2[best])
        c += g @ g[best]
        taken[best] = True
        rows.append(best)
        times.append(time.perf_counter() - start)
    return {"rows": rows, "ms_per_pick": 1e3 * float(np.median(times)), "setup_seconds": setup}


def authors(run: str, n: int, k: int) -> dict[str, Any]:
    """The authors' procedure as METHOD describes it: normalise all rows, multiply, mask, argmax, add to all rows."""
    start = time.perf_counter()
    g, target = in_memory(run, n, "float64"), open_prefix(run, n).target
    u = target / np.linalg.norm(target)
    sums, mask, rows, times = g.copy(), np.zeros(n), [], []
    setup = time.perf_counter() - start
    for _ in range(k):
        start = time.perf_counter()
        similarity = (sums / np.linalg.norm(sums, axis=1, keepdims=True)) @ u
        best = int(np.argmax(similarity + mask))
        mask[best] = -np.inf
        sums += g[best]
        rows.append(best)
        times.append(time.perf_counter() - start)
    return {"rows": rows, "ms_per_pick": 1e3 * float(np.median(times)), "setup_seconds": setup}


class Counted:
    """Shards whose round trips are counted."""

    def __init__(self, shards: Any) -> None:
        self.ahead, self.rounds, self._shards = shards.ahead, 0, shards

    def answer(self, request: Any) -> Any:
        """See `Shards.answer`."""
        self.rounds += 1
        return self._shards.answer(request)


class Memory:
    """Peak memory of this process and of the shard actors, as the kernel shares pages out (PSS), sampled.

    After the block: `peak_mb`, their sum; `ray_mb`, what Ray's own processes held beside them at that time.
    """

    def __enter__(self) -> Memory:
        self.peak_mb, self.ray_mb, self._over = 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.25):
            ours, ray = me.memory_full_info().pss, 0
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if process.name().startswith("ray::ShardActor"):
                        ours += process.memory_full_info().pss
                    else:
                        ray += process.memory_full_info().pss
            if ours / 2**20 > self.peak_mb:
                self.peak_mb, self.ray_mb = ours / 2**20, ray / 2**20


def sharded(run: str, n: int, k: int, counts: list[int]) -> list[dict[str, Any]]:
    """Certified greedy in this process, then with index shards in Ray actors: time and round trips."""
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    import functools

    import ray

    from cluster.select import ray_shards
    from engine.select import Columns, local_shards, select
    from engine.spec import Select

    own = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # another Ray on this machine must not be found
    quiet: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "object_store_memory": 200 << 20,
    }
    ray.init(address="local", num_cpus=8, _temp_dir=own, **quiet)
    rows, table = open_prefix(run, n), []
    for count in [0, *counts]:
        made, picked = [], []
        factory = ray_shards(functools.partial(open_prefix, run, n), count) if count else local_shards

        def counted(*arguments: Any, factory: Any = factory, made: list[Any] = made) -> Any:
            made.append(Counted(factory(*arguments)))
            return made[0]

        start = time.perf_counter()
        with Memory() as memory:
            chosen = select(
                rows,
                Columns(),
                Select(size=k),
                lambda *_, p=picked: p.append(time.perf_counter()),
                shards=counted,
            )
        table.append(
            {
                "shards": count,
                "seconds": time.perf_counter() - start,
                "ms_per_pick": 1e3 * (picked[-1] - picked[0]) / (k - 1),
                "rounds": made[0].rounds,
                "rows": chosen.rows.tolist(),
                "peak_mb": memory.peak_mb,
                "ray_mb": memory.ray_mb,
            }
        )
    ray.shutdown()
    shutil.rmtree(own, ignore_errors=True)
    return table


CONTESTANTS = {
    "sharded": sharded,
    "certified": certified,
    "plain": plain,
    "authors": authors,
    "make_store": make_store,
}


def apart(name: str, *arguments: Any) -> Any:
    """Run a contestant in a process of its own, ours with one BLAS thread beside its own threads."""
    command = [sys.executable, __file__, "--apart", json.dumps([name, *arguments])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if name == "certified" else None
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# --- tables -----------------------------------------------------------------------------------------------------


def same(a: list[int], b: list[int]) -> str:
    """How many of the picks that both made are identical."""
    m = min(len(a), len(b))
    return f"{sum(x == y for x, y in zip(a[:m], b[:m], strict=True))}/{m}"


def compare(
    run: str, kind: str, n: int, dim: int, k: int, picks: dict[str, int], checks: int
) -> dict[str, Any]:
    """Side by side: time per pick and ratios, identical picks."""
    ours = apart("certified", run, n, k, checks)
    result = {"kind": kind, "n": n, "dim": dim, "k": k, "certified": ours}
    result["plain"] = apart("plain", run, n, picks["plain"], "float64")
    result["plain_float32"] = apart("plain", run, n, picks["plain"], "float32")
    result["authors"] = apart("authors", run, n, picks["authors"])
    print(
        f"\n{kind}, N = {n:,}, d = {dim}: k = {k}, total with index and report {ours['seconds']:.1f} s, "
        f"peak {ours['peak_mb']:.0f} MB"
    )
    print(
        f"  certified {ours['ms_per_pick']:9.2f} ms a pick; {ours['verified']} picks re-checked by full scans"
    )
    for name in ("plain_float32", "plain", "authors"):
        other = result[name]
        other["ratio"] = other["ms_per_pick"] / ours["ms_per_pick"]
        other["seconds"] = other["setup_seconds"] + k * other["ms_per_pick"] / 1e3
        other["ratio_of_totals"] = other["seconds"] / ours["seconds"]
        print(
            f"  {name:<13} {other['ms_per_pick']:7.1f} ms a pick over {len(other['rows'])} picks: "
            f"{other['ratio']:.1f} x a pick; {k} picks with loading the rows {other['seconds']:.1f} s (scaled): "
            f"{other['ratio_of_totals']:.1f} x; identical picks {same(other['rows'], ours['rows'])}"
        )
    return result


def scaling(run: str, kind: str, sizes: list[int], dim: int, k: int, checks: int) -> list[dict[str, Any]]:
    """Time, memory and reading as N grows."""
    print(f"\n{kind}, d = {dim}, k = {k}")
    print(
        "         N  seconds  ms/pick  us/row  peak MB  random read MB  compared/pick  read/pick  re-checked"
    )
    table = []
    for n in sizes:
        got = apart("certified", run, n, k, checks)
        table.append({"kind": kind, "n": n, "dim": dim, "k": k, **got})
        sys.stdout.flush()
        print(
            f"{n:>10,} {got['seconds']:8.1f} {got['ms_per_pick']:8.2f} {1e6 * got['seconds'] / n:7.1f} "
            f"{got['peak_mb']:8.0f} {got['read_mb']:15.0f} {got['compared_per_pick']:14.1f} "
            f"{got['read_per_pick']:10.2f} {got['verified']:11}"
        )
    return table


def shards(run: str, n: int, dim: int, k: int) -> list[dict[str, Any]]:
    """Shards beside one process."""
    print(f"\nindex shards in Ray actors, real, N = {n:,}, d = {dim}, k = {k}")
    print("     shards  seconds  ms/pick  round trips  picks as serial  peak MB  Ray's own MB")
    table = apart("sharded", run, n, k, [1, 2, 4])
    for got in table:
        name = got["shards"] or "in process"
        print(
            f"{name!s:>11} {got['seconds']:8.1f} {got['ms_per_pick']:8.2f} {got['rounds']:12} "
            f"{same(got['rows'], table[0]['rows']):>16} {got['peak_mb']:8.0f} {got['ray_mb']:13.0f}"
        )
    return table


def figure(path: str, table: list[dict[str, Any]]) -> None:
    """Rows compared and rows read per pick (running mean of 20), one curve a run."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "unbake"
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, what, title in (
        (axes[0], "compared", "exact rows compared"),
        (axes[1], "read", "of them read from disk"),
    ):
        for run in table:
            smooth = np.convolve(run[what], np.ones(20) / 20, "valid")
            axis.plot(
                np.arange(smooth.size) + 20,
                np.maximum(smooth, 0.05),
                label=f"{run['kind']}, N = {run['n']:,}",
            )
        axis.set(yscale="log", xlabel="pick", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rows a pick (mean of 20)")
    axes[1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, under 3 minutes")
    parser.add_argument("--json", help="write every number here")
    parser.add_argument("--figure", help="write the figure of rows per pick here (svg)")
    parser.add_argument("--folder", default="runs/bench-select", help="for stores and cached states (3 GB)")
    parser.add_argument("--only", choices=["compare", "scaling", "flat", "shards"], help="one part alone")
    parser.add_argument("--kinds", nargs="+", default=["real", "spectrum"])
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        name, *arguments = json.loads(options.apart)
        if name == "make_store":
            arguments[0] = Path(arguments[0])
        print(json.dumps(CONTESTANTS[name](*arguments)))
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    quick, results = options.quick, {"compare": [], "scaling": [], "flat": [], "shards": []}
    share = 0.08 if quick else 1.0
    sizes = [10_000, 30_000] if quick else [10_000, 30_000, 100_000, 300_000, 1_000_000]
    (n, dim), k = ((10_000, 1024), 200) if quick else ((100_000, 4096), 1000)
    for kind in options.kinds:
        if options.only in (None, "compare"):
            run = apart("make_store", str(folder), kind, n, dim, share)
            picks = {"plain": 30, "authors": 5}
            results["compare"].append(compare(run, kind, n, dim, k, picks, 5 if quick else 20))
            shutil.rmtree(run)
        if options.only in (None, "scaling"):
            run = apart("make_store", str(folder), kind, sizes[-1], 1024, share)
            results["scaling"] += scaling(run, kind, sizes, 1024, k, 5 if quick else 10)
            shutil.rmtree(run)
    if options.only in (None, "flat"):
        for power in ("2", "1.5", "1", "0.5", "0"):
            run = apart("make_store", str(folder), f"spectrum{power}", 10_000, 1024, share)
            results["flat"] += scaling(run, f"spectrum{power}", [10_000], 1024, 50 if quick else 300, 2)
            shutil.rmtree(run)
    if options.only in (None, "shards"):
        n = 10_000 if quick else 100_000
        run = apart("make_store", str(folder), "real", n, 1024, share)
        results["shards"] = shards(run, n, 1024, k)
        shutil.rmtree(run)
    if options.json:
        Path(options.json).write_text(json.dumps(results))
    if options.figure:
        figure(options.figure, results["scaling"] or [run | run["certified"] for run in results["compare"]])


if __name__ == "__main__":
    main()
