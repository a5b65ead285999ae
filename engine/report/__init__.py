"""The report: one self-contained HTML page of a run, without network, safe to open whatever the corpus holds.

A document is hostile until shown otherwise: every value passes through jinja's autoescape or, in the data
block, through `documents.data_block`; the page's own style and script are allowed by hash, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from engine.report import numbers, sections
from engine.report.text import clean
from engine.rundir import RunDir
from engine.spec import RunSpec

__all__ = ["render"]


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
            map:      corpus [[x, y]], selected [[x, y]]: gradients in two dimensions
            diagnostics {name: value}, versions {package: version}, warnings [sentence]
    """
    css, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_source(css)}; script-src {_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # A StrictUndefined template fails in the tests, not with a hole in somebody's report.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(
        value=numbers.value,
        plus_minus=numbers.plus_minus,
        gap=numbers.gap,
        figures=numbers.figures,
        fixed=numbers.fixed,
        count=numbers.count,
        duration=numbers.duration,
    )
    context = sections.context(run, spec, metrics, selection, summary)
    page = environment.from_string(_asset("page.html"))
    return page.render(css=Markup(css), script=Markup(script), policy=policy, **context)


def _finalize(value: Any) -> Any:
    """Every printed value: text is cleaned; markup of our own stays as it is."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """A Content-Security-Policy source that allows exactly this inline content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
