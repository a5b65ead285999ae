"""Ten thousand bad documents among good ones: each is quarantined with a reason, the good ones' bytes stay."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from engine.errors import UserError
from engine.integrity import verify
from engine.rundir import QUARANTINE, RunDir
from engine.spec import RunSpec
from engine.store import QUARANTINED, GradientStore
from jobs.extract import extract
from jobs.job import Job

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 512
"""Documents of a partition."""


def bad_lines(n: int, rng: random.Random) -> list[bytes]:
    """n lines of jsonl none of which is a document."""
    word = json.dumps
    makers: list[Any] = [
        lambda i: b'{"text": ""}',
        lambda i: b'{"text": "  \\t \\u00a0 "}',
        lambda i: b'{"text": null}',
        lambda i: word({"text": i}).encode(),
        lambda i: word({"text": [f"goal {i}"]}).encode(),
        lambda i: word({"text": {"text": f"goal {i}"}}).encode(),
        lambda i: word({"text": True}).encode(),
        lambda i: word({"body": f"no text {i}"}).encode(),
        lambda i: b'{"text": "lone \\ud800 surrogate"}',
        lambda i: f'{{"text": "caf\xe9 {i}"}}'.encode("latin-1"),
        lambda i: '{"text": "utf-16"}'.encode("utf-16").replace(b"\n", b" "),
        lambda i: b'{"text": "broken',
        lambda i: b"[" * 100_000,
        lambda i: b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        lambda i: b'{"text": ' + b"9" * 5_000 + b"}",
        lambda i: b"<html>not json</html>",
        lambda i: b"\x00\x01\x02\xff",
        lambda i: word([f"goal {i}"]).encode(),
        lambda i: b"NaN",
        lambda i: b'{"text": "a", "text": 5}',
    ]
    return [makers[i % len(makers)](rng.randrange(10**6)) for i in range(n)]


def odd_texts() -> list[str]:
    """Texts that are strange and yet documents."""
    return [
        "\x00\x01\x02\x07\x08\x1b[31m", "goal\x00striker",
        "\u202e\u200f\ufeff\u2028", "\U0010ffff" * 50, "\u0301" * 500,
        "<script>alert(1)</script>", "{text} {{text}} %s %n ../../etc/passwd", "=cmd|' /C calc'!A0", "' OR 1=1; --",
        "goal " * 2_000_000,
    ]  # fmt: skip


def write_files(folder: Path, hostile: bool, bad: int, good: int) -> list[str]:
    """The corpus: hostile lines, or empty documents in their place; good ones at the same rows."""
    rng = random.Random(0)
    lines = [json.dumps({"text": text, "id": "same id"}).encode() for text, _ in tiny.sentences(good, 5)]
    lines += bad_lines(bad, rng) if hostile else [b'{"text": ""}'] * bad
    order = list(range(good + bad))
    random.Random(1).shuffle(order)  # the same for both
    (folder / "a.jsonl").write_bytes(b"".join(lines[i] + b"\n" for i in order))
    with open(folder / "b.csv", "w", newline="") as file:
        file.write("text,id\n")
        for text, _ in tiny.sentences(20, 6):
            file.write(f'"{text}",1\n')
            file.write('"an "open" quote,2\n' if hostile else "   ,2\n")
    texts = [text for text, _ in tiny.sentences(600, 7)]
    pq.write_table(
        pa.table({"text": texts, "id": ["1"] * 600}), folder / "c.parquet", row_group_size=200,
        compression="none", use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    if hostile:  # the middle row group's page
        data = bytearray((folder / "c.parquet").read_bytes())
        place = data.index(texts[300].encode())
        data[place : place + 4] = b"\xff\xff\xff\xff"
        (folder / "c.parquet").write_bytes(data)
    filled = good + bad + 40 + 600
    fill = (
        -filled % ROWS
    )  # strange documents in a partition of their own: they share no batch with the others
    odd = [*([""] * fill), *(odd_texts() if hostile else [])]
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text, "id": None}) + "\n" for text in odd))
    return [str(folder / name) for name in ("a.jsonl", "b.csv", "c.parquet", "d.jsonl")]


def spec_of(folder: Path, files: list[str], base: str, finetuned: str) -> RunSpec:
    return RunSpec.from_dict(
        {
            "run_dir": str(folder / "run"),
            "models": {"base": base, "finetuned": finetuned},
            "corpus": {"paths": files, "partition_rows": ROWS, "max_quarantined": 1.0, "id": "id"},
            "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
            "gradients": {"dtype": "float32", "projector": "tensorsketch", "dim": 32},
            "extract": {"workers_max": 2, "cpus_per_worker": 0.5, "threads": 1},
            "select": {"size": 5},
        }
    )


@pytest.mark.slow
def test_ten_thousand_bad_documents_harm_nobody(tmp_path: Path, tiny_base: str, tiny_finetuned: str) -> None:
    stores = []
    for hostile in (True, False):
        folder = tmp_path / str(hostile)
        folder.mkdir()
        files = write_files(folder, hostile, bad=10_000, good=1_500)
        result = extract(Job(spec_of(folder, files, tiny_base, tiny_finetuned), quiet=True))
        run = RunDir(str(folder / "run"))
        assert verify(run).damage == []
        stores.append(
            (GradientStore.open(run), pq.read_table(folder / "run" / QUARANTINE).to_pydict(), result)
        )
    (ours, listed, result), (theirs, blank, _) = stores
    bad = np.flatnonzero(ours.column("state") == QUARANTINED)
    assert listed["row"] == bad.tolist()
    assert all(listed["reason"])
    assert len(bad) >= 10_000 + 20 + 200
    assert result["quarantined"] == len(bad)
    assert len(set(listed["reason"])) > 8_000  # each with its line
    assert 10 < len(result["quarantine_reasons"]) <= 21  # the summary by kind
    assert sum(result["quarantine_reasons"].values()) == len(bad)
    kinds = (
        "is empty",
        "is null",
        "of type",
        "not UTF-8",
        "not JSON",
        "no 'text'",
        "nested too deeply",
        "csv",
        "damaged",
    )
    for kind in kinds:
        assert any(kind in why for why in listed["reason"]), kind
    # the lost row group is 200 good documents more that are bad here and good there
    n = theirs.n_rows - (-(1_500 + 10_000 + 640) % ROWS)
    lost = set(range(1_500 + 10_000 + 40 + 200, 1_500 + 10_000 + 40 + 400))
    good = np.array([row for row in np.flatnonzero(theirs.valid[:n]) if row not in lost])
    assert len(good) == 1_500 + 20 + 400
    assert not set(good.tolist()) & set(bad.tolist())
    apart = np.array([row for row in good if row // ROWS not in {r // ROWS for r in lost}])
    one, two = ours.take(apart), theirs.take(apart)
    np.testing.assert_array_equal(one.features, two.features)
    np.testing.assert_array_equal(one.scale, two.scale)
    # beside the lost row group fewer documents share a batch: equal to rounding
    one, two = ours.take(good), theirs.take(good)
    np.testing.assert_allclose(one.features.astype(float), two.features.astype(float), rtol=0, atol=1e-3)
    np.testing.assert_allclose(one.scale, two.scale, rtol=1e-3)
    assert ours.valid[-len(odd_texts()) :].all()
    assert set(blank["reason"]) >= {"text is empty"}


def test_a_truncated_archive_is_refused_by_name_before_anything_is_computed(
    tmp_path: Path, tiny_base: str, tiny_finetuned: str
) -> None:
    """Nobody knows how many documents its lost end held, so it is no matter of a share."""
    lines = "".join(
        json.dumps({"text": f"{text} {i}"}) + "\n" for i, (text, _) in enumerate(tiny.sentences(50_000))
    )
    data = gzip.compress(lines.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) * 2 // 3])
    spec = spec_of(tmp_path, [str(tmp_path / "cut.jsonl.gz")], tiny_base, tiny_finetuned)
    spec = spec.model_copy(update={"corpus": spec.corpus.model_copy(update={"id": None})})
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz breaks off after line \d+") as caught:
        extract(Job(spec, quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
