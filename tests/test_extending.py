"""A strategy, a projector and a corpus format of one's own are one file each, named in the spec (examples/)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.corpus import load_plan, make_plan, read_rows
from engine.errors import UserError
from engine.projection import LayerShape, make_projector
from engine.rows import ArrayRows
from engine.rundir import RunDir
from engine.sections import section_from_fields
from engine.select import Columns, select
from engine.spec import Corpus, RunSpec, Select

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_strategy_of_ones_own_selects() -> None:
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((300, 16)).astype(np.float32), rng.standard_normal(16)
    valid = rng.random(300) < 0.9
    spec = section_from_fields(Select, {"strategy": "sign_agreement:select", "size": 20}, "the test")
    chosen = select(ArrayRows(x, target, valid=valid, block_rows=64), Columns(), spec)
    agreement = np.where(valid, (np.sign(x) == np.sign(target)).sum(axis=1), -1)
    assert chosen.rows.tolist() == sorted(range(300), key=lambda i: (-agreement[i], i))[:20]
    assert chosen.strategy == "sign_agreement:select"
    assert chosen.objective[-1] > chosen.random_path.mean[-1]


def test_a_strategy_that_breaks_the_rules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wrong_rules.py").write_text(
        "import numpy as np\n"
        "def twice(rows, columns, spec, eligible): return np.zeros(spec.size, np.int64)\n"
        "def few(rows, columns, spec, eligible): return np.arange(1)\n"
        "def quarantined_balanced(rows, columns, spec, eligible): return np.flatnonzero(~eligible)[:spec.size]\n"
    )
    rows = ArrayRows(np.eye(8, dtype=np.float32), np.ones(8), valid=np.arange(8) > 3)
    cases = {
        "twice": "twice",
        "few": "3 row numbers",
        "quarantined_balanced": "may not be selected",
        "none": "no none",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            select(rows, Columns(), Select(strategy=f"wrong_rules:{name}", size=3))
    with pytest.raises(UserError, match="PYTHONPATH"):
        select(rows, Columns(), Select(strategy="not_there_at_all:x", size=3))


def test_a_projector_of_ones_own_keeps_inner_products() -> None:
    layers = [LayerShape("a", 6, 10), LayerShape("b", 5, 8)]
    generator = torch.Generator().manual_seed(0)
    errors = [torch.randn(12, layer.rows, generator=generator) for layer in layers]
    hidden = [torch.randn(12, layer.cols, generator=generator) for layer in layers]
    docs = torch.arange(3).repeat_interleave(4)
    exact = [
        torch.stack([e[docs == i].T @ h[docs == i] for i in range(3)])
        for e, h in zip(errors, hidden, strict=True)
    ]
    grams = []
    for seed in range(400):
        projector = make_projector("coordinates:Coordinates", 32, seed, layers)
        sketch = torch.zeros(3, 32)
        for k, (e, h) in enumerate(zip(errors, hidden, strict=True)):
            state = projector.begin(k, 12, "cpu")
            projector.add_errors(state, e, 0)
            sketch += projector.finish(state, h, docs, 3)
        matrices = sum(
            torch.stack([projector.project_matrix(k, [(0, g[:2]), (2, g[2:])]) for g in whole])
            for k, whole in enumerate(exact)
        )
        torch.testing.assert_close(sketch.double(), matrices, rtol=1e-5, atol=1e-5)
        grams.append(sketch @ sketch.T)
    want = sum((whole.flatten(1) @ whole.flatten(1).T for whole in exact), torch.zeros(3, 3))
    mean, spread = torch.stack(grams).mean(0), torch.stack(grams).std(0) / 20
    assert ((mean - want).abs() < 4 * spread).all()
    assert projector.describe()["kind"] == "coordinates"


def test_a_corpus_format_of_ones_own_is_read(tmp_path: Path) -> None:
    (tmp_path / "tales.txt").write_text("One\nstill one\n\n\nTwo\n\nThree")
    corpus = Corpus(paths=[str(tmp_path / "tales.txt")], format="paragraphs:records")
    run = RunDir(str(tmp_path / "run"))
    make_plan(corpus, run)
    documents = read_rows(load_plan(run), np.arange(3), corpus)
    assert documents.text == ["One still one", "Two", "Three"]
    assert not documents.problems


def test_what_is_neither_ours_nor_named_is_refused_when_the_spec_is_read() -> None:
    fields = {
        "models": {"base": "a", "finetuned": "b"},
        "corpus": {"paths": ["c"]},
        "task": {"kind": "language_modelling"},
    }
    for section, field, value in (
        ("select", "strategy", "besst"), ("gradients", "projector", "os.system"), ("corpus", "format", "a:b:c"),
    ):  # fmt: skip
        changed = fields | {section: fields.get(section, {}) | {field: value}}
        with pytest.raises(UserError, match=rf"{section}\.{field}: '{value}' is none of .*module:name"):
            RunSpec.from_dict(changed)
    with pytest.raises(UserError, match=r"none of .* \(did you mean greedy\?\)"):
        RunSpec.from_dict(fields | {"select": {"strategy": "gredy"}})
