"""A report as one self-contained HTML page: no script, no request, strict content security policy, light and dark."""

from __future__ import annotations

from functools import lru_cache

import jinja2

from vlexport.core.bundle_schema import Bundle, Report
from vlexport.report.figures import (
    account_phrase,
    accuracy_phrase,
    emulation_phrase,
    latency_phrase,
    load_phrase,
    memory_phrase,
    missing_phrase,
    options_phrase,
    ratio_phrase,
    size_phrase,
    tail_phrase,
    throughput_phrase,
    tuning_phrase,
)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vlexport.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_from_report(report: Report, bundle: Bundle) -> str:
    """The page. Every name that comes from a model or a data set is escaped."""
    latency = report.latency
    slowest = max((latency.p50_ms, latency.baseline_p50_ms or 0.0)) if latency else 0.0
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            bundle=bundle,
            component=bundle.main,
            accuracy=accuracy_phrase(report),
            emulated=emulation_phrase(report),
            per_run=_per_run(bundle),
            latency_text=latency_phrase(report),
            latency_more=[f(latency) for f in (tail_phrase, throughput_phrase, load_phrase, memory_phrase)]
            if latency
            else [],
            tuned=tuning_phrase(report.tuning) if report.tuning is not None else "",
            shown_account=account_phrase,
            shown_missing=missing_phrase,
            shown_options=options_phrase,
            shown_ratio=ratio_phrase,
            size=size_phrase(report.size_bytes),
            slowest=slowest,
        )
    )


def _per_run(bundle: Bundle) -> str:
    """What the work is counted at: the first size of the first input."""
    main = bundle.main
    first = next((spec.shape[0] for spec in main.artifact.inputs if spec.shape), 1)
    return f"at batch {main.dims[first].opt if isinstance(first, str) else first}"
