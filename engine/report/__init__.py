"""The report of a run: one self-contained HTML page, the same in Markdown, and its values as JSON.

The page needs no network and is safe to open whatever the corpus holds.

A document is hostile until shown otherwise: every value passes through jinja's autoescape or, in the data
block, through `documents.data_block`; the page's own style and script are allowed by hash, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from engine.report import documents, facts, numbers
from engine.report.plane import plane
from engine.report.text import clean, markdown
from engine.rundir import RunDir
from engine.spec import RunSpec

__all__ = ["plane", "render", "render_json", "render_markdown"]


def render(
    run: RunDir, spec: RunSpec, metrics: dict[str, Any] | None, selection: pa.Table, summary: dict[str, Any]
) -> str:
    """The page; equal inputs give equal bytes.

    Args:
        run: the run directory; only its name and its stage records (fingerprints, seconds) are read.
        spec: the resolved spec.
        metrics: metrics.json (`engine.evaluate.comparison`), or None when nothing was evaluated.
        selection: selection.parquet, in pick order.
        summary: results of the stages, every key optional::

            select:   strategy, size, candidates, peak {size, value}, path [f after each pick], random_path
                      {sizes, mean, std}, certificate {name: value}, seconds
            extract:  documents, quarantined, quarantine_reasons {reason: count}, label_counts [per label],
                      confidence_histogram {edges, counts}, projector, dim, layers, checkpoints, seconds,
                      documents_per_second, tokens, truncated
            map:      what `plane` returns
            spent:    seconds by stage, over all its starts; price_per_hour: of the machines, for the cost
            diagnosed: diagnostics.json (`jobs.diagnose`)
            diagnostics {name: value}, versions {package: version}, warnings [sentence]

            A selection with the columns nearest (text) and nearest_distance shows, with each document, the
            true training document nearest to it.
    """
    css, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_source(css)}; script-src {_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    known = facts.facts(run, spec, metrics, selection, summary)
    block, in_block = documents.data_block(selection, spec.task.names)
    return _template("page.html", True).render(
        css=Markup(css),
        script=Markup(script),
        policy=policy,
        spec=spec,
        yaml=spec.to_yaml(),
        documents=documents.first(selection, spec.task.names),
        data=block,
        n_searchable=in_block,
        figures=_figures(known, selection, summary.get("select") or {}),
        **known,
    )


def render_markdown(
    run: RunDir, spec: RunSpec, metrics: dict[str, Any] | None, selection: pa.Table, summary: dict[str, Any]
) -> str:
    """The report without figures, in GitHub's Markdown; arguments as `render`'s."""
    known = facts.facts(run, spec, metrics, selection, summary)
    first = documents.first(selection.slice(0, MARKDOWN_DOCUMENTS), spec.task.names)
    code = Markup(" ".join(known["command"].split()))  # on one line, in a code block: nothing is read in it
    return _template("page.md", False).render(documents=first, code=code, **known)


def render_json(
    run: RunDir, spec: RunSpec, metrics: dict[str, Any] | None, selection: pa.Table, summary: dict[str, Any]
) -> str:
    """All values of the report as JSON, but for the documents, which are selection.parquet; as `render`."""
    known = facts.facts(run, spec, metrics, selection, summary) | {"spec": spec.model_dump(mode="json")}
    return json.dumps(known, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


MARKDOWN_DOCUMENTS = 20
"""Documents listed in Markdown."""


def _figures(known: dict[str, Any], selection: pa.Table, select: dict[str, Any]) -> dict[str, Markup | None]:
    """The figures of the page by name, None where there is nothing to draw."""
    from engine.report import plots  # loads matplotlib, which the terminal's table does without

    objective = known["objective"]
    path = facts.objective_path(selection, select)
    random = select.get("random_path") or None
    return {
        "comparison": plots.comparison(known["metrics"]) if known["metrics"] else None,
        "objective": plots.objective(path, objective["peak"], random) if objective else None,
        "norms": plots.norms(facts.column(selection, "norm")),
        "confidence": plots.confidence(known["confidence"]) if known["confidence"] else None,
        "map": plots.scatter(known["map"]) if known["map"] else None,
    }


def _template(name: str, html: bool) -> jinja2.Template:
    """A template; printed values are escaped for HTML, or for Markdown."""
    # A StrictUndefined template fails in the tests, not with a hole in somebody's report.
    environment = jinja2.Environment(
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize if html else markdown,
    )
    environment.globals["distances"] = facts.DISTANCES
    environment.filters.update(
        value=numbers.value,
        plus_minus=numbers.plus_minus,
        gap=numbers.gap,
        interval=numbers.interval,
        figures=numbers.figures,
        fixed=numbers.fixed,
        count=numbers.count,
        duration=numbers.duration,
    )
    return environment.from_string(_asset(name))


def _finalize(value: Any) -> Any:
    """Every printed value: text is cleaned; markup of our own stays as it is."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """A Content-Security-Policy source that allows exactly this inline content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
