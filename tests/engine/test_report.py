"""Promises of engine.report: numbers are metrics.json's, hostile text stays text, nothing leaves the page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.evaluate.comparison import metrics
from engine.report import plane, plots, render, render_json, render_markdown
from engine.report.documents import BUDGET, data_block
from engine.report.text import clean, cut
from engine.rows import ArrayRows
from engine.rundir import RunDir
from engine.spec import RunSpec

NAMES = ["World", "Sports & <b>Games</b>", "Business", "$Sci/Tech$"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><svg onload=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus '",
    "<img src=x onerror=alert(1)>",
    "<!-- <script>",
    "{{7*7}} {% include 'x' %} ${alert(1)}",
    "javascript:alert(1) &lt;b&gt; &#60;i&#62;",
    "\x00\x07\x1b[31m\x9b\u2028\u2029\u202ereversed",
    "]]> <![CDATA[ <iframe src='https://example.com'>",
    "<style>@import url(https://example.com/a.css); * { display: none }</style>",
    "</style><link rel=stylesheet href=https://example.com/b.css><base href=https://example.com/>",
    "<div style='position: fixed; inset: 0; background: url(https://example.com/c.png)' ontoggle=alert(2)>",
    "<svg><style>* { fill: url(https://example.com/d.svg) }</style><script href=data:,alert(2) /></svg>",
    "<svg><animate onbegin=alert(2) attributeName=x dur=1s /><foreignObject><form action=//example.com>",
    "<math><mtext><meta http-equiv=refresh content='0; url=https://example.com/'><object data=//example.com>",
]


class Page(HTMLParser):
    """Elements with attributes, and the text of every element by its id or tag."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def run_spec(**fields: Any) -> RunSpec:
    return RunSpec.from_dict(
        {
            "models": {"base": "models/base", "finetuned": "models/<fine>&tuned"},
            "corpus": {"paths": ["corpus/<script>.jsonl"]},
            "task": {"labels": tiny.LABELS, "display_names": NAMES},
            **fields,
        }
    )


def selected(texts: list[str]) -> pa.Table:
    n = len(texts)
    objective = 0.5 * np.sin(np.linspace(0, 2.5, n + 1)[1:])
    return pa.table(
        {
            "rank": np.arange(n),
            "doc_id": [f"id-{i}<i>" for i in range(n)],
            "text": pa.array([t.encode("utf-8", "replace").decode() for t in texts]),
            "label": pa.array([i % 5 - 1 for i in range(n)], pa.int32()),
            "confidence": [(i + 1) / (n + 1) for i in range(n)],
            "norm": [1.0 / (i + 1) for i in range(n)],
            "objective": objective,
            "gain": np.diff(objective, prepend=0.0),
        }
    )


def judged(name: str = "accuracy") -> dict[str, Any]:
    values = {"random": (0.7411, 0.7653), "greedy": (0.8281, 0.8367), "topk": (0.5, 0.541)}
    entries = [("base", None, None, 0.2667), ("finetuned", None, None, 0.8721)]
    entries += [("retrained", s, seed, v) for s, pair in values.items() for seed, v in enumerate(pair)]
    part = {"documents": 700, "tokens": 31337}
    models = [
        {"model": m, "strategy": s, "seed": seed, "validation": part, "test": {**part, name: v}}
        for m, s, seed, v in entries
    ]
    return metrics(models, name, 3.0)


SUMMARY: dict[str, Any] = {
    "select": {
        "strategy": "greedy",
        "candidates": 6000,
        "peak": {"size": 7, "value": 0.4987},
        "random_path": {"sizes": [1, 5, 11], "mean": [0.01, 0.05, 0.0712], "std": [0.01, 0.01, 0.0034]},
        "certificate": {"certified": 11, "note": "<b>"},
        "seconds": 61.4,
    },
    "extract": {
        "documents": 6000,
        "quarantined": 3,
        "quarantine_reasons": {"<empty>": 2, "not a string": 1},
        "label_counts": [3000, 1500, 500, 1000],
        "projector": "exact",
        "dim": 2304,
        "layers": ["lm_head.weight"],
        "checkpoints": [0.5, 1.0],
        "seconds": 4000.0,
        "documents_per_second": 18.66,
        "confidence_histogram": {"edges": [0.0, 0.5, 1.0], "counts": [10, 30]},
    },
    "diagnostics": {"mean cosine": 0.61},
    "map": {
        "corpus": [[0, 1], [1, 0]],
        "selected": [[1, 1]],
        "target": [0.5, 0.5],
        "variance": [0.61, 0.2],
    },
    "warnings": ["<u>redundant</u>"],
}


def test_every_completed_stage_is_listed_in_order(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    for name, seconds in (
        ("select", 61.4),
        ("evaluate-base", 2.0),
        ("extract", 4000.0),
        ("retrain-greedy-0", None),
    ):
        run.begin(name, {"a": name})
        run.finish(name, {"a": name}, {} if seconds is None else {"seconds": seconds})
    run.begin("retrain-greedy-1", {"a": 1})  # not completed
    html = render(run, run_spec(), None, selected(HOSTILE), {})
    table = html[html.index('<th scope="col">Stage</th>') :].split("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th><td class="number">(.*?)</td>', table) == [
        ("extract", '<data value="4000.0">1 h 06 min</data>'),
        ("select", '<data value="61.4">1 min 01 s</data>'),
        ("retrain-greedy-0", "–"),
        ("evaluate-base", '<data value="2.0">2.0 s</data>'),
        ("all", '<data value="4063.4">1 h 07 min</data>'),
    ]
    assert run.stage_fingerprint("extract")[:16] in table


def test_time_counts_every_start_and_a_price_makes_it_cost(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    for name in ("extract", "retrain-greedy-0", "retrain-topk-0"):
        run.begin(name, {"a": name})
        run.finish(name, {"a": name}, {"seconds": 10.0})
    summary = {"spent": {"extract": 3600.0, "retrain": 1800.0}, "price_per_hour": 4.0}
    known = json.loads(render_json(run, run_spec(), None, selected(HOSTILE), summary))
    rows = {row["name"]: (row["seconds"], row["part"]) for row in known["stages"]}
    assert rows == {
        "extract": (3600.0, False), "retrain": (1800.0, False),
        "retrain-greedy-0": (10.0, True), "retrain-topk-0": (10.0, True),
    }  # fmt: skip
    assert known["total_seconds"] == 5400.0
    assert known["total_cost"] == 6.0
    html = render(run, run_spec(), None, selected(HOSTILE), summary)
    assert '<data value="6.0">6.00</data>' in html
    assert "Cost</th>" not in render(run, run_spec(), None, selected(HOSTILE), {})


def test_json_holds_what_the_page_shows(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    known = json.loads(render_json(run, run_spec(), judged(), selected(HOSTILE), SUMMARY))
    assert known["metrics"] == judged()
    assert known["sentence"].startswith(f"Out of 6,000 documents, greedy chose {len(HOSTILE)} ")
    assert known["objective"]["peak"] == {"size": 7, "value": 0.4987}
    assert [row["corpus"] for row in known["labels"]] == [3000, 1500, 500, 1000]
    assert sum(known["confidence"]["selected"]) == len(HOSTILE)
    assert known["map"] == SUMMARY["map"]
    assert RunSpec.from_dict(known["spec"]) == run_spec()


def test_markdown_has_the_same_numbers_and_no_markup_of_the_corpus(tmp_path: Path) -> None:
    texts = [*HOSTILE, "# a | heading", "[x](javascript:1) ![](https://example.com/a.png) *b* `c`", "1. one"]
    run = RunDir(str(tmp_path))
    text = render_markdown(run, run_spec(), judged(), selected(texts), SUMMARY)
    assert "| greedy | 83.2 ± 0.6% | 66.6 ± 0.3% | 64 to 69% | 2 |" in text
    assert f"Out of 6,000 documents, greedy chose {len(texts)} " in text
    assert not re.search(
        r"(?<!\\)[<`]|(?<!\\)\[|://", text.replace(f"    unbake recover --config {tmp_path}", "")
    )
    listed = text[text.index(f"## The first {len(texts)} ") :]
    assert f"\n{len(HOSTILE) + 1}. \\# a \\| heading *" in listed
    assert f"\n{len(texts)}. 1\\. one *" in listed
    assert listed.count("\n1. ") == 1


def test_distances_from_the_true_set_stand_beside_each_other(tmp_path: Path) -> None:
    known = judged() | {"distances": [{"strategy": "greedy", "seed": None, "emd": 0.8125, "edit": None}]}
    run = RunDir(str(tmp_path))
    html = render(run, run_spec(), known, selected(HOSTILE), SUMMARY)
    assert '<data value="0.8125">0.812</data>' in html
    text = render_markdown(run, run_spec(), known, selected(HOSTILE), SUMMARY)
    assert "| greedy | 0.812 | – | – | – | – |" in text
    assert "true set" not in render_markdown(run, run_spec(), judged(), selected(HOSTILE), SUMMARY)


def test_the_gap_has_its_interval_where_seeds_allow_one(tmp_path: Path) -> None:
    """Student's t over the paired seeds, by hand: two seeds, one degree of freedom, t = 12.706."""
    want = judged()
    greedy = next(row for row in want["strategies"] if row["strategy"] == "greedy")
    half = 12.7062 * greedy["gap_spread"] / math.sqrt(2)
    known = json.loads(render_json(RunDir(str(tmp_path)), run_spec(), want, selected(HOSTILE), SUMMARY))
    assert known["gap_intervals"]["greedy"] == pytest.approx(
        [greedy["gap_closed"] - half, greedy["gap_closed"] + half], rel=1e-5
    )
    assert known["gap_intervals"].keys() == {"greedy", "topk"}
    html = page(tmp_path, HOSTILE)
    assert '<span class="muted">64 to 69%</span>' in html
    alone = {"gap_spread": None, "n": 1, "gap_n": 1, "values": [0.8]}
    one = want | {"strategies": [row | alone for row in want["strategies"]]}
    assert "95% interval" not in page(tmp_path, HOSTILE, metrics=one)


def test_a_run_without_diagnostics_says_how_to_make_them(tmp_path: Path) -> None:
    html = page(tmp_path, HOSTILE)
    assert f"unbake diagnose &#39;{tmp_path}/a run&#39;" in html


def test_the_nearest_true_document_is_shown_with_each(tmp_path: Path) -> None:
    table = selected(["a", "b"]).append_column("nearest", pa.array([HOSTILE[0], None]))
    table = table.append_column("nearest_distance", pa.array([0.25, None]))
    html = render(RunDir(str(tmp_path)), run_spec(), None, table, {})
    assert [row[6:] for row in data_of(html)["rows"]] == [[HOSTILE[0], 0.25], []]
    assert html.count("nearest true document, distance 0.25") == 1
    assert "<script>alert" not in html
    got = Page(html)
    assert HOSTILE[0] in [text for tag, text in got.texts if tag == "div"]


def test_the_map_spreads_the_corpus_by_its_principal_directions() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((40, 3)))[0].T
    kind = rng.integers(0, 2, 4000)
    x = np.where(kind[:, None] == 0, axes[0], -axes[0]) + 0.5 * rng.standard_normal((4000, 1)) * axes[1]
    x = (x + 0.02 * rng.standard_normal(x.shape)).astype(np.float32) * rng.uniform(0.1, 10, (4000, 1))
    valid = np.ones(4000, bool)
    valid[::7] = False
    rows = ArrayRows(x.astype(np.float32), axes[0] * 3, valid=valid)
    picked = np.flatnonzero((kind == 0) & valid)[:50]
    made = plane(rows, picked)
    assert made == plane(rows, picked)
    assert made["variance"][0] > 0.7
    assert 0.9 < sum(made["variance"]) <= 1.0
    side = {kind: np.array(made[kind])[..., 0] for kind in ("corpus", "selected", "target")}
    assert len(set(np.sign(side["selected"]))) == 1
    assert np.sign(side["target"]) == np.sign(side["selected"][0])
    assert 0.3 < (np.sign(side["corpus"]) == np.sign(side["target"])).mean() < 0.7
    # Principal component analysis by other means: the eigenvectors of the covariance.
    units = x[valid] / np.linalg.norm(x[valid], axis=1, keepdims=True)
    share = np.linalg.eigvalsh(np.cov(units.T))[::-1][:2] / np.trace(np.cov(units.T))
    np.testing.assert_allclose(made["variance"], share, atol=0.02)


def test_too_few_gradients_make_no_map() -> None:
    rows = ArrayRows(np.ones((2, 8), np.float32), np.ones(8))
    assert plane(rows, np.array([0])) is None
    assert plane(ArrayRows(np.zeros((50, 8), np.float32), np.ones(8)), np.array([0])) is None


def page(tmp_path: Path, texts: list[str], **changes: Any) -> str:
    arguments = {"metrics": judged(), "summary": SUMMARY, "spec": run_spec()} | changes
    run = RunDir(str(tmp_path / "a run"))
    return render(run, arguments["spec"], arguments["metrics"], selected(texts), arguments["summary"])


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_numbers_in_the_page_are_those_of_metrics_json(tmp_path: Path) -> None:
    want = judged()
    html = page(tmp_path, HOSTILE)
    table = re.search(r'id="comparison-title">Comparison.*?</table>', html, re.S)[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table, re.S)
    got = {name: [float(v) for v in re.findall(r'<data value="([^"]+)"', rest)] for name, rest in rows}
    assert got.pop("nothing (base)") == [want["base"]]
    assert got.pop("true data (fine-tuned)") == [want["finetuned"]]
    assert got == {row["strategy"]: [row["mean"], row["gap_closed"]] for row in want["strategies"]}
    for shown in (
        "26.7%",
        "87.2%",
        "83.2 ± 0.6%",
        "75.3 ± 1.7%",
        "66.6 ± 0.3%",
        "700 test documents",
        "31,337 tokens",
    ):
        assert shown in html
    chosen = re.search(r'<p class="lead">(.*?)</p>', html)[1]
    assert f"Out of 6,000 documents, greedy chose {len(HOSTILE)} " in chosen
    assert "83.2 ± 0.6% accuracy (random documents 75.3%, fine-tuned 87.2%), 67% of the gap" in chosen


def test_the_summary_of_the_stages_is_shown(tmp_path: Path) -> None:
    html = page(tmp_path, HOSTILE)
    for shown in (
        "after 7.",
        "0.071</data> ± ",
        "0.003</data>",
        "lm_head.weight",
        "0.5, 1.0",
        "&lt;empty&gt;",
    ):
        assert shown in html
    assert "standard error of about 1.3 points" in html  # sqrt(0.8721 * 0.1279 / 700)
    for shown in ("not evidence of membership", "mean cosine", "3,000", "50.0%", "peak at 7"):
        assert shown in html
    assert f"unbake recover --config &#39;{tmp_path}/a run/spec.yaml&#39;" in html
    assert html.count("<figure>") == 5
    data = data_of(html)
    assert len(data["rows"]) == len(HOSTILE)
    assert data["rows"][1][2:4] == [0, round(2 / (len(HOSTILE) + 1), 4)]


def test_hostile_documents_stay_text(tmp_path: Path) -> None:
    html = page(tmp_path, HOSTILE)
    got, calm = Page(html), Page(page(tmp_path, ["calm"] * len(HOSTILE)))
    assert [tag for tag, _ in got.tags] == [tag for tag, _ in calm.tags]
    assert not got.stack
    assert not [a for _, attributes in got.tags for a in attributes if a.startswith("on") or a == "style"]
    cells = [text for tag, text in got.texts if tag == "div"]
    assert [clean(text) for text in HOSTILE] == [text for text in cells if text.strip()]
    assert [row[1] for row in data_of(html)["rows"]] == [clean(text) for text in HOSTILE]
    assert "49" not in data_of(html)["rows"][7][1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)


def test_hostile_names_and_numbers_stay_text(tmp_path: Path) -> None:
    bad = "</script><b>"
    summary = {
        "select": {"strategy": bad, "certificate": {bad: bad}},
        "extract": {"projector": bad, "layers": [bad]},
    }
    summary |= {"versions": {bad: bad}, "diagnostics": {bad: bad}, "warnings": [bad]}
    named = judged()
    named["strategies"][0]["strategy"] = bad + "$x^$"
    html = page(tmp_path, ["x"] * 3, summary=summary, metrics=named)
    assert "<b>" not in html
    Page(html)


def test_nothing_but_the_page_itself_may_run_or_load(tmp_path: Path) -> None:
    html = page(tmp_path, HOSTILE)
    got = Page(html)
    policy = next(m["content"] for m in got.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    links = [
        v for _, a in got.tags for k, v in a.items() if k in ("href", "src", "xlink:href", "action", "srcset")
    ]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    acting = " ".join(
        [v or "" for _, a in got.tags for v in a.values()] + re.findall(r"<style>.*?</style>", html, re.S)
    )
    assert set(re.findall(r"url\((.)", acting)) == {"#"}  # in the text of a document it does nothing
    ids = [a["id"] for _, a in got.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {link[1:] for link in links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", acting)
    )
    assert wanted <= set(ids)


def test_a_keyboard_reaches_what_scrolls_and_regions_have_names_of_their_own(tmp_path: Path) -> None:
    got = Page(page(tmp_path, HOSTILE))
    scrolls = [a for tag, a in got.tags if tag == "pre" or "scroll" in (a.get("class") or "").split()]
    assert len(scrolls) >= 5
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolls)
    names = [
        a.get("aria-label") or a.get("aria-labelledby")
        for tag, a in got.tags
        if a.get("role") == "region" or tag == "section"
    ]
    assert len(names) == len(set(names))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    assert page(tmp_path, HOSTILE) == page(tmp_path, HOSTILE)


def test_a_page_comes_out_of_next_to_nothing(tmp_path: Path) -> None:
    run, spec = RunDir(str(tmp_path)), run_spec()
    bare = pa.table({"rank": [0], "doc_id": ["a"], "text": ["lonely"]})
    assert "lonely" in render(run, spec, None, bare, {})
    nothing = selected([]).slice(0, 0)
    assert data_of(render(run, spec, None, nothing, {}))["rows"] == []
    one = judged()
    one["strategies"] = [
        row | {"spread": None, "gap_closed": None, "gap_spread": None} for row in one["strategies"]
    ]
    assert "83.2%" in render(run, spec, one, bare, {"select": {"strategy": "greedy"}, "extract": {}})
    odd = selected(["x"] * 4).set_column(4, "confidence", pa.array([None, math.nan, math.inf, 0.5]))
    assert [row[3] for row in data_of(render(run, spec, None, odd, {}))["rows"]] == [None, None, None, 0.5]


def test_perplexity_and_prompts_are_shown(tmp_path: Path) -> None:
    spec = run_spec(task={"kind": "language_modelling"}, select={"strategy": "greedy"})
    texts = selected(["a", "b"]).append_column("prompt", pa.array(["Q1?", "Q2?"]))
    texts = texts.append_column("response", pa.array(["A1", "A2"]))
    html = render(RunDir(str(tmp_path)), spec, judged("perplexity"), texts, SUMMARY)
    assert data_of(html)["rows"][0][1] == "Q1?\n\nA1"
    assert data_of(html)["labels"] == []
    assert "perplexity" in html


def test_a_hundred_thousand_documents_fit() -> None:
    n = 100_000
    table = pa.table(
        {
            "doc_id": [f"{i:016x}" for i in range(n)],
            "text": ["<é" * 100] * n,
            "label": [1] * n,
            "confidence": [0.123456] * n,
            "gain": [1.23456e-7] * n,
            "objective": [0.456789] * n,
        }
    )
    block, held = data_block(table, NAMES)
    assert len(block.encode()) <= BUDGET + 1000
    assert held > 60_000  # of the worst text; of plain text, all of them
    plain, all_of_them = data_block(table.set_column(1, "text", pa.array(["plain text " * 30] * n)), NAMES)
    assert all_of_them == n
    assert len(plain.encode()) <= BUDGET + 1000


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=[])), st.integers(0, 40))
def test_any_string_can_be_shown(text: str, size: int) -> None:
    shown = clean(text)
    assert len(cut(shown, size).encode()) <= size + len("…".encode())
    assert clean(shown) == shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", shown)
    block, _ = data_block(pa.table({"doc_id": ["x"], "text": [shown]}), [])
    assert not re.search("[<>&]", block)
    assert json.loads(block)["rows"][0][1] == cut(shown, 4000)


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    svgs = re.findall(r"<svg xmlns.*?</svg>", page(tmp_path, HOSTILE), re.S)
    assert len(svgs) == 5
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert "<title" in svg or "aria-label" in svg
        assert "var(--" in svg
    assert not re.search(r"\d{4}-\d\d-\d\dT", "".join(svgs))


@pytest.mark.parametrize("values", [[3.1, 3.3, 3.2], [5.0, 0.4, 0.02], [1.0, 0.0], [2.0, 2.0]])
def test_norms_of_every_range_have_a_labelled_axis(values: list[float]) -> None:
    svg = str(plots.norms(np.array(values)))
    axis = [float(t) for t in re.findall(r"<text[^>]*>([\d.e-]+)</text>", svg)]
    assert len(axis) >= len(values) + 2


@pytest.mark.parametrize("size", [1, 2, 5000])
def test_paths_of_every_length_are_drawn(tmp_path: Path, size: int) -> None:
    html = page(tmp_path, ["x"] * size, summary={})
    assert len(html) < 2_000_000
    assert "objective f" in html
