"""The plots of a report, drawn by matplotlib where it is installed (``pip install 'vlexport[report]'``).

Every plot repeats what a table of the page says, so that a page without them lacks nothing but the picture.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vlexport.core.bundle_schema import Report
from vlexport.core.layer_record import LayerRecord, RangeRecord
from vlexport.core.verdict import Verdict
from vlexport.report.svg import INKS, SETTINGS, shown, svg_from_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.0
"""Inches of 72 units; a phone shows it at about its own size."""
_LEFT, _RIGHT = 0.34, 0.95
_LAYERS_SHOWN = 40


@dataclass(frozen=True)
class Interval:
    """One row of an interval plot.

    Attributes:
        name: What was measured, with its unit.
        value: The figure.
        low: Lower end of its interval; that of the figure where there is none.
        high: Upper end.
        mark: Where a gate's bound or a reference lies, in the same unit; None for neither.
    """

    name: str
    value: float
    low: float
    high: float
    mark: float | None = None


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def intervals_of(report: Report) -> tuple[Interval, ...]:
    """What a report knows with an interval, each row for an axis of its own."""
    found = []
    bounds = {each.measured.metric: each for each in reversed(report.verdicts)}
    accuracy = report.accuracy
    if accuracy is not None:
        mark = _bound(bounds.get("top1"), accuracy.reference_top1)
        found.append(Interval("top-1, %", accuracy.top1, accuracy.top1_low, accuracy.top1_high, mark))
        if accuracy.drop is not None and accuracy.drop_low is not None and accuracy.drop_high is not None:
            mark = _bound(bounds.get("drop"), 0.0)
            found.append(Interval("drop, points", accuracy.drop, accuracy.drop_low, accuracy.drop_high, mark))
    latency = report.latency
    if latency is not None and latency.ratio is not None and latency.ratio_low is not None:
        high = latency.ratio_high if latency.ratio_high is not None else latency.ratio
        found.append(Interval("times as fast", latency.ratio, latency.ratio_low, high, 1.0))
    return tuple(each for each in found if all(map(math.isfinite, (each.value, each.low, each.high))))


def _bound(verdict: Verdict | None, otherwise: float | None) -> float | None:
    return verdict.gate.value if verdict is not None else otherwise


@lru_cache(maxsize=8)
def interval_plot(rows: tuple[Interval, ...]) -> Markup:
    """One short axis a row: a dot of the figure on the bar of its interval, and a broken line at what it is held to."""
    with _settings():
        figure = _figure(0.62 * len(rows))
        for index, row in enumerate(rows):
            height = 1 / len(rows)
            axes = _axes(figure, bottom=1 - height * (index + 0.62), height=height * 0.4)
            ends = [row.low, row.high, row.value] + ([row.mark] if row.mark is not None else [])
            margin = max((max(ends) - min(ends)) * 0.12, abs(row.value) * 0.04, 0.2)  # no zoom into nothing
            axes.set_xlim(min(ends) - margin, max(ends) + margin)
            axes.set_ylim(-0.5, 0.5)
            if row.mark is not None:
                _line(axes, [row.mark, row.mark], [-0.5, 0.5], "bad", 1.5, dashed=True)
            _line(axes, [row.low, row.high], [0, 0], "base", 2)
            _line(axes, [row.value, row.value], [-0.25, 0.25], "ours", 4)
            axes.set_yticks([0], [row.name])
            axes.set_xticks([row.low, row.high], [f"{row.low:.4g}", f"{row.high:.4g}"] if row.high > row.low else None)
            if row.high - row.low < margin:
                axes.set_xticks([row.value], [f"{row.value:.4g}"])
        told = "; ".join(f"{each.name} {each.value:.4g}, {each.low:.4g} to {each.high:.4g}" for each in rows)
        return svg_from_figure(figure, title=f"Figures with their intervals: {told}")


@lru_cache(maxsize=8)
def layer_plot(layers: tuple[LayerRecord, ...]) -> Markup:
    """Signal to noise ratio of each layer in the graph's order; only the worst are drawn where there are many."""
    rows = [each for each in layers if each.sqnr_db is not None]
    worst = sorted(rows, key=lambda each: each.sqnr_db or 0.0)[:_LAYERS_SHOWN]
    kept = [each for each in rows if each in worst]
    values = [each.sqnr_db or 0.0 for each in kept]
    with _settings():
        figure = _figure(0.2 * len(kept) + 0.5)
        axes = _axes(figure, bottom=0.4 / (0.2 * len(kept) + 0.5), height=1 - 0.5 / (0.2 * len(kept) + 0.5))
        axes.barh(range(len(kept)), values, height=0.6, color=INKS["ours"], clip_on=False)
        _rows(axes, [each.module or each.op for each in kept])
        axes.set_xlabel("signal to noise ratio, dB", color=INKS["soft"], size=9)
        low = f"{kept[values.index(min(values))].module} {min(values):.1f} dB" if kept else "none"
        return svg_from_figure(figure, title=f"Signal to noise ratio of {len(kept)} layers, least {low}")


@lru_cache(maxsize=8)
def range_plot(ranges: tuple[RangeRecord, ...]) -> Markup:
    """How far the largest value of each range lies above the magnitude that 99.9 % stay within, the farthest first."""
    kept = sorted((each for each in ranges if each.typical), key=lambda each: -each.spread)[: _LAYERS_SHOWN // 2]
    with _settings():
        figure = _figure(0.2 * len(kept) + 0.5)
        axes = _axes(figure, bottom=0.4 / (0.2 * len(kept) + 0.5), height=1 - 0.5 / (0.2 * len(kept) + 0.5))
        axes.barh(range(len(kept)), [each.spread for each in kept], height=0.6, color=INKS["base"], clip_on=False)
        _rows(axes, [f"{each.op} {each.module}" for each in kept])
        axes.set_xlabel("largest over typical magnitude", color=INKS["soft"], size=9)
        most = f"{kept[0].op} in {kept[0].module} at {kept[0].spread:.1f} times" if kept else "none"
        return svg_from_figure(figure, title=f"Outliers of {len(kept)} values, farthest {most}")


def _settings() -> Any:
    import matplotlib

    return matplotlib.rc_context(SETTINGS)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, max(height, 0.7)))
    figure.patch.set_visible(False)
    return figure


def _axes(figure: Figure, *, bottom: float, height: float) -> Axes:
    axes = figure.add_axes((_LEFT, bottom, _RIGHT - _LEFT, height))
    axes.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(INKS["line"])
    axes.tick_params(left=False, bottom=False, labelcolor=INKS["ink"], labelsize=9)
    return axes


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shown(name, most=24) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], ink: str, width: float, *, dashed: bool = False) -> None:
    axes.plot(
        x, y, color=INKS[ink], linewidth=width, linestyle="--" if dashed else "-", clip_on=False,
        solid_capstyle="butt",
    )  # fmt: skip
