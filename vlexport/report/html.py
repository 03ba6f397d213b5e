"""A report as one self-contained HTML page: no script, no request, strict content security policy, light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from vlexport.core.bundle_schema import Bundle, GateRecord, LatencyResult, OperatorTime, Report
from vlexport.core.inert import one_line
from vlexport.core.layer_record import Layers
from vlexport.core.operators import Operators
from vlexport.core.trials import SearchRecord, lost
from vlexport.report.figures import (
    account_phrase,
    accuracy_phrase,
    device_phrase,
    emulation_phrase,
    idle_passes,
    latency_phrase,
    load_phrase,
    macs_phrase,
    memory_phrase,
    missing_phrase,
    options_phrase,
    pages_phrase,
    parameters_phrase,
    ratio_phrase,
    size_phrase,
    speed_phrase,
    tail_phrase,
    throughput_phrase,
    tuning_phrase,
)
from vlexport.report.near_misses import grouped_misses
from vlexport.report.plots import can_plot, interval_plot, intervals_of, layer_plot, points_of, range_plot, trade_plot
from vlexport.report.svg import histogram_svg

_OPERATORS_SHOWN = 14
_RANGES_SHOWN = 200
_OUTLIER = 4.0
"""Ranges whose largest magnitude lies further above the typical one than this are worth a plot."""


def html_from_report(report: Report, bundle: Bundle, layers: Layers | None = None) -> str:
    """The page. Every name that comes from a model or a data set is escaped, and nothing in it is obeyed.

    Args:
        report: What was measured.
        bundle: Of what.
        layers: What the bundle's tables say of single layers, where it is quantized.
    """
    latency, component = report.latency, bundle.main
    layers = layers or Layers()
    slowest = max((latency.p50_ms, latency.baseline_p50_ms or 0.0)) if latency else 0.0
    style = _style()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            bundle=bundle,
            component=component,
            layers=layers,
            style=Markup(style),  # ours, the same in every page; the policy names its hash
            style_hash=Markup(_hash(style)),
            plots=_plots(report, layers),
            can_plot=can_plot(),
            trade=_trade,
            lost=lost,
            accuracy=accuracy_phrase(report),
            emulated=emulation_phrase(report),
            macs=macs_phrase(report.cost.macs, ()),
            per_run=f"at batch {bundle.main.artifact.batch(bundle.main.dims)}",
            latency_text=latency_phrase(report),
            pages=pages_phrase(report.machine),
            latency_more=[f(latency) for f in _figures_of(latency)] if latency else [],
            tuned=tuning_phrase(report.tuning) if report.tuning is not None else "",
            shown_account=account_phrase,
            shown_missing=missing_phrase,
            shown_options=options_phrase,
            shown_ratio=ratio_phrase,
            shown_gate=_gate,
            histogram=histogram_svg,
            ranges=sorted(layers.ranges, key=lambda each: -each.spread)[:_RANGES_SHOWN],
            misses=grouped_misses(report.passes),
            idle=idle_passes(report.passes),
            size=size_phrase(report.size_bytes),
            device=device_phrase(bundle.device_profile),
            parameters=parameters_phrase(report.cost.parameters),
            slowest=slowest,
            spent=_spent(latency) if latency else (),
            **_operator_rows(component.operators),
        )
    )


def _spent(latency: LatencyResult) -> list[tuple[str, OperatorTime | None, OperatorTime | None]]:
    """Operator → ours and the baseline's, the most expensive first."""
    both = (latency.operators, latency.baseline_operators)
    ours, theirs = ({each.operator: each for each in times} for times in both)
    found = [(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
    return sorted(found, key=lambda row: -max(each.ms for each in row[1:] if each is not None))[:_OPERATORS_SHOWN]


def _figures_of(latency: LatencyResult) -> list[Callable[[LatencyResult], str]]:
    """What is said of a latency; of its speed in operations only where that was measured."""
    found: list[Callable[[LatencyResult], str]] = [tail_phrase, throughput_phrase, load_phrase, memory_phrase]
    return [*found, speed_phrase] if latency.ceilings else found


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vlexport.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _inert(value: Any) -> Any:
    """Text without control and format characters; figures and our own markup as they are."""
    if isinstance(value, Markup | int | float):
        return value
    return one_line(str(value))


@lru_cache(maxsize=1)
def _style() -> str:
    return resources.files("vlexport.report").joinpath("report.css").read_text(encoding="utf-8")


def _hash(style: str) -> str:
    """What the policy calls the one style sheet that a browser may apply."""
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}"


def _plots(report: Report, layers: Layers) -> dict[str, Markup | None]:
    """What there is to draw, where it can be drawn."""
    drawn: dict[str, Markup | None] = {"intervals": None, "layers": None, "ranges": None}
    if not can_plot():
        return drawn
    if rows := intervals_of(report):
        drawn["intervals"] = interval_plot(rows)
    if measured := tuple(each for each in layers.layers if each.sqnr_db is not None):
        drawn["layers"] = layer_plot(measured)
    if outliers := tuple(each for each in layers.ranges if each.spread >= _OUTLIER):
        drawn["ranges"] = range_plot(outliers)
    return drawn


def _trade(search: SearchRecord) -> Markup | None:
    """Speed against accuracy of a search's candidates, where two can be told apart and it can be drawn."""
    points = points_of(search) if can_plot() else ()
    return trade_plot(points) if len(points) > 1 else None


def _operator_rows(operators: Operators | None) -> dict[str, Any]:
    """Rows of the histogram: the commonest, then the rest in one line."""
    counts = operators.counts if operators is not None else ()
    return {
        "operator_rows": counts[:_OPERATORS_SHOWN],
        "other_rows": counts[_OPERATORS_SHOWN:],
        "most_calls": max((max(each.before, each.after) for each in counts), default=0),
    }


def _gate(gate: GateRecord) -> str:
    """What the numeric gate found, for a column."""
    if gate.proof in ("off", "identical"):
        return gate.proof
    said = f"{gate.worst:.0e}, {gate.proof}"
    if gate.value is not None and gate.bound is not None:
        said += f" {gate.statistic} {gate.value:g} (bound {gate.bound:g})"
    return said
