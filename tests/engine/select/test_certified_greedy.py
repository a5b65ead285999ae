"""Certified greedy makes the picks of the exact greedy, bit for bit, and proves it."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.rows import ArrayRows
from engine.select import Columns, select
from engine.select.exact import exact_greedy
from engine.select.greedy import Greedy, LocalShards, verify
from engine.select.index import SubspaceIndex, orthonormal
from engine.select.objective import scores, unit_target, vectors
from engine.select.shard import Shard
from engine.spec import Select
from engine.storage import Folder


def shards_of(bounds, ahead=1):
    """A factory of local shards that end at the given rows."""

    def make(rows, spec, eligible, label):
        edges = [0, *bounds, rows.n_rows]
        u = unit_target(rows.target)
        ranges = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
        return LocalShards([Shard(rows, a, b, spec.rows, u, eligible, label, 8, 1) for a, b in ranges], ahead)

    return make


def hard_rows(seed, n, d, p, dtype, kind):
    """Rows of one of several nasty kinds: each is a way in which a bound or a tie could go wrong."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=d)
    x = rng.normal(size=(p, n, d))
    scale = np.exp(rng.normal(size=(p, n)))
    if kind == "duplicates":
        copies = rng.integers(0, max(1, n // 4), n)
        x, scale = x[:, copies], scale[:, copies]
    elif kind == "zeros":
        x[:, rng.random(n) < 0.4] = 0
        scale[:, rng.random(n) < 0.2] = 0
    elif kind == "huge and tiny":
        scale = 10.0 ** rng.integers(-37, 38, (p, n))
    elif kind == "near ties":
        x = np.repeat(x[:, :1], n, axis=1) + rng.choice([0, 2.0**-10, 2.0**-20], (p, n, d))
        scale = np.ones((p, n)) * (1 + rng.integers(0, 3, (p, n)) * 2.0**-22)
    elif kind == "cancelling":
        x = x[:, :1] * rng.choice([-1.0, 1.0], (p, n, 1))
    elif kind == "towards target":
        x = target + 1e-3 * x
    elif kind == "away from target":
        x = -target + 0.3 * x
    elif kind == "few directions":
        x = rng.choice([-1.0, 0.0, 1.0], (p, n, d))
    valid = rng.random(n) > 0.1
    valid[0] = True
    with np.errstate(over="ignore"):
        return ArrayRows(x.astype(dtype), target, scale.astype(np.float32), valid, block_rows=max(1, n // 3))


KINDS = ["plain", "duplicates", "zeros", "huge and tiny", "near ties", "cancelling", "few directions"]
KINDS += ["towards target", "away from target"]
cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "n": st.integers(1, 60),
        "d": st.integers(1, 40),
        "p": st.integers(1, 3),
        "dtype": st.sampled_from([np.float16, np.float32]),
        "kind": st.sampled_from(KINDS),
    }
)


SMALL = {"_FEWEST": 2, "_DRIFT": 1, "_FOLLOW": 1, "_ANYWAY": 0}
"""An index too small for its rows, which follows the running sum after every pick and grows often."""


SWEEPING = {**SMALL, "_SEEDS": 2, "BATCH": 4}
"""And what it leaves is compared in the order of the store once a few rows are."""


@settings(max_examples=150, deadline=None)
@given(
    cases,
    st.sampled_from(["raw", "unit"]),
    st.sampled_from([0, 0, 1, 5]),
    st.booleans(),
    st.sampled_from([[], [7], [3, 4, 30]]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([{"_FEWEST": 32}, SMALL, SWEEPING]),
    st.data(),
)
def test_every_pick_and_score_is_that_of_the_exact_greedy(
    case, kind, restart, balanced, bounds, ahead, settings_of_index, data
):
    with mock.patch.multiple("engine.select.shard", **settings_of_index):
        compare_with_exact_greedy(
            hard_rows(**case), case["seed"], kind, restart, balanced, bounds, ahead, data
        )


class Asked(ArrayRows):
    """Counts the rows that are read by themselves."""

    one_by_one = 0

    def take(self, rows):
        self.one_by_one += rows.size
        return super().take(rows)


def test_rows_that_no_small_index_tells_apart_are_read_in_the_order_of_the_store():
    """A flat spectrum: in the order of their bounds they would be read from all over it."""
    rng = np.random.default_rng(0)
    n, size = 20_000, 6
    rows = Asked(rng.normal(size=(n, 256)).astype(np.float16), rng.normal(size=256), block_rows=256)
    every = np.ones(n, np.bool_)
    make = shards_of([7_000])
    order, certificate = Greedy(rows, every, size, "raw", 0, None).run(
        lambda: make(rows, Select(size=size), every, None)
    )
    want, score = exact_greedy(rows, every, size, "raw", 0, None)
    assert order.tolist() == want.tolist()
    assert certificate.score.tolist() == score.tolist()
    assert certificate.compared.sum() > size * n // 4  # the index says little here
    assert rows.one_by_one < certificate.compared.sum() // 4


def compare_with_exact_greedy(rows, seed, kind, restart, balanced, bounds, ahead, data):
    n = rows.n_rows
    eligible = rows.read(0, n).valid
    label = np.random.default_rng(seed).integers(0, 3, n).astype(np.int32) if balanced else None
    size = data.draw(st.one_of(st.just(int(eligible.sum())), st.integers(1, int(eligible.sum()))))
    spec = Select(size=size, rows=kind)
    make = shards_of([b for b in bounds if b < n], ahead)
    order, certificate = Greedy(rows, eligible, size, kind, restart, label).run(
        lambda: make(rows, spec, eligible, label)
    )
    want, score = exact_greedy(rows, eligible, size, kind, restart, label)
    assert order.tolist() == want.tolist()
    assert certificate.score.tolist() == score.tolist()
    assert (certificate.bound < certificate.score).all()


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from(["raw", "unit"]), st.integers(1, 30), st.integers(0, 20))
def test_no_bound_is_below_the_score_it_bounds(case, kind, size, added):
    """Fresh, stale, learned and replaced columns' bounds alike, for any basis, also one that is not orthonormal."""
    rows = hard_rows(**case)
    n, d, p = rows.n_rows, rows.dim, rows.n_checkpoints
    rng = np.random.default_rng(case["seed"])
    u = unit_target(rows.target)
    every = vectors(rows.read(0, n), kind)
    every[~rows.read(0, n).valid] = 0
    unit = vectors(rows.read(0, n), "unit")
    basis = orthonormal(rng.normal(size=(d, min(size, d)))) * rng.choice([1.0, 1.0, 1 + 1e-4])
    index = SubspaceIndex(rows, 0, n, kind, u, capacity=basis.shape[1] + 2)
    index.extend(np.stack([basis] * p))
    sums = every[rng.permutation(n)[:added]].sum(axis=0)
    for step in range(12):
        query = index.query(sums)
        exact = scores(sums, every, u)
        stale = index.stale(query)
        assert stale is None or (stale >= exact).all()
        some = rng.permutation(n)[: max(1, n // 2)]
        assert (index.fresh(query, some) >= exact[some]).all()
        if step % 2:
            assert (index.fresh(query) >= exact).all()
        index.learn(some, every[some])
        assert (index.fresh(query) >= exact).all()
        if step in (3, 8) and index.size < d:
            index.extend(index.drift(sums, unit, 1 + (index.size + 1 < d)))
        else:
            index.follow(sums)
        sums = sums + every[rng.integers(n)]


def test_an_index_at_its_capacity_still_follows_the_running_sum():
    """Columns learned replace one another; rows that know them are bounded far better than by a fixed index."""
    rng = np.random.default_rng(0)
    n, d = 200, 64
    rows = ArrayRows(rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=d), block_rows=50)
    u, every = unit_target(rows.target), vectors(rows.read(0, n), "raw")
    index, fixed = (SubspaceIndex(rows, 0, n, "raw", u, capacity=8) for _ in range(2))
    for one in (index, fixed):
        one.extend(orthonormal(np.random.default_rng(1).normal(size=(d, 6)))[None])
    sums, looseness = every[:3].sum(axis=0), []
    for row in range(20):
        index.follow(sums)
        index.learn(np.arange(n), every)
        exact, bound = scores(sums, every, u), index.fresh(index.query(sums))
        assert (bound >= exact).all()
        looseness.append([(bound - exact).mean(), (fixed.fresh(fixed.query(sums)) - exact).mean()])
        sums = sums + every[row]
    assert index.size == index.capacity
    assert index.lessons > 10
    assert np.divide(*np.mean(looseness, axis=0)) < 0.5


def test_the_canonical_score_is_within_the_margin_of_the_true_one():
    """The one link between float64 scores and real arithmetic that every bound relies on."""
    rng = np.random.default_rng(0)
    for d in (1, 7, 33):
        rows = ArrayRows(rng.normal(size=(8, d)).astype(np.float16), rng.normal(size=d), block_rows=4)
        u = unit_target(rows.target)
        every = vectors(rows.read(0, 8), "raw")
        sums = every[0] * -(1 + 2.0**-30)
        margin = SubspaceIndex(rows, 0, 8, "raw", u, 8).margin
        for got, g in zip(scores(sums, every, u), every, strict=True):
            total = [Fraction(a) + Fraction(b) for a, b in zip(sums[0], g[0], strict=True)]
            along = sum(t * Fraction(v) for t, v in zip(total, u, strict=True))
            square = sum(t * t for t in total)
            true = math.copysign(math.sqrt(along * along / square), along)
            assert abs(got - true) <= margin


def test_it_reads_few_rows_of_a_decaying_spectrum():
    rng = np.random.default_rng(1)
    n, d = 6000, 128
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -1.0
    rows = ArrayRows(x.astype(np.float16), rng.normal(size=d) * np.arange(1, d + 1) ** -1.0)
    chosen = select(rows, Columns(), Select(size=200, verify=20))
    assert chosen.summary["certificate"]["rows_compared_mean"] < n / 20
    assert len(chosen.summary["certificate"]["picks_verified"]) == 20
    assert chosen.certificate.rows_read.sum() < 200 * n / 100


@pytest.mark.parametrize("restart", [0, 7])
@pytest.mark.parametrize("balanced", [False, True])
def test_verify_finds_a_pick_that_is_not_the_best(restart, balanced):
    rows = hard_rows(0, 60, 12, 2, np.float16, "plain")
    eligible = rows.read(0, 60).valid
    label = np.random.default_rng(0).integers(0, 3, 60).astype(np.int32) if balanced else None
    order, _ = exact_greedy(rows, eligible, 20, "raw", restart, label)
    assert verify(rows, eligible, "raw", restart, label, order, 20) == list(range(20))
    order[[4, 5]] = order[[5, 4]]
    with pytest.raises(RuntimeError, match="pick 4"):
        verify(rows, eligible, "raw", restart, label, order, 20)


def test_a_cache_far_smaller_than_what_is_compared_changes_nothing():
    rows = hard_rows(3, 3000, 24, 1, np.float16, "near ties")
    eligible = rows.read(0, 3000).valid
    want, _ = exact_greedy(rows, eligible, 6)
    make = lambda: LocalShards([Shard(rows, 0, 3000, "raw", unit_target(rows.target), eligible, None, 1, 0)])  # noqa: E731
    assert Greedy(rows, eligible, 6, "raw", 0, None).run(make)[0].tolist() == want.tolist()


@pytest.mark.parametrize("strategy", ["greedy", "greedy_batched", "greedy_balanced"])
def test_a_selection_goes_on_from_its_journal_to_the_same_bytes(tmp_path, strategy):
    rows = hard_rows(5, 60, 10, 2, np.float16, "plain")
    columns = Columns(label=(np.arange(60) % 3).astype(np.int32))
    spec = Select(strategy=strategy, size=30, batch_size=8)

    class Killed(Exception):
        pass

    def kill_at(pick):
        def progress(done, total):
            if done == pick:
                raise Killed

        return progress

    whole = select(rows, columns, spec)
    folder = Folder(str(tmp_path / "journal"))
    from engine.select import journal as module

    before, module._EVERY_PICKS = module._EVERY_PICKS, 3
    try:
        for pick in (7, 11, 28):
            with pytest.raises(Killed):
                select(rows, columns, spec, kill_at(pick), journal=folder)
        resumed = select(rows, columns, spec, journal=folder)
        again = select(rows, columns, spec, kill_at(1), journal=folder)
    finally:
        module._EVERY_PICKS = before
    for got in (resumed, again):
        for name in ("rows", "objective", "gain", "norm", "path"):
            assert getattr(got, name).tobytes() == getattr(whole, name).tobytes()
        assert got.certificate.score.tobytes() == whole.certificate.score.tobytes()


def test_a_journal_of_another_selection_or_another_store_is_refused(tmp_path):
    rows = hard_rows(5, 60, 10, 1, np.float16, "plain")
    folder = Folder(str(tmp_path / "journal"))
    select(rows, Columns(), Select(size=10), journal=folder)
    with pytest.raises(UserError, match=r"size = 10.*has 11"):
        select(rows, Columns(), Select(size=11), journal=folder)
    other = ArrayRows(
        rows._features * np.float16(0.5) + np.float16(0.1), rows.target, rows._scale, rows.valid
    )
    with pytest.raises(UserError, match="store has changed"):
        select(other, Columns(), Select(size=10), journal=folder)


KILLED = """
import os, sys
import numpy as np
sys.path.insert(0, {root!r})
from engine.rows import ArrayRows
from engine.select import Columns, journal, select
from engine.spec import Select
from engine.storage import Folder
journal._EVERY_PICKS = 5
x = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float16)
def progress(done, total):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
got = select(ArrayRows(x, np.ones(16)), Columns(), Select(size=60), progress, journal=Folder(sys.argv[1]))
np.save(sys.argv[1] + ".npy", np.stack([got.rows.astype(float), got.objective, got.gain, got.norm]))
"""


def test_a_selection_killed_with_signal_9_resumes_to_the_same_file(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    program = KILLED.format(root=root)

    def run(folder, kill_at):
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / folder), str(kill_at)]
        ).returncode

    assert run("a", 0) == 0
    assert run("b", 33) == -signal.SIGKILL
    assert 0 < len([name for name in os.listdir(tmp_path / "b") if name[0].isdigit()]) <= 6
    assert run("b", 0) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
